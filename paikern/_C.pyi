"""The CPU kernels (csrc/python/bind_*.cpp). Addresses are integers; a 0 stands for none."""

from collections.abc import Sequence
from typing import Any

# data, type, and (sizes, strides) where the tensor is not contiguous
_View = tuple[int, int, tuple[Sequence[int], Sequence[int]] | None]
_Counts = tuple[int, int, bool]  # effective weights, effective kernels, all scores finite
# data, type, sizes, strides, absolute, a, g, candidates, power
_Scores = tuple[int, int, Sequence[int], Sequence[int], bool, int, int, int, int]

class PathGeometry:
    def __init__(self, values: tuple[int, ...]) -> None: ...

class PathFlow:
    def __init__(
        self,
        values: Sequence[dict[str, Any]],
        steps: Sequence[dict[str, Any]],
        outputs: Sequence[int],
        parameters: int,
        by_input_max: bool,
        counts: bool,
        replay: object,
    ) -> None: ...
    def forward(self) -> float: ...
    def set_mask(self, parameter: int, mask: int) -> None: ...
    def set_cotangent(self, output: int, values: int) -> None: ...
    def exponent(self, value: int) -> int: ...
    @property
    def dead(self) -> int: ...
    @property
    def broken(self) -> int: ...
    @property
    def total(self) -> tuple[float, int]: ...

class DpaiLoop:
    def __init__(
        self,
        flow: PathFlow,
        layers: Sequence[dict[str, Any]],
        alpha: float,
        beta: float,
        adam: bool,
    ) -> None: ...
    def select(self) -> int: ...
    # status, and (objective, nodes, kernels, weights) of every step done
    def run(
        self, done: int, steps: int, seconds: float, patience: int
    ) -> tuple[int, list[tuple[float, int, int, int]]]: ...
    unchanged: int
    @property
    def layer_at_fault(self) -> int: ...

class PathRounds:
    def __init__(
        self, flow: PathFlow, layers: Sequence[tuple[int, int, int]], power: int
    ) -> None: ...
    # status, and log R of every round done
    def run(
        self, done: int, counts: Sequence[Sequence[int]], seconds: float, stop_empty: bool
    ) -> tuple[int, list[float]]: ...
    def begin(self) -> tuple[int, float]: ...
    def finish(self, counts: Sequence[int], stop_empty: bool) -> int: ...
    @property
    def current(self) -> int: ...
    @property
    def streamed(self) -> int: ...
    @property
    def layer_at_fault(self) -> int: ...

class GatedProgram:
    def __init__(
        self, maps: Sequence[tuple[int, int, int]], steps: Sequence[tuple[int, ...]], output: int
    ) -> None: ...
    def load(self, weights: Sequence[tuple[int, int, int, int, int]]) -> None: ...
    def run(self, x: int, samples: int, total: int, f: int) -> int: ...

def isa() -> str: ...
def pack_mask(mask: int, numel: int, packed: int) -> None: ...
def unpack_mask(packed: int, numel: int, mask: int) -> None: ...
def apply_mask(values: int, itemsize: int, numel: int, packed: int) -> None: ...
def topk_mask(
    rows: Sequence[tuple[_View, int, int, int, int]],
    k: Sequence[int],
    absolute: bool,
    memory: int,
) -> int: ...
def topk_mask_product(
    rows: Sequence[tuple[_View, _View, int, int, int]], k: Sequence[int]
) -> int: ...
def topk_mask_factored(
    rows: Sequence[tuple[_View | PathGeometry, int, int, int, int, int, int, int]],
    k: Sequence[int],
    power: int,
) -> int: ...
def kth_largest(rows: Sequence[tuple[_View, int, int, int, int]], k: int) -> tuple[float, int]: ...
def map_maximum(values: int, numel: int) -> float: ...
def map_scale(values: int, numel: int, by: int, floor: float) -> None: ...
def live_nodes(y: int, g: int, outer: int, channels: int, inner: int, live: int) -> None: ...
def through_maximum(g: int, x: int, numel: int, maximum: float) -> None: ...
def path_forward(
    g: PathGeometry, w: int, type: int, power: int, mask: int, x: int, z: int
) -> None: ...
def path_backward(
    g: PathGeometry, w: int, type: int, power: int, mask: int, grad: int, x: int
) -> None: ...
def path_score(
    g: PathGeometry,
    w: int,
    type: int,
    power: int,
    mask: int,
    x: int,
    grad: int,
    pruned: float,
    score: int,
) -> None: ...
def path_sweep(
    rows: int,
    columns: int,
    w: int,
    type: int,
    power: int,
    mask: int,
    a: int,
    grad: int,
    threshold: float,
    x: int,
    bits: int,
) -> int: ...
def dpai_step(
    g: PathGeometry,
    s: int,
    moment1: int,
    moment2: int,
    mask: int,
    live: int,
    node_is_channel: bool,
    x: int,
    grad: int,
    rule: Sequence[float],
) -> _Counts: ...
def dpai_update(
    g: PathGeometry,
    s: int,
    moment1: int,
    moment2: int,
    mask: int,
    live: int,
    node_is_channel: bool,
    q: int,
    rule: Sequence[float],
) -> _Counts: ...
def nm_mask(rows: Sequence[tuple[_Scores, int, int, int]], n: int, m: int) -> int: ...
def block_means(row: _Scores, columns: int, high: int, wide: int, means: int) -> bool: ...
def expand_blocks(
    blocks: int, rows: int, columns: int, high: int, wide: int, bits: int
) -> None: ...
def balanced_mask(
    rows: int,
    groups: int,
    inputs: int,
    outputs: int,
    positions: int,
    transposed: bool,
    cover: int,
    seed: int,
    stream: int,
    scores: int,
    wide: bool,
    bits: int,
) -> bool: ...

# data, type, rows, cols, taps, groups, transposed, first bit, row tables, column tables
_WalkRows = Sequence[tuple[int, ...]]

def phew_tables(rows: _WalkRows, weighting: int, tables: int) -> None: ...
def phew_walks(
    rows: _WalkRows,
    tables: int,
    graph: tuple[int, ...],
    seed: int,
    first: int,
    count: int,
    width: int,
    weighting: int,
    whole: bool,
    out: int,
) -> None: ...
def phew_keep(
    bits: int,
    state: int,
    walks: int,
    count: int,
    width: int,
    target: int,
    stall: int,
    exact: bool,
) -> None: ...

# values, type, source, positions, starts, rows, columns, panel
_Packed = tuple[int, ...]

def masked_linear(view: _Packed, x: int, batch: int, bias: int, y: int) -> None: ...
def masked_linear_kept(view: _Packed, g: int, x: int, batch: int, out: int) -> None: ...

# batch, groups, rows, channels, size, kernel, stride, padding, dilation, out
_Conv = tuple[int, ...]
_Map = tuple[int, int]

# a weight here: values (float32), source, positions, starts, rows, columns, panel
def masked_conv2d(shape: _Conv, weight: _Packed, x: _Map, bias: int, y: int) -> None: ...
def masked_conv2d_input(shape: _Conv, weight: _Packed, g: _Map, x: int) -> None: ...
def masked_conv2d_kept(shape: _Conv, weight: _Packed, g: _Map, x: _Map, out: int) -> None: ...
def list_positions(
    bits: int, rows: int, columns: int, panel: int, positions: int, starts: int
) -> None: ...

# values, positions or bits, whether bits, starts, rows, columns, panel; size: bytes of an element
_Where = tuple[int, ...]

def scatter_kept(where: _Where, size: int, first: int, count: int, dense: int) -> None: ...
def gather_kept(where: _Where, size: int, first: int, count: int, dense: int) -> None: ...
def transpose_positions(
    view: _Packed, panel: int, positions: int, starts: int, source: int
) -> None: ...
