"""Rounds that are recorded once and then replayed: a CUDA graph instead of hundreds of launches."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Replay"]


class Replay:
    """A function without arguments and results, which reads and writes at fixed addresses.

    The first call runs it as it is, so that kernels are loaded and what is made once is there. The
    second records it in a CUDA graph; it and all later ones replay that. Where recording fails (an
    operation that copies to the host), calls go on as they are, and `why` is for whoever runs
    them to tell.

    Args:
        like: a tensor on the device; on the CPU nothing is recorded.
    """

    def __init__(self, run: Callable[[], None], like: Tensor) -> None:
        self._run, self._like = run, like
        self._graph: torch.cuda.CUDAGraph | None = None
        self._plain = not like.is_cuda
        self._seen = False
        self.why = ""

    def note(self, what: str) -> list[str]:
        """For the notes of a run: why it is slower than it could be, if it is."""
        return [f"{what} run without a CUDA graph, slower: {self.why}"] if self.why else []

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
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        here = torch.cuda.current_stream()
        stream.wait_stream(here)
        collecting = gc.isenabled()
        # `torch.cuda.graph` collects garbage and empties the cache first, which can take longer
        # than the rounds of a small network. What it fears is a collection in between that frees
        # memory of the device: there is none. Other threads may go on calling CUDA.
        gc.disable()
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._run()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._plain, self.why = True, str(error).splitlines()[0]
            return False
        finally:
            if collecting:
                gc.enable()
            here.wait_stream(stream)
        self._graph = graph
        return True
