"""A masked network as the smaller network that computes the same.

The channel groups of the path graph say what goes with each channel: rows of weights, entries of
biases and norms, columns of whatever reads it. Torch-Pruning (Fang et al. 2023, arXiv:2301.12900)
cuts the layers. Its own search for what is coupled is not used: it takes a product of a map with
one channel and a map with many for one of equals, and does not read every graph of autograd. What
comes out is checked against the masks, weight by weight, and run once beside the masked network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paikern._copying import copied
from paikern._names import slots
from paikern.channels import Kept, channel_entries, channel_sides
from paikern.errors import MaskFormatError, PaikernError
from paikern.gradients.untouched import untouched
from paikern.masks import MaskSet
from paikern.pathgraph.channels import ChannelGroups, channel_groups
from paikern.pathgraph.trace import trace
from paikern.prunable import Prunable, prunable_parameters, unwrap

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.modules.conv._ConvNd, "conv"),
    (nn.modules.instancenorm._InstanceNorm, "instancenorm"),  # a kind of the next
    (nn.modules.batchnorm._NormBase, "batchnorm"),
    (nn.PReLU, "prelu"),
)


def shrink(
    model: nn.Module,
    masks: MaskSet,
    *,
    example_inputs: Any,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """`model` without the channels that `masks` removes: narrower layers, the same function.

    Needs Torch-Pruning: `pip install 'paikern[structured]'`. `model` is not changed; the result is
    a copy with the same parameter names, modes and `requires_grad`, and with plain layers, so it
    trains, compiles and exports like any other.

    Args:
        model: the model that the masks were made for, masked or not.
        masks: made by a structured method (`masks.channels` is not empty).
        example_inputs: as in `pk.prune`.
        optimizer: of `model`; it is moved over to the result, with its momenta and moments cut as
            the parameters are. (Remove the handle of `masks.attach` first.)

    Raises:
        ValueError: masks that were not made by channels.
        MaskFormatError: the masks belong to another model.
        ImportError: Torch-Pruning is not installed.
        PaikernError: it cannot cut this model as the masks ask, a layer is named; nothing is
            returned then.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4)), torch.randn(2, 8)
        >>> masks = pk.prune(net, "l1_filters", sparsity=0.75, example_inputs=x)
        >>> small = pk.shrink(net, masks, example_inputs=x)
        >>> small.layers[1].weight.shape, torch.allclose(small(x), net(x), atol=1e-6)
        (torch.Size([4, 8]), True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(masks, MaskSet):
        raise TypeError(f"masks must be the MaskSet of pk.prune, got {type(masks).__name__}")
    if not masks.channels:
        raise ValueError(
            "masks: made of single weights, no channel can be taken out; use a structured method, "
            "such as pk.prune(model, 'l1_filters', ...)"
        )
    pruning = _torch_pruning()
    inner = unwrap(model)
    masks.slots(inner)
    layers = {n: p for n, p in prunable_parameters(inner).items() if n in masks}
    _refuse_hidden(layers)
    state = {slot.name: slot.tensor.detach() for slot in slots(inner)}
    state |= {name: p.detach() for name, p in inner.named_parameters()}
    groups = channel_groups(trace(inner, example_inputs), state, layers)
    kept = _kept(groups, masks)
    small = copied(inner)
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    _cut(pruning, small, groups, kept, layers)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(name not in frozen)
    _check_weights(inner, small, groups, kept, layers)
    _check_outputs(inner, small, masks, example_inputs)
    if optimizer is not None:
        places = copied(inner).double()
        for parameter in places.parameters():  # every entry holds its own number
            if parameter.is_floating_point():
                numbers = torch.arange(parameter.numel(), dtype=parameter.dtype)
                parameter.data.copy_(numbers.view(parameter.shape))
        _cut(pruning, places, groups, kept, layers)
        _move(optimizer, inner, small, dict(places.named_parameters()))
    return small


def _move(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    small: nn.Module,
    places: Mapping[str, Tensor],
) -> None:
    """Put the parameters of `small` in the place of those of `model`, and cut the state.

    places: for each parameter of `small` the flat index of its entries in that of `model`.
    """
    after = dict(small.named_parameters())
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [after[names[p]] if p in names else p for p in group["params"]]
    for old, name in names.items():
        held = optimizer.state.pop(old, None)
        if held is None:
            continue
        new, index = after[name], places[name].detach().long()
        optimizer.state[new] = {
            key: value.flatten()[index.to(value.device)]
            if isinstance(value, Tensor) and value.shape == old.shape != new.shape
            else value
            for key, value in held.items()
        }


def _torch_pruning() -> Any:
    try:
        import torch_pruning  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"shrink: Torch-Pruning could not be imported ({error}); "
            "`pip install 'paikern[structured]'`"
        ) from error
    return torch_pruning


def _refuse_hidden(layers: dict[str, Prunable]) -> None:
    for name, layer in layers.items():
        if layer.source != name:
            raise ValueError(
                f"shrink: '{name}' is stored as '{layer.source}'; remove the parametrization, "
                "the pruning hook or the wrapper inside the model first"
            )


def _kept(groups: ChannelGroups, masks: MaskSet) -> Kept:
    """Channels by group from those by layer; coupled layers must agree."""
    channels = dict(masks.channels)
    kept = {}
    for group in groups:
        stays = torch.ones(group.size, dtype=torch.bool)
        kept[group.name] = stays
        if channels.keys().isdisjoint(group.rows):
            continue  # the method had no way to rank this group
        for name, rows in group.rows.items():
            mask = channels.pop(name, None)
            if mask is None or len(mask) != len(rows):
                raise MaskFormatError(
                    f"the masks belong to another model: they have no channels for {name}, or "
                    f"another number than {len(rows)}"
                )
            stays[rows[~mask]] = False
        for name, rows in group.rows.items():
            if not torch.equal(stays[rows], masks.channels[name]):
                raise MaskFormatError(
                    f"the masks belong to another model: {name} keeps other channels than the "
                    "layers that it is coupled with"
                )
    if channels:
        raise MaskFormatError(
            f"the masks belong to another model: {next(iter(channels))} cannot become narrower here"
        )
    return kept


def _cut(
    pruning: Any,
    model: nn.Module,
    groups: ChannelGroups,
    kept: Kept,
    layers: dict[str, Prunable],
) -> None:
    """Take out of every layer what is not kept, once: a layer may read several groups."""
    rows, columns = channel_sides(groups, kept)
    for path, mask in channel_entries(groups, kept).items():
        _cut_layer(pruning, model, path, {"out": mask})
    for name, layer in layers.items():
        sides = {"out": rows.get(name), "in": columns.get(name)}
        depthwise = layer.groups > 1 and layer.shape[:2] == (layer.groups, 1)
        if depthwise:
            sides["in"] = None  # goes with the outputs
        _cut_layer(pruning, model, layer.module_name, sides, depthwise)


def _cut_layer(
    pruning: Any,
    model: nn.Module,
    path: str,
    kept: Mapping[str, Tensor | None],
    depthwise: bool = False,
) -> None:
    module = model.get_submodule(path)
    for side, mask in kept.items():
        if mask is None or bool(mask.all()):
            continue
        if type(module).__name__ == "Conv1D":
            _cut_conv1d(module, mask, side)
            continue
        if isinstance(module, nn.modules.conv._ConvTransposeNd) and not depthwise:
            _cut_transposed(module, mask, side)
            continue
        kind = next((word for cls, word in _KINDS if isinstance(module, cls)), None)
        if kind is None:
            raise PaikernError(
                f"shrink: {path or 'the model'} is a {type(module).__name__}, which Torch-Pruning "
                "has no way to cut; the masked model still works"
            )
        cut = f"prune_{'depthwise_conv' if depthwise else kind}_{side}_channels"
        with torch.no_grad():
            getattr(pruning, cut)(module, (~mask).nonzero().flatten().tolist())


def _cut_conv1d(module: Any, kept: Tensor, side: str) -> None:
    """transformers' `Conv1D`, `[in, out]`, which Torch-Pruning does not know."""
    kept = kept.to(module.weight.device)
    if side == "out":
        module.weight = nn.Parameter(module.weight.detach()[:, kept])
        module.bias = nn.Parameter(module.bias.detach()[kept])
        module.nf = module.weight.shape[1]
    else:
        module.weight = nn.Parameter(module.weight.detach()[kept])
        module.nx = module.weight.shape[0]


def _cut_transposed(module: Any, kept: Tensor, side: str) -> None:
    """A transposed convolution, `[in, out / groups, ...]`: with groups, Torch-Pruning looks for all
    outputs in the second dimension, which holds those of one group."""
    kept = kept.to(module.weight.device)
    if side == "in":
        module.weight = nn.Parameter(module.weight.detach()[kept])
        module.in_channels = module.weight.shape[0]
        return
    within = kept[: len(kept) // module.groups]  # every group keeps the same places
    module.weight = nn.Parameter(module.weight.detach()[:, within])
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[kept])
    module.out_channels = module.weight.shape[1] * module.groups


def _check_weights(
    model: nn.Module,
    small: nn.Module,
    groups: ChannelGroups,
    kept: Kept,
    layers: dict[str, Prunable],
) -> None:
    """Each weight must be the slice that the masks say, to the bit."""
    rows, columns = channel_sides(groups, kept)
    before, after = dict(model.named_parameters()), dict(small.named_parameters())
    for name, layer in layers.items():
        weight = before[name].detach()
        expected = _slice(weight, layer, rows.get(name), columns.get(name))
        found = after[name].detach()
        if expected.shape != found.shape or not torch.equal(expected, found):
            raise PaikernError(
                f"shrink: Torch-Pruning made {name} {list(found.shape)} where the masks leave "
                f"{list(expected.shape)}, or took other channels; the masked model still works "
                f"(leave the layer out with ignore=[{layer.module_name!r}])"
            )


def _slice(weight: Tensor, layer: Prunable, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    transposed, groups = layer.layout
    across, along = (columns, rows) if transposed else (rows, columns)
    if across is not None:
        weight = weight[across.to(weight.device)]
    if along is None or (groups > 1 and groups == len(along)):  # one channel for each filter
        return weight
    # Every group keeps the channels at the same places, so those of the first stand for all.
    return weight[:, along[: len(along) // groups].to(weight.device)]


def _check_outputs(model: nn.Module, small: nn.Module, masks: MaskSet, inputs: Any) -> None:
    masked = copied(model)
    masks.apply(masked)
    results = []
    for network in (masked, small):
        with untouched(network, "eval", 0), torch.no_grad():
            try:
                results.append(pytree.tree_leaves(_call(network, inputs)))
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise _different(str(error).splitlines()[0]) from error
    for wanted, found in zip(*results, strict=True):
        if not isinstance(wanted, Tensor) or not wanted.is_floating_point():
            continue
        # What the sums of the two differ by in their order; 1e-6 is seen with float32.
        wide = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 5e-2
        bound = wide * max(float(wanted.abs().max()), 1e-30)
        if wanted.shape != found.shape or not bool(((wanted - found).abs() <= bound).all()):
            raise _different("outputs differ")


def _different(what: str) -> PaikernError:
    return PaikernError(
        f"shrink: the smaller model does not compute what the masked one does on example_inputs "
        f"({what}): channels are used in a way that the layers do not show (a parameter added to "
        "them, a width written into the forward?); the masked model still works"
    )


def _as_call(inputs: Any) -> Any:
    return inputs if isinstance(inputs, (dict, tuple, list)) else (inputs,)


def _call(network: nn.Module, inputs: Any) -> Any:
    given = _as_call(inputs)
    return network(**given) if isinstance(given, dict) else network(*given)
