"""The CUDA driver through ctypes, as far as launching kernels of a cubin goes.

Its calls have the names and the ways of CuPy's, so that `cuda_jit` takes either: with the driver
and PyTorch's own NVRTC no further package is needed. PyTorch has made the context.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["Driver"]


class Driver:
    """`RawModule(path=)`, `cuda.Device` and `cuda.ExternalStream`; RuntimeError as the driver says.

    Args:
        library: the driver; the system's by default.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = ctypes.CDLL("libcuda.so.1") if library is None else library
        self.call("cuInit", 0)
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self.stream = 0
        self.cuda = SimpleNamespace(
            Device=lambda device: _Device(self, device),
            ExternalStream=lambda stream, device: _Stream(self, stream),
        )

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            words = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(words))
            said = words.value.decode() if words.value else f"error {code}"
            raise RuntimeError(f"{name}: {said}")

    def context(self, device: int) -> ctypes.c_void_p:
        """The primary context of a device, the one that PyTorch uses."""
        found = self._contexts.get(device)
        if found is None:
            handle, found = ctypes.c_int(), ctypes.c_void_p()
            self.call("cuDeviceGet", ctypes.byref(handle), device)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(found), handle)
            self._contexts[device] = found
        return found

    def RawModule(  # noqa: N802
        self, path: str, enable_cooperative_groups: bool = False
    ) -> SimpleNamespace:
        """The kernels of a cubin, in the context of the device at hand."""
        together = enable_cooperative_groups
        image, module = Path(path).read_bytes(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))

        def get_function(name: str) -> Callable[..., None]:
            function = ctypes.c_void_p()
            self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            return lambda *launch, **options: self._launch(together, function, *launch, **options)

        return SimpleNamespace(get_function=get_function)

    def _launch(
        self,
        together: bool,
        function: ctypes.c_void_p,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared_mem: int = 0,
    ) -> None:
        """`arguments` are NumPy numbers of eight bytes, as all parameters of the kernels are."""
        held = [ctypes.create_string_buffer(a.tobytes(), 8) for a in arguments]
        places = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
        name, more = ("cuLaunchCooperativeKernel", ()) if together else ("cuLaunchKernel", (None,))
        self.call(
            name, function, *grid, 1, 1, *block, 1, 1, shared_mem, ctypes.c_void_p(self.stream),
            places, *more,
        )  # fmt: skip


class _Device:
    """Makes the context of a device the current one of this thread."""

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver, self._device = driver, device

    def __enter__(self) -> None:
        self._driver.call("cuCtxPushCurrent_v2", self._driver.context(self._device))

    def __exit__(self, *error: object) -> None:
        self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class _Stream:
    """Kernels are started in this stream within the block."""

    def __init__(self, driver: Driver, stream: int) -> None:
        self._driver, self._stream = driver, stream

    def __enter__(self) -> None:
        self._before, self._driver.stream = self._driver.stream, self._stream

    def __exit__(self, *error: object) -> None:
        self._driver.stream = self._before
