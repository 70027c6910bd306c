from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import paikern as pk
from paikern import ops
from paikern.backends import registry
from paikern.errors import MaskFormatError
from python_tests.ops.masked_linear_cases import make

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = ("index", "bitmap")


def ids(value: object) -> str:
    return str(value).replace("torch.", "")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 70),
    st.integers(0, 150),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.sampled_from(("auto", *FORMATS)),
    st.sampled_from((1, 8, 64, 4096, 65_536)),
    st.booleans(),
)
def test_packing_and_unpacking_gives_the_weight_back(
    rows: int,
    columns: int,
    density: float,
    dtype: torch.dtype,
    format: str,
    panel: int,
    as_bits: bool,
) -> None:
    weight = torch.randn(rows, columns).to(dtype)
    mask = torch.rand(rows, columns) < density
    given_mask = ops.pack_mask(mask) if as_bits else mask
    packed = pk.PackedWeight.from_dense(weight, given_mask, format=format, panel=panel)
    assert torch.equal(packed.to_dense(), weight.masked_fill(~mask, 0))
    assert torch.equal(packed.values, weight[mask])
    assert torch.equal(packed.packed_mask(), ops.pack_mask(mask))
    assert packed.shape == weight.shape
    assert packed.nnz == int(mask.sum())
    assert packed.dtype == dtype
    assert packed.density == pytest.approx(mask.double().mean().item() if mask.numel() else 0.0)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 60), st.integers(0, 150), st.floats(0, 1), st.sampled_from((1, 8, 64, 65_536))
)
def test_native_positions_equal_those_of_the_reference(
    rows: int, columns: int, density: float, panel: int
) -> None:
    bits = ops.pack_mask(torch.rand(rows, columns) < density)
    kept = int(ops.unpack_mask(bits, (rows * columns,)).sum())

    def found() -> list[torch.Tensor]:
        positions, starts = ops.list_positions(bits, kept, rows, columns, panel)
        back = ops.transpose_positions(positions, starts, rows, columns, panel)
        return [positions, starts, *back]

    native = found()
    with registry.using("reference"):
        reference = found()
    assert all(torch.equal(a, b) for a, b in zip(native, reference, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=3, max_size=5),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.sampled_from(("auto", *FORMATS)),
    st.sampled_from((1, 8, 4096)),
)
def test_convolution_weights_keep_their_shape(
    shape: list[int], density: float, dtype: torch.dtype, format: str, panel: int
) -> None:
    weight, mask = torch.randn(shape).to(dtype), torch.rand(shape) < density
    packed = pk.PackedWeight.from_dense(weight, mask, format=format, panel=panel)
    assert packed.shape == weight.shape
    assert (packed.rows, packed.columns) == (shape[0], torch.Size(shape[1:]).numel())
    assert torch.equal(packed.to_dense(), weight.masked_fill(~mask, 0))
    assert torch.equal(packed.values, weight[mask])
    assert torch.equal(packed.packed_mask(), ops.pack_mask(mask))
    other = torch.randn(shape)
    assert torch.equal(packed.gather(other), other[mask])
    assert torch.equal(packed.scatter(other[mask]), other.masked_fill(~mask, 0))
    with pk.dense_keys():
        assert packed.state_dict()["weight"].shape == weight.shape


def test_gather_names_another_shape() -> None:
    packed = make(3, 4, 0.5).packed
    with pytest.raises(ValueError, match=r"dense must have the shape \(3, 4\), got \(4, 3\)"):
        packed.gather(torch.ones(4, 3))


def test_positions_by_hand() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)
    positions, starts = ops.list_positions(ops.pack_mask(mask), 5, 3, 5, 4)
    assert positions.tolist() == [0, 3, 4, 1, 4]
    assert starts.tolist() == [0, 2, 3, 3, 3, 4, 5]  # columns 0..3 and 4 of every row
    rows, begins, source = ops.transpose_positions(positions, starts, 3, 5, 4)
    assert rows.tolist() == [0, 2, 0, 0, 2]
    assert begins.tolist() == [0, 1, 2, 2, 3, 5]
    assert source.tolist() == [0, 3, 1, 2, 4]


def test_wide_positions_start_again_at_65536() -> None:
    mask = torch.zeros(2, 65_540, dtype=torch.bool)
    mask[0, [3, 65_535, 65_536, 65_539]] = True
    mask[1, 65_537] = True
    positions, starts = ops.list_positions(ops.pack_mask(mask), 5, 2, 65_540, 65_536)
    assert positions.tolist() == [3, -1, 0, 3, 1]
    assert starts.tolist() == [0, 2, 4, 4, 5]
    rows, begins, source = ops.transpose_positions(positions, starts, 2, 65_540, 65_536)
    assert rows.tolist() == [0, 0, 0, 1, 0]
    assert source.tolist() == [0, 1, 2, 4, 3]
    assert begins[[3, 4, 65_535, 65_536, 65_537, 65_538, 65_540]].tolist() == [0, 1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_bytes_are_those_of_the_tensors(format: str, density: float) -> None:
    weight = torch.randn(64, 200)
    packed = make(64, 200, density, torch.bfloat16, format=format).packed
    where = 2 * packed.nnz if format == "index" else 64 * 200 // 8
    assert packed.nbytes == 2 * packed.nnz + where + 4 * (64 + 1)
    assert packed.nbytes < weight.nbytes
    before = packed.nbytes
    x = torch.randn(3, 200, dtype=torch.bfloat16, requires_grad=True)
    ops.masked_linear(x, packed).sum().backward()
    transpose = 6 * packed.nnz + 4 * (200 + 1) if format == "index" else 0
    assert packed.nbytes == before + transpose


def test_the_format_follows_the_density() -> None:
    assert make(40, 40, 0.1, format="auto").packed.format == "index"
    assert make(40, 40, 0.9, format="auto").packed.format == "bitmap"


@pytest.mark.parametrize("format", FORMATS)
def test_to_dense_is_differentiable(format: str) -> None:
    case = make(6, 9, 0.5, format=format)
    g = torch.randn(6, 9)
    (found,) = torch.autograd.grad(case.packed.to_dense(), case.packed.values, g)
    assert torch.equal(found, g[case.mask])


def test_from_dense_copies_and_keeps_what_is_trained() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 5), requires_grad=False)
    mask = torch.rand(4, 5) < 0.5
    packed = pk.PackedWeight.from_dense(weight, mask)
    assert not packed.values.requires_grad
    assert pk.PackedWeight.from_dense(weight.data, mask).values.requires_grad
    full = pk.PackedWeight.from_dense(weight, torch.ones(4, 5, dtype=torch.bool))
    with torch.no_grad():
        full.values.zero_()
    assert bool(weight.abs().sum() > 0)


def test_from_dense_takes_strided_weights_and_any_value_under_the_mask() -> None:
    weight, mask = torch.randn(9, 6).T, (torch.rand(9, 6) < 0.5).T
    poisoned = torch.where(mask, weight, torch.nan)
    packed = pk.PackedWeight.from_dense(poisoned, mask)
    assert torch.equal(packed.to_dense(), weight.masked_fill(~mask, 0))
    infinite = pk.PackedWeight.from_dense(torch.full((2, 2), torch.inf), torch.eye(2).bool())
    assert infinite.values.tolist() == [torch.inf, torch.inf]


def test_from_dense_names_what_is_wrong() -> None:
    weight, mask = torch.randn(3, 5), torch.rand(3, 5) < 0.5
    pack = pk.PackedWeight.from_dense
    with pytest.raises(ValueError, match=r"weight must be \[out, in\] or .* got \(3,\)"):
        pack(weight[:, 0], mask[:, 0])
    with pytest.raises(TypeError, match=r"weight must be float32, .* got torch\.int64"):
        pack(weight.long(), mask)
    with pytest.raises(ValueError, match="weight is on the meta device; load its values first"):
        pack(weight.to("meta"), mask.to("meta"))
    with pytest.raises(ValueError, match=r"shape must be \(out, in, \*kernel\), got \(3,\)"):
        pk.PackedWeight(torch.ones(0), torch.zeros(1, dtype=torch.uint8), (3,))
    with pytest.raises(ValueError, match=r"mask must have the shape \(3, 5\) .* got \(5, 3\)"):
        pack(weight, mask.T)
    with pytest.raises(TypeError, match=r"mask must be bool or packed bits .* got torch\.float32"):
        pack(weight, mask.float())
    with pytest.raises(ValueError, match="holds 8 bits, 15 are needed"):
        pack(weight, ops.pack_mask(mask)[:1])
    with pytest.raises(ValueError, match=r"a packed mask for shape \(3, 5\) has 2 bytes, got 3"):
        pack(weight, torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="weight is on cpu and mask on meta; move them to one"):
        pack(weight, mask.to("meta"))
    weight[1, 2] = torch.nan
    mask[1, 2] = True
    with pytest.raises(ValueError, match=r"weight holds NaN at \[1, 2\], which the mask keeps"):
        pack(weight, mask)
    with pytest.raises(ValueError, match="format must be one of"):
        pack(torch.ones(3, 5), mask, format="csr")
    for panel in (0, 3, 1 << 17):
        with pytest.raises(ValueError, match=f"panel must be a power of two .* got {panel}"):
            pack(torch.ones(3, 5), mask, panel=panel)
    with pytest.raises(ValueError, match="the mask keeps 3 weights, 2 values given"):
        pk.PackedWeight(torch.ones(2), torch.tensor([7], dtype=torch.uint8), (1, 5))
    with pytest.raises(ValueError, match="3 bits are set, kept says 2"):
        ops.list_positions(torch.tensor([7], dtype=torch.uint8), 2, 1, 5)


@pytest.mark.parametrize("format", FORMATS)
def test_copies_and_pickles_work_alone(format: str) -> None:
    case = make(6, 9, 0.5, format=format)
    x = torch.randn(3, 9, requires_grad=True)
    expected = ops.masked_linear(x, case.packed)
    for other in (copy.deepcopy(case.packed), pickle.loads(pickle.dumps(case.packed))):
        with torch.no_grad():
            case.packed.values.add_(1)
        assert torch.equal(ops.masked_linear(x, other), expected)
        with torch.no_grad():
            case.packed.values.sub_(1)


def test_other_dtypes_by_to() -> None:
    case = make(6, 9, 0.5)
    packed = case.packed.to(torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert torch.equal(packed.to_dense(), case.dense.bfloat16())
    assert packed.positions.dtype == torch.int16


class Net(torch.nn.Module):
    def __init__(self, seed: int, density: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.case = make(6, 9, density)
        self.weight = self.case.packed


@pytest.mark.parametrize("dense", [False, True])
def test_state_dict_round_trip(dense: bool) -> None:
    first, second = Net(0), Net(1)
    if dense:
        with pk.dense_keys():
            state = first.state_dict()
        assert list(state) == ["weight"]
        assert torch.equal(state["weight"], first.case.dense)
        expected = first.case.dense.masked_fill(~second.case.mask, 0)
        state = pk.pack_keys(second, state)
    else:
        state = first.state_dict()
        assert list(state) == ["weight.values", "weight.mask"]
        second = Net(0)
        with torch.no_grad():
            second.weight.values.zero_()
        expected = first.case.dense
    second.load_state_dict(state)
    assert torch.equal(second.weight.to_dense(), expected)
    alone = make(6, 9, 0.5).packed
    with pk.dense_keys():
        state = alone.state_dict()
    assert list(state) == ["weight"]
    assert set(pk.pack_keys(alone, state)) == {"values", "mask"}


def test_loading_another_mask_moves_the_positions() -> None:
    weight = torch.arange(1.0, 7.0).reshape(2, 3)
    masks = [
        torch.tensor([[1, 0, 1], [0, 1, 0]]).bool(),
        torch.tensor([[0, 1, 0], [1, 0, 1]]).bool(),
    ]
    one, other = (pk.PackedWeight.from_dense(weight, m) for m in masks)
    x = torch.ones(1, 3, requires_grad=True)
    ops.masked_linear(x, other).sum().backward()  # its transpose exists now
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.to_dense(), weight * masks[0])
    x.grad = None
    ops.masked_linear(x, other).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 5.0, 3.0]]


def test_state_dicts_that_do_not_fit() -> None:
    net = Net(0)
    state = net.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*weight.mask"):
        net.load_state_dict({"weight.values": state["weight.values"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*weight.more"):
        net.load_state_dict({**state, "weight.more": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"weight.values: \(2,\) in the state dict"):
        net.load_state_dict({**state, "weight.values": torch.ones(2)})
    with pytest.raises(ValueError, match=r"weight has shape \(2, 2\) in the state dict, \(6, 9\)"):
        pk.pack_keys(net, {"weight": torch.ones(2, 2)})
    before = net.weight.to_dense()
    with pytest.raises(RuntimeError, match=r"weight.mask: .* the mask keeps 0 weights"):
        net.load_state_dict({**state, "weight.mask": torch.zeros(7, dtype=torch.uint8)})
    assert torch.equal(net.weight.to_dense(), before)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (13, 70)], ids=ids)
def test_files_give_the_weight_back(
    tmp_path: Path, dtype: torch.dtype, format: str, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 2, 2, 5).to(dtype)
    path = tmp_path / "maps.safetensors"
    pk.PackedWeight.from_dense(maps, maps > 0, format=format).save(path)
    assert torch.equal(pk.PackedWeight.load(path).to_dense(), maps.clamp(min=0))
    path.unlink()
    for density in (0.0, 0.3, 1.0):
        case = make(*shape, density, dtype, format=format)
        path = tmp_path / "weight.safetensors"
        case.packed.save(path)
        found = pk.PackedWeight.load(path)
        assert found.dtype == dtype
        assert torch.equal(found.to_dense(), case.dense)
        stored = load_file(path)
        assert torch.equal(stored["values"], case.packed.values)
        assert torch.equal(stored["mask"], ops.pack_mask(case.mask))
        assert [p.name for p in tmp_path.iterdir()] == ["weight.safetensors"]


def written(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "weight.safetensors"
    make(5, 9, 0.5).packed.save(path)
    return path, path.read_bytes()


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path, data = written(tmp_path)
    found = pk.PackedWeight.load(path)
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1
        path.write_bytes(broken)
        try:
            loaded = pk.PackedWeight.load(path)
        except MaskFormatError:
            continue
        # What may differ without harm: the note on the version, spaces behind the header.
        assert torch.equal(loaded.to_dense(), found.to_dense())


def test_truncated_and_longer_files_are_refused(tmp_path: Path) -> None:
    path, data = written(tmp_path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(MaskFormatError):
            pk.PackedWeight.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(MaskFormatError, match="truncated or altered"):
        pk.PackedWeight.load(path)


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["__metadata__"].update(shape="[5]"), "expected two sizes or more"),
        (lambda h: h["__metadata__"].update(shape="[5, true]"), "expected two sizes or more"),
        (lambda h: h["__metadata__"].update(shape="[5, 1000000]"), "describes its mask wrongly"),
        (lambda h: h["__metadata__"].update(format_version="2"), "install a version that matches"),
        (lambda h: h["__metadata__"].update(format="other"), "holds no packed weight"),
        (lambda h: h["__metadata__"].pop("digest"), "no shape or digest"),
        (lambda h: h.update(more=h["mask"]), "no others"),
        (lambda h: h["values"].update(dtype="I32"), "describes its values wrongly"),
        (lambda h: h["values"].update(shape=[10**9]), "values for the shape"),
        (lambda h: h["values"].update(data_offsets=[0, 10**12]), "describes its values wrongly"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, change, message: str) -> None:
    path, data = written(tmp_path)
    header, rest = header_of(data)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    with pytest.raises(MaskFormatError, match=message):
        pk.PackedWeight.load(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match="cannot be read"):
        pk.PackedWeight.load(tmp_path / "nothing")
    with pytest.raises(MaskFormatError, match="no regular file"):
        pk.PackedWeight.load(tmp_path)
    path, _ = written(tmp_path)
    with pytest.raises(MaskFormatError, match="more than max_bytes=10"):
        pk.PackedWeight.load(path, max_bytes=10)
    masks = tmp_path / "masks.safetensors"
    pk.MaskSet.from_bool({"w": torch.ones(2, 2, dtype=torch.bool)}).save(masks)
    with pytest.raises(MaskFormatError, match="holds no packed weight"):
        pk.PackedWeight.load(masks)
