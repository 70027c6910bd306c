"""What a pruned module holds: bits, and tensors that follow what is written to them."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from paikern import ops
from paikern import torch_prune as prune
from paikern.torch_prune.buffers import MaskedBuffers, MaskTensor, PackedMask, pack


def layer(rows: int = 3, columns: int = 4) -> nn.Linear:
    """A linear layer with half of its weights pruned."""
    return prune.l1_unstructured(nn.Linear(columns, rows), "weight", 0.5)


def bits_of(module: nn.Module, name: str = "weight") -> Tensor:
    buffers = module._buffers
    assert isinstance(buffers, MaskedBuffers)
    mask = buffers.mask(name)
    assert mask is not None
    return ops.unpack_mask(mask.bits, mask.shape)


# --- memory --------------------------------------------------------------------------------------


class Watch:
    """The storages that Python's tensors hold now, kept alive so that no address is used twice."""

    def __init__(self) -> None:
        self.before = self.alive()

    @staticmethod
    def alive() -> dict[int, torch.UntypedStorage]:
        gc.collect()
        found = {}
        for thing in gc.get_objects():
            if isinstance(thing, Tensor) and thing.layout == torch.strided:
                storage = thing.untyped_storage()
                found[storage._cdata] = storage
        return found

    def added(self) -> int:
        """Bytes of the storages that were not there before, whatever else has died since."""
        return sum(s.nbytes() for at, s in self.alive().items() if at not in self.before)


def test_bits_are_all_that_is_held() -> None:
    module = nn.Linear(256, 256, bias=False)
    watch = Watch()
    prune.l1_unstructured(module, "weight", 0.5)
    assert watch.added() == 256 * 256 / 8
    module(torch.ones(1, 256)).sum().backward()
    module.zero_grad()
    assert "weight" not in module.__dict__
    assert int(module.weight_mask.sum()) == 256 * 128
    assert watch.added() == 256 * 256 / 8


def test_global_pruning_shares_the_bits_with_its_hooks() -> None:
    net = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    watch = Watch()
    prune.global_unstructured([(m, "weight") for m in net], prune.L1Unstructured, amount=0.5)
    assert watch.added() == 2 * 256 * 256 / 8


def test_the_same_tensor_while_it_is_held() -> None:
    module = layer()
    first = module.weight_mask
    assert module.weight_mask is first
    assert next(module.buffers()) is first
    assert type(first.clone()) is type(first + 1) is Tensor


# --- what is written to a mask -------------------------------------------------------------------


def fill(mask: Tensor) -> None:
    mask.fill_(1)


def by_index(mask: Tensor) -> None:
    mask[:] = 1


def through_a_view(mask: Tensor) -> None:
    mask.view(-1)[:] = 1


def through_data(mask: Tensor) -> None:
    mask.data.copy_(torch.ones_like(mask))


def through_detach(mask: Tensor) -> None:
    mask.detach().fill_(1)


def by_data(mask: Tensor) -> None:
    mask.data = torch.ones_like(mask)


WRITES = [fill, by_index, through_a_view, through_data, through_detach, by_data]


@pytest.mark.parametrize("no_grad", [False, True], ids=["grad", "no_grad"])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_writes_reach_the_bits(write: object, no_grad: bool) -> None:
    module = layer()
    with torch.set_grad_enabled(not no_grad):
        write(module.weight_mask)
    assert bits_of(module).all()
    assert torch.equal(module.weight, module.weight_orig)
    assert torch.equal(module.weight_mask, torch.ones(3, 4))


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_writes_count_while_the_mask_is_held(write: object) -> None:
    module = layer()
    mask = module.weight_mask
    write(mask)
    assert torch.equal(mask, torch.ones(3, 4))
    assert torch.equal(module.weight, module.weight_orig)
    mask.zero_()
    assert not module.weight.any()
    del mask
    assert not bits_of(module).any()


def test_a_view_outlives_the_mask() -> None:
    module = layer()
    view = module.weight_mask.view(-1)
    view.zero_()
    view[5] = 1
    assert bits_of(module).nonzero().tolist() == [[1, 1]]
    del view
    assert bits_of(module).nonzero().tolist() == [[1, 1]]


def test_writes_through_the_state_dict() -> None:
    module = layer()
    module.state_dict()["weight_mask"].fill_(1)
    assert bits_of(module).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64], ids=str)
def test_assignment(dtype: torch.dtype) -> None:
    module = layer()
    old = module.weight_mask
    mask = torch.eye(3, 4, dtype=dtype)
    module.weight_mask = mask
    assert torch.equal(bits_of(module), mask.bool())
    assert module.weight_mask.dtype == dtype
    old.fill_(1)  # belongs to nobody any more
    del old
    assert torch.equal(bits_of(module), mask.bool())
    mask.fill_(1)  # the caller's own
    assert torch.equal(bits_of(module), torch.eye(3, 4).bool())


def test_soft_masks_are_refused() -> None:
    module = layer()
    before = bits_of(module)
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        module.weight_mask = torch.full((3, 4), 0.5)
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        module.weight_mask.data = torch.full((3, 4), math.nan)
    assert torch.equal(bits_of(module), before)


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 1)], ids=str)
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    module = layer()
    with pytest.raises(ValueError, match=r"the weight has shape \[3, 4\]"):
        module.weight_mask = torch.ones(shape)


def test_a_mask_whose_module_is_gone() -> None:
    module = layer()
    mask = module.weight_mask
    expected = mask.clone()
    del module
    gc.collect()
    assert torch.equal(mask, expected)
    mask.fill_(0)


def test_mask_tensors_are_ordinary_elsewhere() -> None:
    mask = PackedMask(torch.tensor([6], dtype=torch.uint8), (2, 2), torch.float32).dense()
    assert isinstance(mask, MaskTensor)
    assert repr(mask) == "tensor([[0., 1.],\n        [1., 0.]])" == str(mask)
    for copied in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.clone()):
        assert type(copied) is Tensor
        assert torch.equal(copied, mask)
        copied.fill_(3)
    assert mask.tolist() == [[0, 1], [1, 0]]
    assert mask.numpy().sum() == 2
    assert type(torch.cat([mask])) is Tensor
    twice = copy.deepcopy([mask, mask])
    assert twice[0] is twice[1]
    file = io.BytesIO()
    torch.save({"mask": mask}, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)["mask"]) is Tensor


def test_a_mask_alive_at_exit_is_no_trouble() -> None:
    code = (
        "import torch, paikern.torch_prune as prune\n"
        "layer = prune.l1_unstructured(torch.nn.Linear(4, 4), 'weight', 3)\n"
        "mask = layer.weight_mask\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


# --- the weight ----------------------------------------------------------------------------------


def test_the_weight_is_made_when_read() -> None:
    module = layer()
    with torch.no_grad():
        module.weight_orig.mul_(2)
    assert torch.equal(module.weight, module.weight_orig * module.weight_mask)
    assert module.weight is not module.weight
    assert hasattr(module, "weight")
    assert [name for name, _ in module.named_parameters()] == ["bias", "weight_orig"]
    assert [name for name, _ in module.named_buffers()] == ["weight_mask"]


def test_an_assigned_weight_lasts_until_the_next_forward_pass() -> None:
    module = layer()
    module.weight = torch.zeros(3, 4)
    assert not module.weight.any()
    module(torch.ones(1, 4))
    assert torch.equal(module.weight, module.weight_orig * module.weight_mask)


def test_a_deleted_weight_is_back_after_a_forward_pass() -> None:
    module = layer()
    del module.weight
    assert not hasattr(module, "weight")
    with pytest.raises(AttributeError):
        del module.weight
    module(torch.ones(1, 4))
    assert hasattr(module, "weight")


def test_a_parameter_in_its_place_is_refused_by_the_forward_pass() -> None:
    for library in (torch_prune, prune):
        module = library.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
        module.weight = nn.Parameter(torch.zeros(3, 4))
        with pytest.raises(TypeError, match="as parameter 'weight'"):
            module(torch.ones(1, 4))


# --- the dict ------------------------------------------------------------------------------------


def test_the_dict_speaks_of_tensors_only() -> None:
    module = prune.identity(nn.BatchNorm1d(3), "weight")
    buffers = module._buffers
    names = ["running_mean", "running_var", "num_batches_tracked", "weight_mask"]
    assert list(buffers) == list(buffers.keys()) == names
    assert len(buffers) == 4
    for view in (dict(buffers), {**buffers}, dict(buffers.items())):
        assert all(isinstance(value, Tensor) for value in view.values())
        assert list(view) == names
    assert all(isinstance(value, Tensor) for value in buffers.values())
    assert torch.equal(buffers.get("weight_mask"), torch.ones(3))
    assert torch.equal(buffers.get("weight"), module.weight_orig)
    assert buffers.get("other") is None
    assert "other" not in buffers
    with pytest.raises(KeyError, match="other"):
        buffers["other"]
    with pytest.raises(KeyError, match="other"):
        del buffers["other"]


def test_the_dict_takes_tensors() -> None:
    module = layer()
    buffers = module._buffers
    buffers.update(weight_mask=torch.zeros(3, 4), extra=torch.ones(2))
    assert not bits_of(module).any()
    assert torch.equal(module.extra, torch.ones(2))
    assert torch.equal(buffers.pop("extra"), torch.ones(2))
    assert torch.equal(buffers.setdefault("weight_mask", None), torch.zeros(3, 4))
    assert buffers.popitem()[0] == "weight_mask"
    assert len(buffers) == 0


def test_a_buffer_that_ends_in_mask_is_a_buffer() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 2))
            self.register_buffer("attention_mask", torch.tensor([0.5, -1.0]))

    module = prune.l1_unstructured(Attention(), "weight", 1)
    module.attention_mask = torch.tensor([2.5, 3.0])
    assert module.attention_mask.tolist() == [2.5, 3.0]
    assert not hasattr(module, "attention")


# --- copies and files ----------------------------------------------------------------------------


def assert_equal_but_apart(module: nn.Module, copied: nn.Module) -> None:
    x = torch.randn(5, 4)
    assert type(copied) is type(module)
    assert torch.equal(module(x), copied(x))
    assert torch.equal(bits_of(module), bits_of(copied))
    assert copied._buffers.parameters is copied._parameters
    with torch.no_grad():
        copied.weight_orig.add_(1)
    copied.weight_mask.fill_(1)
    assert not torch.equal(bits_of(module), bits_of(copied))
    assert not torch.equal(module(x), copied(x))
    assert torch.equal(copied.weight, copied.weight_orig)
    assert prune.is_pruned(copied)
    prune.remove(copied, "weight")
    assert prune.is_pruned(module)


def test_deepcopy() -> None:
    module = layer()
    assert_equal_but_apart(module, copy.deepcopy(module))


def test_deepcopy_after_training() -> None:
    module = layer()
    module(torch.ones(2, 4)).sum().backward()
    held = module.weight_mask
    assert_equal_but_apart(module, copy.deepcopy(module))
    assert held is module.weight_mask


def test_pickle() -> None:
    module = layer()
    assert_equal_but_apart(module, pickle.loads(pickle.dumps(module)))


def test_saved_module_holds_bits() -> None:
    module = prune.l1_unstructured(nn.Linear(256, 256, bias=False), "weight", 0.5)
    file = io.BytesIO()
    torch.save(module, file)
    assert file.tell() < 256 * 256 * 4.2 + 4096
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    assert torch.equal(bits_of(module), bits_of(copied))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("reader", [torch_prune, prune], ids=["torch", "paikern"])
@pytest.mark.parametrize("writer", [torch_prune, prune], ids=["torch", "paikern"])
def test_checkpoints_go_both_ways(writer: object, reader: object, assign: bool) -> None:
    source = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    writer.l1_unstructured(source[0], "weight", 0.5)
    writer.random_unstructured(source[0], "bias", 1)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    target = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    for name in ("weight", "bias"):
        reader.identity(target[0], name)
    result = target.load_state_dict(state, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(5, 4)
    assert torch.equal(target(x), source(x))
    assert list(target.state_dict()) == list(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


def test_a_dense_checkpoint_does_not_fit() -> None:
    dense = nn.Linear(4, 3).state_dict()
    for library in (torch_prune, prune):
        module = library.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
        with pytest.raises(RuntimeError, match=r'Missing key.*"weight_orig", "weight_mask"'):
            module.load_state_dict(dense)


def test_a_soft_checkpoint_is_packed_as_nonzeros() -> None:
    module = layer()
    state = module.state_dict() | {"weight_mask": torch.full((3, 4), 0.5)}
    module.load_state_dict(state)
    assert bits_of(module).all()


# --- moving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_dtype(dtype: torch.dtype) -> None:
    module = layer()
    expected = module.weight.detach().to(dtype)
    module.to(dtype)
    assert module.weight_mask.dtype == module.weight.dtype == dtype
    assert torch.equal(module.weight, expected)


def test_meta_and_back() -> None:
    module = layer()
    state = module.state_dict()
    moved = copy.deepcopy(module).to("meta")
    assert moved.weight.is_meta
    assert moved.weight_mask.is_meta
    moved.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(moved.weight, module.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this build of torch can use")
def test_to_cuda() -> None:
    module = layer(64, 96)
    expected = module.weight.detach().clone()
    module.to("cuda")
    assert bits_of(module).is_cuda
    assert torch.equal(module.weight.cpu(), expected)
    module(torch.ones(2, 96, device="cuda")).sum().backward()
    assert torch.equal(module.weight_orig.grad != 0, module.weight_mask != 0)
    prune.global_unstructured([(module, "weight")], prune.L1Unstructured, amount=0.5)
    assert int(module.weight_mask.sum()) == 64 * 96 // 4


def test_packing() -> None:
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        pack(torch.tensor([0.0, 2.0]))
    assert pack(torch.tensor([0.0, 2.0]), checked=False).tolist() == [2]
    with torch.inference_mode():
        bits = pack(torch.tensor([1.0, 0.0, 1.0]))
    assert bits.tolist() == [5]
    assert not bits.is_inference()
