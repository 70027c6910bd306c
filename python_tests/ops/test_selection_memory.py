"""Selection needs little memory beyond the scores, at any size, with ties and with strides."""

from __future__ import annotations

import mmap
import sys

import pytest

from bench.selection_memory import CASES, Usage, measure, memory_now, peak_beyond

#: Peak memory beyond the scores, mask included, in units of the scores' own bytes.
LIMIT = 0.25

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


@pytest.fixture(scope="module")
def usages() -> dict[str, Usage]:
    return {usage.name: usage for usage in measure()}


@pytest.mark.parametrize("name", CASES)
def test_extra_memory_of_a_selection(name: str, usages: dict[str, Usage]) -> None:
    usage = usages[name]
    print(f"{name}: {usage.extra_bytes / 1e6:.1f} MB, {usage.ratio:.3f}x of the scores")
    # The mask alone; a lower figure would mean that the measurement sees nothing.
    assert usage.extra_bytes >= 0.9 * (CASES[name].size / 8)
    assert usage.ratio <= LIMIT


def test_the_measurement_sees_memory_that_is_freed_again() -> None:
    def allocate() -> None:  # from the system: malloc may have pages left over
        with mmap.mmap(-1, 64 << 20) as pages:
            for start in range(0, len(pages), mmap.PAGESIZE):
                pages[start] = 1

    before = memory_now("VmRSS")
    assert (63 << 20) < peak_beyond(allocate) < (70 << 20)
    assert memory_now("VmRSS") - before < (8 << 20)
