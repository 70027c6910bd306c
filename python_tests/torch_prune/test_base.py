"""The base class and the container: hooks, composition, methods that people write."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from paikern import torch_prune as prune
from paikern.torch_prune.base import combine


def named(method: prune.BasePruningMethod, name: str = "weight") -> prune.BasePruningMethod:
    method._tensor_name = name
    return method


# --- the container -------------------------------------------------------------------------------


def test_container() -> None:
    container = prune.PruningContainer()
    container._tensor_name = "test"
    assert len(container) == 0
    method = named(prune.L1Unstructured(amount=2), "test")
    container.add_pruning_method(method)
    assert list(container) == [method]
    assert container[0] is method
    with pytest.raises(ValueError, match="prunes 'other', this container 'test'"):
        container.add_pruning_method(named(prune.L1Unstructured(amount=2), "other"))
    for wrong in (10, "ugh", None):
        with pytest.raises(TypeError, match="must be a BasePruningMethod"):
            container.add_pruning_method(wrong)
    assert len(container) == 1


@pytest.mark.parametrize("as_list", [False, True])
def test_container_of_several(as_list: bool) -> None:
    methods = [named(prune.L1Unstructured(1)), named(prune.RandomUnstructured(2))]
    container = prune.PruningContainer(methods) if as_list else prune.PruningContainer(*methods)
    assert list(container) == methods
    assert container._tensor_name == "weight"


def test_container_uses_the_method_that_came_last() -> None:
    container = prune.PruningContainer()
    container._tensor_name = "test"
    t = torch.tensor([[4.0, -1.0, 3.0, 2.0], [8.0, 7.0, -6.0, 5.0]])
    container.add_pruning_method(named(prune.L1Unstructured(amount=2), "test"))
    default = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    mask = container.compute_mask(t, default)
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 1]]
    container.add_pruning_method(named(prune.LnStructured(1, n=2, dim=1), "test"))
    # The channels left have norms sqrt(80), 7, 5; column 2 is masked and does not count.
    assert container.compute_mask(t, mask).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    container.add_pruning_method(named(prune.LnStructured(1, n=2, dim=0), "test"))
    assert container.compute_mask(t, mask).tolist() == [[0, 0, 0, 0], [1, 1, 0, 1]]
    assert default.tolist() == [[1, 1, 1, 0], [1, 1, 0, 1]]


def test_hooks_of_repeated_calls() -> None:
    module = nn.Conv3d(2, 2, 2)
    masks = []
    prune.l1_unstructured(module, "weight", 0.1)
    hook = next(iter(module._forward_pre_hooks.values()))
    assert isinstance(hook, prune.L1Unstructured)
    assert hook._tensor_name == "weight"
    masks.append(module.weight_mask.clone())
    prune.ln_structured(module, "weight", 0.3, n=2, dim=0)
    masks.append(module.weight_mask.clone())
    prune.random_unstructured(module, "weight", 0.4)
    masks.append(module.weight_mask.clone())
    (hook,) = module._forward_pre_hooks.values()
    assert isinstance(hook, prune.PruningContainer)
    assert isinstance(hook, torch_prune.BasePruningMethod)
    kinds = [type(method) for method in hook]
    assert kinds == [prune.L1Unstructured, prune.LnStructured, prune.RandomUnstructured]
    for earlier, later in itertools.pairwise(masks):
        assert not ((earlier == 0) & (later == 1)).any()
    module.weight_orig.data.fill_(2)
    hook(module, None)  # scripts call hooks to bring the weight up to date
    assert torch.equal(module.weight, 2 * masks[-1])


def test_the_hook_moves_to_the_end() -> None:
    module = prune.identity(nn.Linear(2, 2), "weight")
    other = module.register_forward_pre_hook(lambda m, x: None)
    prune.identity(module, "bias")
    prune.identity(module, "weight")
    kinds = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    assert kinds == ["function", "Identity", "PruningContainer"]
    other.remove()


# --- composition ---------------------------------------------------------------------------------


class Ones(prune.BasePruningMethod):
    """Remembers what it was shown and keeps it."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        self.seen = (t, default_mask)
        return default_mask


def test_unstructured_methods_see_the_entries_left() -> None:
    method = Ones()
    t = torch.arange(6.0).reshape(2, 3)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert torch.equal(combine(method, t, mask), mask)
    assert method.seen[0].tolist() == [0, 2, 5]
    assert method.seen[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dim", [1, -1])
def test_structured_methods_see_the_channels_left(dim: int) -> None:
    method = Ones()
    method.PRUNING_TYPE = "structured"
    method.dim = dim
    t = torch.arange(6.0).reshape(2, 3)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert torch.equal(combine(method, t, mask), mask)
    assert method.seen[0].tolist() == [[0, 2], [3, 5]]
    assert method.seen[1].tolist() == [[1, 1], [0, 1]]


def test_global_methods_see_everything() -> None:
    method = Ones()
    method.PRUNING_TYPE = "global"
    t, mask = torch.arange(4.0).reshape(2, 2), torch.eye(2)
    combine(method, t, mask)
    assert torch.equal(method.seen[0], t)
    assert torch.equal(method.seen[1], mask)


def test_composition_refuses() -> None:
    method = Ones()
    t, mask = torch.ones(2, 2), torch.ones(2, 2)
    method.PRUNING_TYPE = "structured"
    with pytest.raises(AttributeError, match="needs an attribute dim"):
        combine(method, t, mask)
    method.dim = 2
    with pytest.raises(IndexError, match=r"dim: must be in \[-2, 1\], got 2"):
        combine(method, t, mask)
    method.PRUNING_TYPE = "partial"
    with pytest.raises(ValueError, match="'global', got 'partial'"):
        combine(method, t, mask)


# --- methods that people write -------------------------------------------------------------------


def test_the_first_mask_comes_with_ones_and_the_parameter() -> None:
    module = nn.Linear(3, 2)
    hook = Ones.apply(module, "weight")
    assert isinstance(hook, Ones)
    assert hook.seen[0] is module.weight_orig
    assert torch.equal(hook.seen[1], torch.ones(2, 3))
    again = Ones.apply(module, "weight")
    assert isinstance(again, prune.PruningContainer)
    assert again[0] is hook


def test_masks_of_a_wrong_kind_are_refused() -> None:
    class Soft(Ones):
        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return default_mask / 2

    class Wide(Ones):
        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return default_mask.repeat(2, 1)

    module = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        Soft.apply(module, "weight")
    with pytest.raises(ValueError, match=r"Wide: .* has shape \[2, 3\], the mask .* \[4, 3\]"):
        Wide.apply(module, "weight")
    assert not prune.is_pruned(module)


def test_a_patched_compute_mask_is_used() -> None:
    module = nn.Linear(3, 2)
    mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with mock.patch.object(prune.RandomUnstructured, "compute_mask", return_value=mask):
        prune.random_unstructured(module, "weight", 0.5)
    assert torch.equal(module.weight_mask, mask)


class Twice(Ones):
    """Computes with twice the product."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        return 2 * super().apply_mask(module)


def test_a_product_of_its_own() -> None:
    module = nn.Linear(3, 2, bias=False)
    Twice.apply(module, "weight")
    assert torch.equal(module.weight, 2 * module.weight_orig)
    x = torch.ones(1, 3)
    y = module(x)
    y.sum().backward()
    assert torch.equal(module.weight_orig.grad, torch.full((2, 3), 2.0))
    with torch.no_grad():
        module.weight_orig.mul_(3)
    assert torch.allclose(module(x), 3 * y)
    prune.remove(module, "weight")
    assert torch.allclose(module(x), 3 * y)


def test_a_product_that_fails_changes_nothing() -> None:
    class Broken(Ones):
        def apply_mask(self, module: nn.Module) -> Tensor:
            raise RuntimeError("no product today")

    module = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="no product today"):
        Broken.apply(module, "weight")
    assert sorted(module.state_dict()) == ["bias", "weight"]
    assert type(module._buffers) is dict
    module(torch.ones(1, 3))


# --- prune(t), apply_mask and remove of methods --------------------------------------------------


def test_prune_a_tensor() -> None:
    t = torch.tensor([[-1.0, 2.0, -3.0], [4.0, -5.0, 6.0]])
    method = prune.L1Unstructured(2)
    assert method.prune(t).tolist() == [[0, 0, -3], [4, -5, 6]]
    default = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert method.prune(t, default_mask=default).tolist() == [[0, 0, 0], [4, -5, 6]]
    scores = torch.tensor([[6.0, 5.0, 4.0], [3.0, 2.0, 1.0]])
    assert method.prune(t, importance_scores=scores).tolist() == [[-1, 2, -3], [4, 0, 0]]
    with pytest.raises(AssertionError):
        method.prune(t, importance_scores=scores[0])


def test_compute_mask_gives_a_new_tensor() -> None:
    t = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    default = torch.ones(2, 2)
    for method in (prune.L1Unstructured(0), prune.RandomUnstructured(0), prune.Identity()):
        mask = method.compute_mask(t, default)
        assert torch.equal(mask, default)
        mask.zero_()
    assert default.all()
    assert prune.LnStructured(1, 2, 0).compute_mask(t, torch.eye(2)).tolist() == [[1, 0], [0, 0]]


def test_a_method_that_was_not_applied() -> None:
    module = nn.Linear(2, 2)
    for call in (prune.Identity().apply_mask, prune.Identity().remove):
        with pytest.raises(AssertionError, match="Identity has not been applied"):
            call(module)


def test_two_hooks_of_one_parameter() -> None:
    module = prune.identity(nn.Linear(2, 2), "weight")
    module.register_forward_pre_hook(named(prune.Identity()))
    with pytest.raises(AssertionError, match="2 pruning hooks"):
        prune.identity(module, "weight")


# --- beside torch's own --------------------------------------------------------------------------


def test_torchs_functions_work_on_ours() -> None:
    module = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    assert torch_prune.is_pruned(module)
    torch_prune.l1_unstructured(module, "weight", 0.5)
    assert int(module.weight_mask.sum()) == 4
    x = torch.ones(1, 4)
    y = module(x)
    weight = module.weight_orig * module.weight_mask
    assert torch.equal(y, nn.functional.linear(x, weight, module.bias))
    torch_prune.remove(module, "weight")
    assert torch.equal(module(x), y)
    assert sorted(module.state_dict()) == ["bias", "weight"]
    prune.identity(module, "weight")
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("calls", [1, 2])
def test_ours_go_on_from_torchs(calls: int) -> None:
    module = nn.Linear(4, 4)
    for _ in range(calls):
        torch_prune.l1_unstructured(module, "weight", 0.5)
    before = module.weight_mask.clone()
    assert prune.is_pruned(module)
    prune.l1_unstructured(module, "weight", 0.5)
    assert int(module.weight_mask.sum()) == 16 // 2 ** (calls + 1)
    assert torch.equal(module.weight_mask * before, module.weight_mask)
    (hook,) = module._forward_pre_hooks.values()
    assert len(hook) == calls + 1
    assert "weight" not in module.__dict__
    module(torch.ones(1, 4)).sum().backward()
    assert torch.equal(module.weight_orig.grad != 0, module.weight_mask != 0)
    prune.remove(module, "weight")
    assert not module._forward_pre_hooks


def test_torchs_removal_by_ours() -> None:
    module = torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    weight = module.weight.detach().clone()
    prune.remove(module, "weight")
    assert torch.equal(module.weight, weight)


def test_a_module_whose_buffers_were_made_anew() -> None:
    module = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    x = torch.randn(2, 4)
    y = module(x)
    module._buffers = dict(module._buffers)  # plain tensors, as torch's pruning has them
    assert torch.equal(module(x), y)
    module(x).sum().backward()
    assert torch.equal(module.weight_orig.grad != 0, module.weight_mask != 0)
    prune.l1_unstructured(module, "weight", 0.5)
    assert int(module.weight_mask.sum()) == 4
    assert "weight" not in module.__dict__
    prune.remove(module, "weight")
    assert int((module.weight != 0).sum()) == 4
