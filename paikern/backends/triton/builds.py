"""Every kernel with the types and constants that it is launched with, for ahead-of-time checks.

`csrc/testing/check_kernels.py` compiles this list for every target; nothing here needs a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton.language as tl

from paikern.backends.triton import (
    balanced,
    bits,
    config,
    dpai,
    maps,
    masked_decode,
    masked_index,
    masked_words,
    patterns,
    phew,
    products,
    sweeps,
    walks,
)
from paikern.backends.triton import selection_kernels as selection

_TYPES = ("fp32", "bf16", "fp16")
# What the parameters of every kernel are, by name; `None` stands for the weight's or score's type.
_POINTERS = {
    "found": "i64", "a": "fp32", "bits": "u8", "counts": "i64", "bounds": "i64", "dots": "fp64",
    "g": "fp32", "lined": "u8", "live": "u8", "mask": "u8", "mean": "fp32",
    "nan": "i32", "out": "fp32", "parts": "fp32", "q": "fp32", "rule": "fp32", "s": "fp32",
    "scores": None, "share": "fp32", "square": "fp32", "state": "i64", "table": "i64",
    "begins": "i32", "extra": "u8", "favourites": "i32", "index": "i32", "kept": "i64",
    "laps": "i64", "links": "i64", "nodes": "i64", "order": "i32", "owner": "i32",
    "places": "i32", "repeats": "u8", "seen": "i32", "shares": "fp32", "slots": "i64",
    "starts": "i64", "sums": "fp64", "tables": "fp32", "walks": "i64", "words": "i32",
    "tensor": None, "ties": "i64", "values": "fp32", "weight": None, "x": "fp32", "y": "fp32",
    "bias": "fp32", "dense": "i32", "flipped": "i32", "positions": "i16", "ranks": "i32",
    "source": "i32",
}  # fmt: skip
_INTEGERS = {"infinity": "i64", "low": "i64", "high": "i64"}
_FLOATS = ("threshold", "pruned", "factor", "floor", "maximum")


class Build(NamedTuple):
    """What `triton.compile` needs; pointers are to 16-byte boundaries."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    fused: bool = False  # products and sums contracted

    @property
    def name(self) -> str:
        kind = [f"{k.lower()}={v}" for k, v in self.constants.items()]
        wide = [self.signature[n] for n in ("weight", "scores", "tensor") if n in self.signature]
        wide += ["i64"] * ("i32" not in self.signature.values())
        return " ".join([self.kernel.fn.__name__.removesuffix("_kernel"), *wide, *kind])


def _build(
    kernel: Any,
    warps: int,
    kind: str = "fp32",
    types: dict[str, str] | None = None,
    **constants: Any,
) -> Build:
    signature = {}
    for name in inspect.signature(kernel.fn).parameters:
        if types and name in types:
            signature[name] = types[name]
        elif name in constants:
            signature[name] = "constexpr"
        elif name in _POINTERS:
            signature[name] = f"*{_POINTERS[name] or kind}"
        else:
            signature[name] = "fp32" if name in _FLOATS else _INTEGERS.get(name, "i32")
    return Build(kernel, signature, constants, warps)


def builds(row: str) -> list[Build]:
    """The list for a row of the table of configurations, "cuda" or "hip".

    Integers are 32-bit; the first build of each kernel is there again with 64-bit ones, and with
    all of them 1, which Triton makes a constant.
    """
    sizes = config.table(row)
    listed = [
        *_bits(sizes.flat),
        *_selection(sizes.select),
        *_sweeps(sizes),
        *_products(sizes.product),
        *_products(sizes.product_few),
        *_patterns(sizes.pattern),
        *_maps(sizes.flat),
        *_dpai(sizes.pattern),
        *_phew(sizes),
        *_balanced(sizes),
        *_masked_words(sizes.packed),
        *_masked_index(sizes.packed),
        *_masked_decode(sizes.decode, sizes),
        *_masked_decode(sizes.decode_few, sizes),
    ]
    first = {build.kernel.fn.__name__: build for build in reversed(listed)}.values()
    wide = [
        b._replace(signature={n: "i64" if t == "i32" else t for n, t in b.signature.items()})
        for b in first
    ]
    return [*listed, *wide, *map(_ones, first)]


def _ones(build: Build) -> Build:
    ones = {n: 1 for n, t in build.signature.items() if t == "i32"}
    return build._replace(
        signature={**build.signature, **dict.fromkeys(ones, "constexpr")},
        constants={**build.constants, **ones},
    )


def _bits(flat: config.Flat) -> Iterator[Build]:
    rows, warps = flat
    bytes_ = {"mask": "*u8", "out": "*u8"}
    yield _build(bits.pack_mask_kernel, warps, types=bytes_, ROWS=rows)
    yield _build(bits.unpack_mask_kernel, warps, types=bytes_, ROWS=rows)
    for kind in (*_TYPES, "fp64"):
        yield _build(bits.apply_mask_kernel, warps, kind, ROWS=rows)


def _selection(select: config.Select) -> Iterator[Build]:
    rows, tiles, warps = select
    parts = {"parts": "*i32"}
    sources = [
        (selection.DENSE.value, 1, True, False),
        (selection.DENSE.value, 1, False, True),
        (selection.FACTORED.value, 1, False, False),
        (selection.FACTORED.value, 2, False, True),
        (selection.PRODUCT.value, 1, False, False),
    ]
    for mode, power, absolute, scaled in sources:
        same: dict[str, Any] = {
            "LAYERS": 64, "MODE": mode, "POWER": power, "ABSOLUTE": absolute, "SCALED": scaled,
            "ROWS": rows, "TILES": tiles,
        }  # fmt: skip
        first, last = ((22, 11), (0, 11)) if scaled else ((21, 11), (0, 10))
        for (shift, digit), begins in ((first, True), (last, False)):
            yield _build(
                selection.histogram_kernel, warps, types=parts, SHIFT=shift, DIGIT=digit,
                FIRST=begins, LAST=not begins, **same,
            )  # fmt: skip
        yield _build(selection.emit_kernel, warps, SHIFT=0, **same)
    for digit in (10, 11):
        for last_digit in (False, True):
            yield _build(
                selection.threshold_kernel, warps, types=parts, DIGIT=digit, LAST=last_digit,
                BLOCK=1024,
            )  # fmt: skip


def _weights() -> Iterator[tuple[str, int, bool]]:
    """Types, powers, masks: every value of each."""
    yield from ((kind, 1, kind != "fp16") for kind in _TYPES)
    yield from (("fp32", 0, True), ("bf16", 2, False))


def _sweeps(sizes: config.Config) -> Iterator[Build]:
    forward, adjoint, flat = sizes.forward, sizes.adjoint, sizes.flat
    for kind, power, masked in _weights():
        yield _build(
            sweeps.path_forward_kernel, forward.warps, kind, POWER=power, MASKED=masked,
            ROWS=forward.rows, COLUMNS=forward.columns,
        )  # fmt: skip
        for sweep in (False, True):
            yield _build(
                sweeps.path_adjoint_kernel, adjoint.warps, kind, POWER=power, MASKED=masked,
                SWEEP=sweep, ROWS=adjoint.rows, COLUMNS=adjoint.columns,
            )  # fmt: skip
    yield _build(sweeps.add_rows_kernel, flat.warps, BLOCK=flat.rows)
    yield _build(sweeps.join_rows_kernel, flat.warps, types={"out": "*u8"}, ROWS=flat.rows)


def _products(tile: config.Product) -> Iterator[Build]:
    for kind, power, masked in _weights():
        same: dict[str, Any] = {
            "POWER": power,
            "MASKED": masked,
            "ROWS": tile.rows,
            "DEPTH": tile.depth,
        }
        for kernel in (products.product_forward_kernel, products.product_adjoint_kernel):
            yield _build(kernel, tile.warps, kind, POSITIONS=tile.positions, **same)
        yield _build(
            products.product_score_kernel, tile.warps, kind,
            **{**same, "DEPTH": min(tile.depth, 16), "COLUMNS": tile.rows},
        )  # fmt: skip


def _patterns(flat: config.Flat) -> Iterator[Build]:
    rows, warps = flat
    means = {"out": "*fp64"}
    for kind in _TYPES:
        for is_factored, masked in ((False, False), (True, True)):
            same: dict[str, Any] = {
                "POWER": 2 if kind == "fp32" else 1, "ABSOLUTE": not is_factored,
                "FACTORED": is_factored, "MASKED": masked,
            }  # fmt: skip
            yield _build(patterns.nm_mask_kernel, warps, kind, ROWS=rows, **same)
            yield _build(patterns.block_means_kernel, warps, kind, types=means, BLOCKS=rows, **same)
    yield _build(patterns.expand_blocks_kernel, warps, ROWS=rows)


def _maps(flat: config.Flat) -> Iterator[Build]:
    rows, warps = flat
    tile = 8 * rows
    yield _build(maps.maximum_kernel, warps, TILE=tile, STEPS=8)
    yield _build(maps.scale_kernel, warps, TILE=tile)
    yield _build(maps.live_nodes_kernel, warps, types={"out": "*u8"}, CHANNELS=8, TILE=rows)
    yield _build(maps.dot_kernel, warps, TILE=tile, STEPS=8)
    yield _build(maps.share_kernel, warps, TILE=tile)
    yield _build(maps.through_maximum_kernel, warps, TILE=tile)


def _dpai(flat: config.Flat) -> Iterator[Build]:
    rows, warps = flat
    for width, vectors, transposed, adam in (
        (1, True, False, True),
        (1, False, True, False),
        (16, False, False, True),
        (16, False, True, True),
        (2048, False, False, True),
    ):
        yield _build(
            dpai.dpai_kernel, max(warps, width // 256), VECTORS=vectors,
            TRANSPOSED=transposed, ADAM=adam, KERNELS=max(1, 8 * rows // width), WEIGHTS=width,
        )  # fmt: skip


def _phew(sizes: config.Config) -> Iterator[Build]:
    lanes, warps = 8 * sizes.pattern.rows, sizes.pattern.warps
    for kind, weighting, down, block in (
        ("fp32", 0, False, 16),
        ("bf16", 1, True, 4),
        ("fp16", 2, False, 4),
        ("fp64", 2, True, 1),
    ):
        yield _build(
            phew.phew_sums_kernel, warps, kind, BLOCK=block, DOWN=down, WEIGHTING=weighting,
            LANES=lanes,
        )  # fmt: skip
    yield _build(phew.phew_shares_kernel, warps, LANES=lanes)
    yield _build(phew.phew_repeats_kernel, warps, LANES=lanes)
    for exact in (False, True):
        yield _build(phew.phew_keep_kernel, 8, EXACT=exact, LANES=phew.KEEP_LANES)
    for forwards, weighting, whole, kind in (
        (True, 0, False, tl.float32), (False, 0, False, tl.float32), (True, 1, False, tl.bfloat16),
        (False, 2, True, tl.float16), (True, 2, True, tl.float64), (False, 2, False, tl.float64),
    ):  # fmt: skip
        yield _build(
            walks.phew_walks_kernel, sizes.walk.warps, FORWARDS=forwards, WEIGHTING=weighting,
            WHOLE=whole, TYPE=kind, LANES=sizes.walk.lanes,
        )  # fmt: skip


def _balanced(sizes: config.Config) -> Iterator[Build]:
    (rows, warps), walk = sizes.flat, sizes.walk
    yield _build(balanced.balanced_starts_kernel, warps, LANES=rows)
    yield _build(balanced.balanced_laps_kernel, walk.warps, LANES=walk.lanes)
    yield _build(balanced.balanced_deal_kernel, warps, LANES=rows)
    tile, warps = 4 * sizes.pattern.rows, sizes.pattern.warps
    for transposed, kind, wide in (
        (False, "fp32", 16),
        (True, "bf16", 1),
        (False, "fp16", 128),
        (True, "fp64", 2048),
    ):
        yield _build(
            balanced.balanced_mark_kernel, sizes.flat.warps, TRANSPOSED=transposed, LANES=rows
        )
        same: dict[str, Any] = {
            "TRANSPOSED": transposed, "KERNELS": max(1, tile // wide), "POSITIONS": wide,
        }  # fmt: skip
        threads = max(warps, wide // 256)
        count = {"positions": "i32"}  # of a kernel; elsewhere those of packed weights
        draw = {"mask": "*u8", **count}
        yield _build(balanced.balanced_draw_kernel, threads, types=draw, **same)
        yield _build(balanced.balanced_rank_kernel, threads, kind, types=count, **same)


def _masked_words(packed: config.Packed) -> Iterator[Build]:
    # Pointers of other types than elsewhere.
    types = {"starts": "*i32", "words": "*i32", "counts": "*i32"}

    def of(kernel: Any, **more: Any) -> Build:
        return _build(kernel, packed.warps, types={**types, **more.pop("types", {})}, **more)

    yield of(masked_words.masked_bit_words_kernel, LANES=packed.words)
    yield of(masked_words.masked_entry_words_kernel, LANES=packed.words)
    yield of(masked_words.masked_positions_kernel, WORDS=packed.tile)
    yield of(masked_words.masked_flip_counts_kernel, WIDTH=packed.tile)
    yield of(masked_words.masked_flip_kernel, WIDTH=packed.tile)
    for kind, units in (("*u8", 1), ("*i16", 1), ("*i32", 1), ("*i64", 2)):
        same: dict[str, Any] = {
            "types": {"values": kind, "dense": kind}, "UNITS": units, "WORDS": packed.tile,
        }  # fmt: skip
        yield of(masked_words.masked_scatter_kernel, **same)
        yield of(masked_words.masked_gather_kernel, **same)


def _masked_index(packed: config.Packed) -> Iterator[Build]:
    warps = packed.warps
    for kind, few, wide in (("fp32", 1, packed.batch), ("bf16", 4, 16), ("fp16", 2, packed.batch)):
        numbers = dict.fromkeys(("x", "g", "values", "bias", "out"), f"*{kind}")
        types = {**numbers, "starts": "*i32"}
        near: dict[str, Any] = {"BATCH": few, "ROWS": packed.rows, "LANES": packed.lanes}
        tile: dict[str, Any] = {"ENTRIES": packed.entries * packed.batch // wide, "BATCH": wide}
        for back in (False, True):
            flags: dict[str, Any] = {"types": types, "SOURCE": back, "BIAS": not back}
            yield _build(masked_index.masked_few_kernel, warps, kind, **near, **flags)._replace(
                fused=True
            )
            yield _build(
                masked_index.masked_lines_kernel, warps, kind, ROWS=packed.lines, **tile, **flags
            )._replace(fused=True)
            yield _build(
                masked_index.masked_few_bits_kernel, warps, kind, types=types, BIAS=back, **near
            )._replace(fused=True)
        yield _build(masked_index.masked_entries_kernel, warps, kind, types=types, **tile)._replace(
            fused=True
        )


def _masked_decode(tile: config.Decode, sizes: config.Config) -> Iterator[Build]:
    same: dict[str, Any] = {"ROWS": tile.rows}
    for kind in _TYPES:
        numbers = dict.fromkeys(("x", "g", "values", "bias"), f"*{kind}")
        for part in (False, True):
            out = "*fp32" if part else f"*{kind}"
            types = {**numbers, "words": "*i32", "out": out}
            yield _build(
                masked_decode.masked_decode_kernel, tile.warps, kind, types=types, BIAS=not part,
                BATCH=tile.batch, **same,
            )._replace(fused=True)  # fmt: skip
            yield _build(
                masked_decode.masked_decode_input_kernel, tile.warps, kind, types=types,
                BATCH=tile.batch, **same,
            )._replace(fused=True)  # fmt: skip
        yield _build(
            masked_decode.masked_decode_kept_kernel, tile.warps, kind,
            types={**types, "out": f"*{kind}"}, COLUMNS=tile.columns, BATCH=min(tile.batch, 32),
            **same,
        )._replace(fused=True)  # fmt: skip
        yield _build(
            masked_decode.masked_join_kernel, sizes.pattern.warps, kind,
            types={"out": f"*{kind}", "bias": f"*{kind}"}, BIAS=kind != "fp16",
            TILE=8 * sizes.pattern.rows,
        )  # fmt: skip
