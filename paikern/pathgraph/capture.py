"""Tracing by one run of the model on stand-ins, an ATen call at a time.

A stand-in has shape, dtype and (as far as the model can see) the device of a tensor, but no
memory. It carries what the tensor is to a path: a path value, a parameter, data from integer
inputs. Below autograd PyTorch hands every operation to a dispatch mode before taking it apart, so
`linear`, `batch_norm` and `scaled_dot_product_attention` arrive as the rules want them, and the
path graph is built while the model runs. Constants (buffers, masks, rotary tables) are real
tensors and are computed as the model goes.

ResNet-20 takes 13 ms where `torch.export` takes 217 ms; most of the latter builds, annotates and
prints an FX graph that would be read once. Whatever has no place here (control flow that depends
on values, writes into what is no path, autocast, operations without a meta kernel) raises, and
`trace` turns to `torch.export`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from paikern.pathgraph import interpret, rules, shapes
from paikern.pathgraph.graph import DataValue, ParamValue
from paikern.pathgraph.tracer import Tracer

_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_MASKS = (torch.bool, torch.uint8)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class UnsupportedError(BaseException):
    """This model needs `torch.export`.

    No `Exception`, so that a model which tries things out cannot catch it and go another way.
    """


class StandIn(Tensor):
    """A tensor without memory. `meta` has its shape; `value` is what it is to a path.

    `value` is None where a rule gave nothing, as for the indices of a max pool.
    """

    meta: Tensor
    value: Any

    @staticmethod
    def __new__(cls, meta: Tensor, value: Any) -> StandIn:
        made = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(),
            dtype=meta.dtype, device=torch.device("cpu"),
        )  # fmt: skip
        made.meta = meta
        made.value = value
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise UnsupportedError(f"{func} outside of the capture")

    def _unreadable(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("the values of a tensor are read")

    tolist = numpy = data_ptr = untyped_storage = __array__ = _unreadable


def parameter(name: str, of: Tensor) -> StandIn:
    """A stand-in for the parameter `name`; passes as an `nn.Parameter`."""
    made = StandIn(_meta_of(of), interpret.parameter(name, of.shape))
    made._is_param = True
    return made


def run(
    skeleton: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tracer: Tracer
) -> list[Any]:
    """Run `skeleton`, whose parameters are stand-ins, and return the values of its outputs.

    Raises:
        UnsupportedError: the model cannot be captured, or an operation has no rule.
        Exception: what the model itself raises.
    """
    for name, buffer in skeleton.named_buffers():
        if type(buffer) not in _PLAIN:
            raise UnsupportedError(f"buffer {name} is a {type(buffer).__name__}")
        tracer.buffer_names[id(buffer)] = name

    def stand_in(given: Any) -> Any:
        value = interpret.user_input(tracer, given)
        return StandIn(_meta_of(given), value) if isinstance(given, Tensor) else given

    args, kwargs = pytree.tree_map(stand_in, (tuple(args), dict(kwargs)))
    modules = _Modules(skeleton)
    capture = _Capture(tracer, modules)
    with _exporting(), torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), capture:
        result = skeleton(*args, **kwargs)
    outputs = pytree.tree_leaves(result)
    for leaf in outputs:
        if not (leaf is None or isinstance(leaf, (Tensor, int, float))):
            raise UnsupportedError(f"an output is a {type(leaf).__name__}")
    return [leaf.value for leaf in outputs if isinstance(leaf, StandIn)]


@contextmanager
def _exporting() -> Iterator[None]:
    """What a model can ask about its surroundings is answered as under `torch.export`.

    The fused encoder of `nn.MultiheadAttention` is switched off: as one operation it says nothing
    about paths.
    """
    flags = [n for n in ("_is_compiling_flag", "_is_exporting_flag") if hasattr(torch.compiler, n)]
    before = {name: getattr(torch.compiler, name) for name in flags}
    fused = torch.backends.mha.get_fastpath_enabled()
    # What `torch.compile` has compiled runs as written; nothing has been where it is not imported.
    compiles = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
    try:
        for name in flags:
            setattr(torch.compiler, name, True)
        torch.backends.mha.set_fastpath_enabled(False)
        with eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for name, value in before.items():
            setattr(torch.compiler, name, value)


class _Modules:
    """The path of the module at work, kept by hooks on the skeleton."""

    def __init__(self, skeleton: nn.Module) -> None:
        self._stack: list[str] = []
        paths: dict[nn.Module, list[str]] = {}
        for path, module in skeleton.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(path)
        for module, known in paths.items():
            module.register_forward_pre_hook(self._enter(known), prepend=True)
            module.register_forward_hook(self._leave, always_call=True)

    @property
    def where(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _enter(self, known: list[str]) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            _refuse_autocast()
            self._stack.append(known[0] if len(known) == 1 else self._called(known))

        return enter

    def _called(self, known: list[str]) -> str:
        """Which of the names of a shared module its caller used."""
        prefix = self.where + "." if self.where else ""
        below = [path for path in known if path.startswith(prefix)]
        if len(below) != 1:
            raise UnsupportedError(f"a module is called by one of the names {known}")
        return below[0]

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._stack.pop()


class _Capture(TorchDispatchMode):
    """Hands every ATen call to the rules and answers with stand-ins."""

    def __init__(self, tracer: Tracer, modules: _Modules) -> None:
        super().__init__()
        self._tracer, self._modules = tracer, modules

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper that imports the compiler: a second for the first trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._call(func, types, args, kwargs or {})
        except Exception as error:
            raise UnsupportedError(f"{func}: {error}") from error

    def _call(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        _refuse_autocast()
        if _depends_on_values(func, args):
            raise UnsupportedError(f"{func} depends on values")
        if StandIn not in types:
            return _constant(func, args, kwargs)
        name = rules.op_name(func)
        if name in interpret.IGNORED:
            return None
        written = _written(func, args, kwargs)
        seen: dict[int, StandIn] = {}
        made = shapes.of(func, name, *_map(lambda x: _ghost(x, seen), args, kwargs))
        if written is not None and _layout(written) != _layout(written.meta):
            raise UnsupportedError(f"{func} changes the shape of what it writes to")
        args, kwargs = _map(lambda x: x.value if isinstance(x, StandIn) else x, args, kwargs)
        value = interpret.call(self._tracer, func, args, kwargs, self._modules.where, made)
        return _wrap(made, value, seen)


def _refuse_autocast() -> None:
    if torch._C._is_any_autocast_enabled():
        raise UnsupportedError("autocast")


def _depends_on_values(func: Any, args: Any) -> bool:
    """Whether the shape of the result, or control flow, may depend on what tensors hold."""
    if func is torch.ops.aten.index.Tensor:  # only where a mask picks
        return any(isinstance(i, Tensor) and i.dtype in _MASKS for i in args[1])
    return any(tag in func.tags for tag in _TAGS)


def _constant(func: Any, args: Any, kwargs: Any) -> Any:
    """A call on constants alone. Its values may become other constants, but no control flow."""
    result = func(*args, **kwargs)
    for leaf in result if isinstance(result, (list, tuple)) else (result,):
        if not (leaf is None or isinstance(leaf, Tensor)):
            raise UnsupportedError(f"{func} reads the value of a tensor")
    return result


def _written(func: Any, args: Any, kwargs: Any) -> StandIn | None:
    """The stand-in that a call writes to, if it writes.

    Only `x.op_(...)` on a path or on data can be followed: the model goes on with the same object.
    """
    if not func._schema.is_mutable:
        return None
    found = None
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        if i != 0 or not isinstance(given, StandIn) or isinstance(given.value, ParamValue):
            raise UnsupportedError(f"{func} writes to {argument.name}")
        found = given
    return found


def _meta_of(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


def _ghost(x: Any, seen: dict[int, StandIn]) -> Any:
    """`x` as a meta kernel wants it; `seen` finds the stand-in of a meta tensor again."""
    if isinstance(x, StandIn):
        seen[id(x.meta)] = x
        return x.meta
    if isinstance(x, Tensor):
        return _meta_of(x)
    if isinstance(x, torch.device):
        if x.type != "cpu":
            raise UnsupportedError(f"a tensor on {x}")
        return torch.device("meta")
    return x


def _map(f: Callable[[Any], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """`f` on every argument, also inside lists; ATen nests no deeper."""

    def go(x: Any) -> Any:
        return [f(y) for y in x] if isinstance(x, (list, tuple)) else f(x)

    return tuple(go(x) for x in args), {name: go(x) for name, x in kwargs.items()}


def _wrap(made: Any, value: Any, seen: dict[int, StandIn]) -> Any:
    """Stand-ins for the results of a call, or the tensors themselves where they are constants."""
    if isinstance(made, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(made):
            raise UnsupportedError("a rule returns another number of values than its operation")
        return [_wrap(s, v, seen) for s, v in zip(made, value, strict=True)]
    if not isinstance(made, Tensor):
        raise UnsupportedError("an operation reads the value of a tensor")
    known = seen.get(id(made))
    real = value.tensor if isinstance(value, DataValue) else value
    if isinstance(real, Tensor) and (real.shape, real.dtype) != (made.shape, made.dtype):
        raise UnsupportedError("values decide about a shape")
    if value is None or rules.is_value(value):
        if known is None:
            return StandIn(made, value)
        known.value = value  # `x.relu_()`, `x.float()` of a float: the same tensor
        return known
    if known is not None or not isinstance(value, Tensor):
        raise UnsupportedError(f"a rule returns a {type(value).__name__}")
    return value
