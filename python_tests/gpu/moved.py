"""A backend whose tensors are moved to a device and back, so that tests made for the CPU run there.

The tests of the other lanes hand over CPU tensors and compare what comes back. Through `Moved` the
kernels that they meet are those of a GPU, whichever backend has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


class Moved:
    """The operations of a backend on CPU tensors.

    Args:
        name: of the backend, for what is said of operations that it lacks.
        module: the backend.
        device: where its kernels run. "cpu" is for a stand-in: tensors are copied all the same.
    """

    def __init__(self, name: str, module: Any, device: str) -> None:
        self._name, self._module, self._device = name, module, device

    def takes(self, operation: str, float64: bool) -> bool:
        """All of it: what the backend does not take is skipped in so many words."""
        return True

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        function = getattr(self._module, operation, None)
        if function is None:
            pytest.skip(f"{self._name} has no {operation} of its own")

        def call(*args: Any, **kwargs: Any) -> Any:
            pairs: list[tuple[Tensor, Tensor]] = []

            def there(value: Any) -> Any:
                if isinstance(value, Tensor):
                    held = value.clone() if self._device == "cpu" else value.to(self._device)
                    pairs.append((value, held))
                    return held
                if isinstance(value, (list, tuple)):
                    return type(value)(there(item) for item in value)
                return value

            moved = [there(value) for value in args]
            named = {key: there(value) for key, value in kwargs.items()}
            takes = getattr(self._module, "takes", None)
            wide = any(value.dtype == torch.float64 for value, _ in pairs)
            if wide and takes is not None and not takes(operation, True):
                pytest.skip(f"{self._name} leaves float64 to the reference")
            found = function(*moved, **named)
            if operation.endswith("_"):  # writes to what it is given
                for value, held in pairs:
                    if not torch.equal(_bits(value), _bits(held.cpu())):
                        value.copy_(held)
            return back(found, {id(held): value for value, held in pairs})

        return call


def back(value: Any, given: dict[int, Tensor]) -> Any:
    """Tensors on the CPU, in the same nest of lists and tuples; what was given as it was given."""
    if isinstance(value, Tensor):
        return given.get(id(value), value.cpu())
    if isinstance(value, (list, tuple)):
        return type(value)(back(item, given) for item in value)
    return value


def _bits(tensor: Tensor) -> Tensor:
    """Bytes, so that NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
