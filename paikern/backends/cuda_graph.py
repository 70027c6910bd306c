"""Rounds that are recorded once and then replayed: a CUDA graph instead of hundreds of launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Replay"]


class Replay:
    """A function without arguments and results, which reads and writes at fixed addresses.

    The first call runs it as it is, so that kernels are loaded and what is made once is there. The
    second records it in a CUDA graph; it and all later ones replay that. Where recording fails (an
    operation that copies to the host), calls go on as they are and `why` says so.

    Args:
        like: a tensor on the device; on the CPU nothing is recorded.
    """

    def __init__(self, run: Callable[[], None], like: Tensor) -> None:
        self._run, self._like = run, like
        self._graph: torch.cuda.CUDAGraph | None = None
        self._plain = not like.is_cuda
        self._seen = False
        self.why = ""

    def __call__(self) -> None:
        if self._plain or not self._seen:
            self._seen = True
            self._run()
            return
        with torch.cuda.device_of(self._like):
            if self._graph is None and not self._record():
                self._run()
                return
            assert self._graph is not None
            self._graph.replay()

    def _record(self) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (a loader that pins memory) may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            self._plain, self.why = True, str(error).splitlines()[0]
            return False
        self._graph = graph
        return True
