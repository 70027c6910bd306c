"""The functions: PyTorch's documented examples, its test cases in other words, shared weights."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import paikern.torch_prune as prune
from paikern import NonFiniteScoreError

FUNCTIONS = [
    lambda m, name: prune.identity(m, name),
    lambda m, name: prune.l1_unstructured(m, name, 0.3),
    lambda m, name: prune.random_unstructured(m, name, 0.3),
]
MODULES = [
    lambda: nn.Linear(5, 7),
    lambda: nn.Linear(5, 7, dtype=torch.bfloat16),
    lambda: nn.Conv3d(2, 2, 2),
    lambda: nn.ConvTranspose1d(3, 4, 2),
    lambda: nn.BatchNorm2d(6),
    lambda: nn.Embedding(5, 3),
    lambda: nn.Bilinear(2, 3, 4),
]


# --- examples of the documentation and the tutorial ----------------------------------------------


class LeNet(nn.Module):
    """The network of the pruning tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), (2, 2))
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = x.view(-1, x.nelement() // x.shape[0])
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        return self.fc3(x)


def test_the_tutorial() -> None:
    model = LeNet()
    module = model.conv1
    prune.random_unstructured(module, name="weight", amount=0.3)
    assert [name for name, _ in module.named_parameters()] == ["bias", "weight_orig"]
    assert [name for name, _ in module.named_buffers()] == ["weight_mask"]
    assert int(module.weight_mask.sum()) == 150 - 45
    assert torch.equal(module.weight, module.weight_orig * module.weight_mask)
    assert len(module._forward_pre_hooks) == 1

    prune.l1_unstructured(module, name="bias", amount=3)
    assert [name for name, _ in module.named_parameters()] == ["weight_orig", "bias_orig"]
    assert [name for name, _ in module.named_buffers()] == ["weight_mask", "bias_mask"]
    assert int((module.bias == 0).sum()) == 3
    assert len(module._forward_pre_hooks) == 2

    prune.ln_structured(module, name="weight", amount=0.5, n=2, dim=0)
    assert int((module.weight == 0).all(3).all(2).all(1).sum()) == 3
    for hook in module._forward_pre_hooks.values():
        if hook._tensor_name == "weight":
            break
    assert isinstance(hook, prune.PruningContainer)
    kinds = [type(method).__name__ for method in hook]
    assert kinds == ["RandomUnstructured", "LnStructured"]
    assert {"conv1.weight_orig", "conv1.weight_mask", "conv1.bias_mask"} <= set(model.state_dict())

    pruned = module.weight.detach().clone()
    prune.remove(module, "weight")
    assert [name for name, _ in module.named_parameters()] == ["bias_orig", "weight"]
    assert [name for name, _ in module.named_buffers()] == ["bias_mask"]
    assert torch.equal(module.weight, pruned)


def test_the_tutorial_over_modules() -> None:
    model = LeNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, name="weight", amount=0.2)
        elif isinstance(module, nn.Linear):
            prune.l1_unstructured(module, name="weight", amount=0.4)
    buffers = dict(model.named_buffers())
    assert set(buffers) == {f"{n}.weight_mask" for n in ("conv1", "conv2", "fc1", "fc2", "fc3")}
    assert int((buffers["fc3.weight_mask"] == 0).sum()) == 336


def test_the_tutorial_globally() -> None:
    model = LeNet()
    layers = (model.conv1, model.conv2, model.fc1, model.fc2, model.fc3)
    everything = torch.cat([m.weight.detach().abs().flatten() for m in layers])
    prune.global_unstructured(
        tuple((m, "weight") for m in layers), pruning_method=prune.L1Unstructured, amount=0.2
    )
    zeros = sum(int(torch.sum(m.weight == 0)) for m in layers)
    assert zeros == sum(int((m.weight_mask == 0).sum()) for m in layers)
    assert zeros == round(0.2 * everything.numel())
    bound = everything.sort().values[zeros - 1]
    for m in layers:
        assert torch.equal(m.weight_mask != 0, m.weight_orig.abs() > bound)


def test_the_tutorial_with_a_method_of_its_own() -> None:
    class FooBarPruningMethod(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            mask = default_mask.clone()
            mask.view(-1)[::2] = 0
            return mask

    model = LeNet()
    FooBarPruningMethod.apply(model.fc3, "bias")
    assert model.fc3.bias_mask.tolist() == [0, 1] * 5


def test_the_documented_global_example() -> None:
    net = nn.Sequential(
        OrderedDict([("first", nn.Linear(10, 4)), ("second", nn.Linear(4, 1))])
    )  # fmt: skip
    parameters = ((net.first, "weight"), (net.second, "weight"))
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=10)
    assert sum(torch.nn.utils.parameters_to_vector(net.buffers()) == 0) == 10


# --- every function on every kind of module ------------------------------------------------------


@pytest.mark.parametrize("function", range(len(FUNCTIONS)))
@pytest.mark.parametrize("make", MODULES, ids=lambda f: f()._get_name())
def test_parts(make: object, function: int) -> None:
    module = make()
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        original = getattr(module, name)
        before = original.detach().clone()
        assert FUNCTIONS[function](module, name) is module
        mask = getattr(module, f"{name}_mask")
        assert getattr(module, f"{name}_orig") is original
        assert torch.equal(original, before)
        assert mask.shape == original.shape
        assert mask.dtype == original.dtype
        assert not mask.requires_grad
        assert name not in dict(module.named_parameters())
        assert torch.equal(getattr(module, name), before * mask)
        assert getattr(module, name).requires_grad
        expected = 0 if function == 0 else round(0.3 * original.numel())
        assert int((mask == 0).sum()) == expected
    ids = {id(parameter) for parameter in module.parameters()}
    for name in names:
        pruned = getattr(module, name).detach().clone()
        prune.remove(module, name)
        assert torch.equal(getattr(module, name), pruned)
        assert isinstance(getattr(module, name), nn.Parameter)
    assert {id(parameter) for parameter in module.parameters()} == ids
    assert type(module._buffers) is dict


def test_identity_changes_nothing() -> None:
    x = torch.ones(1, 2)
    module = nn.Linear(2, 3)
    y = module(x)
    y.sum().backward()
    gradients = [module.weight.grad.clone(), module.bias.grad.clone()]
    module.zero_grad()
    prune.identity(module, "weight")
    assert torch.equal(module(x), y)
    module(x).sum().backward()
    assert torch.equal(module.weight_orig.grad, gradients[0])
    assert torch.equal(module.bias.grad, gradients[1])


@pytest.mark.parametrize("amount", [0, 0.0])
def test_amount_zero(amount: float) -> None:
    module = prune.random_unstructured(nn.Linear(5, 7), "weight", amount)
    assert torch.equal(module.weight, module.weight_orig)
    for dim in (0, 1):
        prune.random_structured(module, "weight", amount, dim)
        prune.ln_structured(module, "weight", amount, 1, dim)
    assert module.weight_mask.all()


@pytest.mark.parametrize("amount", [12, 1.0])
def test_everything_goes(amount: float) -> None:
    module = prune.l1_unstructured(nn.Linear(4, 3), "weight", amount)
    assert not module.weight.any()
    module(torch.ones(1, 4)).sum().backward()
    assert not module.weight_orig.grad.any()
    prune.l1_unstructured(module, "weight", 1.0)
    with pytest.raises(ValueError, match="at most 0"):
        prune.l1_unstructured(module, "weight", 1)


def test_the_forward_pass_and_removal() -> None:
    torch.manual_seed(1)
    module = prune.random_unstructured(nn.Linear(5, 3), "weight", 0.3)
    x = torch.ones(2, 5)
    y = module(x)
    assert torch.equal(
        y, functional.linear(x, module.weight_orig * module.weight_mask, module.bias)
    )
    prune.remove(module, "weight")
    assert torch.equal(module(x), y)


def test_removal_keeps_what_others_hold() -> None:
    module = nn.Linear(4, 3)
    held = module.weight.detach()
    before = held.clone()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    prune.remove(prune.l1_unstructured(module, "weight", 0.5), "weight")
    assert torch.equal(held, before)
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()  # it still has the parameter
    assert not torch.equal(module.weight, before)


def test_an_optimizer_from_before_goes_on() -> None:
    module = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    prune.l1_unstructured(module, "weight", 0.5)
    mask = module.weight_mask.clone()
    before = module.weight_orig.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(2, 4)).square().sum().backward()
        assert torch.equal(module.weight_orig.grad == 0, mask == 0)
        optimizer.step()
    changed = module.weight_orig != before
    assert torch.equal(changed, mask != 0)
    assert not module.weight[mask == 0].any()


def test_removal_of_what_is_not_pruned() -> None:
    with pytest.raises(ValueError, match="'weight' of Linear is not pruned"):
        prune.remove(nn.Linear(2, 2), "weight")
    module = prune.identity(nn.Linear(2, 2), "weight")
    with pytest.raises(ValueError, match="'bias' of Linear is not pruned"):
        prune.remove(module, "bias")


def test_by_hand() -> None:
    module = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [-0.25, 3.0, 1.0]]))
    prune.l1_unstructured(module, "weight", amount=2)
    assert module.weight_mask.tolist() == [[1, 1, 0], [0, 1, 1]]
    prune.l1_unstructured(module, "weight", amount=0.25)  # one of four; of two ones the first stays
    assert module.weight_mask.tolist() == [[1, 1, 0], [0, 1, 0]]
    prune.ln_structured(module, "weight", amount=1, n=1, dim=1)
    assert module.weight_mask.tolist() == [[0, 1, 0], [0, 1, 0]]


def test_structured_by_hand() -> None:
    module = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 2.0, 1.0], [4.0, -1.0, 1.5]]))
    prune.ln_structured(module, "weight", amount=1, n=2, dim=0)
    assert module.weight.tolist() == [[0, 0, 0], [4, -1, 1.5]]
    prune.ln_structured(module, "weight", amount=0.5, n=2, dim=1)  # round(1.5) = 2
    assert module.weight.tolist() == [[0, 0, 0], [4, 0, 0]]


# --- what is done better -------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(8))
def test_ties_keep_the_lower_index(k: int) -> None:
    module = nn.Linear(7, 1, bias=False)
    nn.init.ones_(module.weight)
    prune.l1_unstructured(module, "weight", 7 - k)
    assert module.weight_mask.tolist() == [[1.0] * k + [0.0] * (7 - k)]


def test_ties_over_modules_keep_the_first() -> None:
    net = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
    for module in net:
        nn.init.constant_(module.weight, -0.5)
    pairs = [(module, "weight") for module in net]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=7)
    assert [int(m.weight_mask.sum()) for m in net] == [4, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nan_is_refused_and_named(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 2, dtype=dtype), nn.Conv1d(2, 3, 2, dtype=dtype))
    with torch.no_grad():
        net[1].weight[1, 0, 1] = math.nan
    with pytest.raises(NonFiniteScoreError, match=r"weight of Conv1d\(2, 3, kernel_size=\(2,\)"):
        prune.l1_unstructured(net[1], "weight", 1)
    with pytest.raises(NonFiniteScoreError, match=r"weight of Conv1d"):
        prune.ln_structured(net[1], "weight", 1, 2, 0)
    with pytest.raises(NonFiniteScoreError, match=r"weight of Conv1d"):
        prune.global_unstructured(
            [(net[0], "weight"), (net[1], "weight")], prune.L1Unstructured, amount=1
        )
    assert not prune.is_pruned(net)
    assert sorted(net.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    prune.random_unstructured(net[1], "weight", 3)


def test_nan_scores_are_refused() -> None:
    module = nn.Linear(3, 2)
    scores = torch.full((2, 3), math.nan)
    with pytest.raises(NonFiniteScoreError, match="weight of Linear"):
        prune.l1_unstructured(module, "weight", 1, importance_scores=scores)


def tied() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    return net


def test_shared_weights_count_once_and_get_one_mask() -> None:
    net = tied()
    pairs = [(module, "weight") for module in net]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.5)
    first, second, third = (module.weight_mask for module in net)
    assert torch.equal(first, second)
    assert int(first.sum() + third.sum()) == 16  # of 32
    assert net[0].weight_orig is net[1].weight_orig
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=4)
    assert torch.equal(net[0].weight_mask, net[1].weight_mask)
    assert int(net[0].weight_mask.sum() + net[2].weight_mask.sum()) == 12
    net[0].weight_mask.fill_(1)  # no longer the same mask
    assert not net[1].weight_mask.all()


def test_shared_weights_with_different_masks_keep_what_both_keep() -> None:
    net = tied()
    prune.custom_from_mask(net[0], "weight", torch.eye(4))
    prune.l1_unstructured(net[1], "weight", 4)
    both = net[0].weight_mask * net[1].weight_mask
    prune.global_unstructured([(m, "weight") for m in net[:2]], prune.L1Unstructured, amount=0)
    assert torch.equal(net[0].weight_mask, both)
    assert torch.equal(net[1].weight_mask, both)


def test_a_pair_given_twice_counts_once() -> None:
    module = nn.Linear(4, 4)
    prune.global_unstructured([(module, "weight")] * 2, prune.L1Unstructured, amount=0.5)
    assert int(module.weight_mask.sum()) == 8
    assert type(next(iter(module._forward_pre_hooks.values()))) is prune.CustomFromMask


def test_a_generator_of_pairs() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.global_unstructured(((m, "weight") for m in net), prune.L1Unstructured, amount=0.5)
    assert sum(int(m.weight_mask.sum()) for m in net) == 16


def test_mixed_dtypes_compare_by_value() -> None:
    net = nn.ModuleList(
        [nn.Linear(2, 2, bias=False, dtype=d) for d in (torch.float32, torch.bfloat16)]
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        net[1].weight.copy_(torch.tensor([[1.5, -2.5], [0.5, 8.0]]))
    pairs = [(module, "weight") for module in net]
    for left in (5, 3):
        amount = sum(int((m.weight != 0).sum()) for m in net) - left
        prune.global_unstructured(pairs, prune.L1Unstructured, amount=amount)
    assert net[0].weight_mask.tolist() == [[0, 0], [1, 1]]
    assert net[1].weight_mask.tolist() == [[0, 0], [0, 1]]
    assert net[1].weight_mask.dtype == torch.bfloat16


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="there are none"):
        prune.global_unstructured([], prune.L1Unstructured, amount=1)


def test_parameters_on_two_devices() -> None:
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    with pytest.raises(TypeError, match=r"one device, got \['cpu', 'meta'\]"):
        prune.global_unstructured([(m, "weight") for m in net], prune.L1Unstructured, amount=1)


def test_global_scores_of_another_shape() -> None:
    module = nn.Linear(3, 2)
    scores = {(module, "weight"): torch.ones(6)}
    with pytest.raises(AssertionError, match=r"has shape \[2, 3\], its scores \[6\]"):
        prune.global_unstructured([(module, "weight")], prune.L1Unstructured, scores, amount=1)
    assert not prune.is_pruned(module)


# --- failures change nothing ---------------------------------------------------------------------


class Failing(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        raise RuntimeError("no mask today")


@pytest.mark.parametrize("pruned", [False, True], ids=["first", "again"])
def test_a_failure_changes_nothing(pruned: bool) -> None:
    module = nn.Linear(4, 3)
    if pruned:
        prune.l1_unstructured(module, "weight", 0.5)
    before = copy.deepcopy(module)
    hooks = list(module._forward_pre_hooks.values())
    for call in (
        lambda: Failing.apply(module, "weight"),
        lambda: prune.global_unstructured([(module, "weight"), (module, "bias")], Failing),
        lambda: prune.l1_unstructured(module, "weight", 13),
        lambda: prune.custom_from_mask(module, "weight", torch.ones(2, 2)),
    ):
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            call()
    assert list(module._forward_pre_hooks.values()) == hooks
    assert list(module.state_dict()) == list(before.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(module(x), before(x))
    prune.l1_unstructured(module, "weight", 1)


def test_importing_paikern_does_not_import_it() -> None:
    code = "import paikern, sys; sys.exit('paikern.torch_prune' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
