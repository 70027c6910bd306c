"""What every backend says about NaN, so that the operation can put the parameter's name in."""

from __future__ import annotations

from paikern.errors import NonFiniteScoreError


class NanInTensorError(NonFiniteScoreError):
    """NaN in the tensor at `index` of a list."""

    def __init__(self, operation: str, index: int) -> None:
        super().__init__(f"{operation}: scores[{index}] holds NaN, which has no rank")
        self.operation = operation
        self.index = index


def refuse_nan(operation: str, index: int) -> None:
    """Raise if `index` names a tensor; -1 means that there is none."""
    if index >= 0:
        raise NanInTensorError(operation, index)
