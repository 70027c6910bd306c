"""What the methods that run the model on data have in common: how many batches, and which."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

from paikern.batches import Batch
from paikern.scorers.base import Run, Scorer


@dataclass
class DataScorer(Scorer):
    """A scorer that runs the model on `data`.

    Args:
        batches: how many batches to read a round; None for all of `data`. Rounds go on in the data
            where the last one stopped, and start again at the end.
        batch_size: samples at a time where `data` is tensors.
    """

    batches: int | None = None
    batch_size: int = 128

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.batches is not None:
            if isinstance(self.batches, bool) or not isinstance(self.batches, Integral):
                raise ValueError(f"batches must be an integer or None, got {self.batches!r}")
            if self.batches < 1:
                raise ValueError(f"batches must be >= 1 or None, got {self.batches}")

    def read(self, run: Run, count: int | None = None, *, added: bool = True) -> list[Batch]:
        """The batches of this round, `count` of them (default: `batches`, or all).

        `added` says that they are added up, so that unequal sizes are worth a note.

        Raises:
            ValueError: the data hold fewer.
        """
        assert run.data is not None
        wanted = self.batches if count is None else count
        if wanted is None:
            found = list(run.data.samples())
        else:
            reader: _Reader = run.cache.setdefault("reader", _Reader(run))
            found = list(itertools.islice(reader, wanted))
            if reader.passes > 1 and reader.in_pass < wanted:
                raise ValueError(
                    f"data: {self.name} reads {wanted} batches a round, but there are only "
                    f"{reader.in_pass}; pass more data, a smaller batch_size=, or "
                    f"batches={reader.in_pass}"
                )
        sizes = {batch.size for batch in found}
        if added and len(sizes) > 1:
            run.notes.append(
                f"batches of {min(sizes)} to {max(sizes)} samples: each counts by its number of "
                "samples"
            )
        return found


class _Reader(Iterator[Batch]):
    """Batches of one pass after the other."""

    def __init__(self, run: Run) -> None:
        assert run.data is not None
        self._data = run.data
        self._open: Any = None
        self.passes = 0  # begun
        self.in_pass = 0  # batches of the last whole pass

    def __next__(self) -> Batch:
        if self._open is None:
            self._open, self._read = self._data.samples(), 0
            self.passes += 1
        for batch in self._open:
            self._read += 1
            return batch
        self._open, self.in_pass = None, self._read
        return next(self)
