"""Products, passes and updates do not depend on how warps take turns, and touch nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paikern import ops
from python_tests.cuda_source import shim
from python_tests.cuda_source.path_calls import on
from python_tests.cuda_source.test_shim import sanitized
from python_tests.ops.path_cases import Geometry, keep

pytestmark = pytest.mark.cuda_source

MAPS = Geometry((3, 3), (3, 3), (1, 1), (1, 1), (1, 1), rows=66, channels=130, batch=1)
STRIDES = Geometry((9, 30), (3, 2), (2, 3), (1, 1), (1, 1), rows=67, channels=7, batch=2)
SOUND = """
    from paikern.backends import cuda_jit, registry
    from python_tests.cuda_source.test_path_order import calls

    registry._LOADERS["cuda_source"] = lambda: registry.Backend(cuda, ("cpu",), "")
    with registry.using("cuda_source"):
        for call in calls().values():
            call()
    print("sound")
"""


def calls() -> dict[str, Callable[[], Any]]:
    """Between them every kernel, with sums that several blocks share where it has them."""
    weight, x, g = torch.randn(300, 2051), torch.rand(2051), torch.rand(300)
    halves, mask = weight.bfloat16(), keep(weight, 0.4)[1]
    s, moments = torch.randn(40, 9, 5), (torch.rand(40, 9, 5), torch.rand(40, 9, 5))
    kept, live = keep(s, 0.3)[1], torch.rand(40) < 0.5
    found: dict[str, Callable[[], Any]] = {
        "forward": lambda: ops.path_forward(weight, x, mask=mask),
        "backward": lambda: ops.path_backward(halves, g, mask=mask),
        "sweep": lambda: ops.path_sweep(weight, x, g, 0.5, mask=mask)[:2],
        "score": lambda: ops.path_score(halves, x, g, mask=mask),
        "batch": lambda: ops.path_forward(weight[:, :99], torch.rand(3, 99)),
        "maximum": lambda: torch.tensor(ops.map_maximum(weight)),
        "scale": lambda: ops.map_scale(weight.clone(), 3, floor=0.1),
        "through": lambda: ops.through_maximum(weight.clone(), weight.abs(), 2.0),
        "live": lambda: ops.live_nodes(weight.view(3, 100, 2051), weight.view(3, 100, 2051), 1),
        "dpai": lambda: _dpai(s, kept, live, moments),
    }
    for name, shape in (("maps", MAPS), ("strides", STRIDES)):
        w, a, b, size = shape.weight(), shape.x(), shape.g(), list(shape.x().shape)
        same = {"mask": keep(w, 0.4)[1]}
        found[f"{name}-forward"] = lambda w=w, a=a, n=shape.args, m=same: ops.path_conv_forward(
            w, a, *n, **m
        )
        found[f"{name}-backward"] = lambda w=w, b=b, z=size, n=shape.args, m=same: (
            ops.path_conv_backward(w, b, z, *n, **m)
        )
        found[f"{name}-score"] = lambda w=w, a=a, b=b, n=shape.args, m=same: ops.path_conv_score(
            w, a, b, *n, **m
        )
    return found


def _dpai(s: Tensor, mask: Tensor, live: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    scores, (m, v) = s.clone(), (t.clone() for t in moments)
    ops.dpai_update_(scores, s.abs(), mask, live, exp_avg=m, exp_avg_sq=v, lr=0.1)
    return torch.stack([scores, m, v])


def test_results_do_not_depend_on_the_order_of_warps(on_cpu: shim.OnCpu) -> None:
    for name, call in calls().items():
        # What is random is drawn anew at every call of "batch".
        results = []
        for way in (0, 1, 2):
            on_cpu.order(way)
            torch.manual_seed(1)
            results.append(on("cuda_source", call))
        on_cpu.order(0)
        tensors = [r if isinstance(r, tuple) else (r,) for r in results]
        for other in tensors[1:]:
            assert all(map(torch.equal, tensors[0], other)), name


@pytest.mark.slow
def test_kernels_touch_nothing_else() -> None:
    done = sanitized(SOUND)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sound\n"
