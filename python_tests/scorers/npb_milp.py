"""The layer program as an integer program for HiGHS, and as the LP that bounds it."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from paikern.scorers.npb_program import LayerProgram


def highs(program: LayerProgram, *, integer: bool = True, gap: float = 0.0) -> float:
    """Optimum of a program of one group, from `X`, its deficits and nothing else.

    Variables: X[i, o], then the deficits of rows, columns and entries, each >= 0 and >= what is
    missing to t (to 1 for an entry).
    """
    paths, outputs = program.paths[0], program.outputs
    inputs, b = len(paths), int(program.budget[0])
    capacity, least = int(program.capacity[0]), int(program.least[0])
    full = outputs * capacity
    ordered = np.sort(paths)[::-1]
    whole, rest = divmod(b, full)
    longest = full * ordered[:whole].sum() + (rest * ordered[whole] if rest else 0.0)
    entries, size = inputs * outputs, inputs * outputs * 2 + inputs + outputs
    node = program.alpha / (inputs + outputs)
    cost = np.concatenate(
        [
            -np.repeat((1 - program.alpha) * paths / longest, outputs),
            np.full(inputs + outputs, node),
            np.full(entries, program.beta / b),
        ]
    )
    rows, columns = np.divmod(np.arange(entries), outputs)
    deficit = entries + inputs + outputs
    lines: list[tuple[np.ndarray, np.ndarray]] = [
        (rows, np.arange(entries)),
        (np.arange(inputs), entries + np.arange(inputs)),
        (inputs + columns, np.arange(entries)),
        (inputs + np.arange(outputs), entries + inputs + np.arange(outputs)),
        (inputs + outputs + np.arange(entries), np.arange(entries)),
        (inputs + outputs + np.arange(entries), deficit + np.arange(entries)),
    ]
    at = np.concatenate([line for line, _ in lines])
    of = np.concatenate([variable for _, variable in lines])
    needs = coo_array((np.ones(len(at)), (at, of)), shape=(inputs + outputs + entries, size))
    lower = np.concatenate([np.full(inputs + outputs, least), np.ones(entries)])
    constraints = [LinearConstraint(needs.tocsc(), lower, np.inf)]
    sums = needs.tocsr()[: inputs + outputs, :].tolil()
    sums[:, entries:] = 0
    caps = np.full(inputs + outputs, np.inf)
    if program.row_cap is not None:
        caps[:inputs] = program.row_cap[0]
    if program.column_cap is not None:
        caps[inputs:] = program.column_cap[0]
    constraints.append(LinearConstraint(sums.tocsc(), -np.inf, caps))
    total = coo_array((np.ones(entries), (np.zeros(entries, int), np.arange(entries))), (1, size))
    constraints.append(LinearConstraint(total.tocsc(), -np.inf, b))
    upper = np.concatenate([np.full(entries, capacity), np.full(size - entries, np.inf)])
    kinds = np.concatenate([np.ones(entries), np.zeros(size - entries)]) if integer else None
    found = milp(
        cost * b,  # a weight is worth 1 / b, and HiGHS takes reduced costs below 1e-7 for zero
        integrality=kinds,
        bounds=Bounds(np.zeros(size), upper),
        constraints=constraints,
        options={"mip_rel_gap": gap},
    )
    assert found.success, found.message
    return program.alpha + program.beta - float(found.fun) / b


def value_of(program: LayerProgram, entries: np.ndarray) -> float:
    """The objective of `X` [inputs, outputs] as it is defined, one group."""
    paths, b = program.paths[0], int(program.budget[0])
    inputs, outputs = entries.shape
    least, full = int(program.least[0]), program.outputs * int(program.capacity[0])
    assert entries.min() >= 0
    assert entries.max() <= program.capacity[0]
    assert entries.sum() <= b
    ordered = np.sort(paths)[::-1]
    whole, rest = divmod(b, full)
    longest = full * ordered[:whole].sum() + (rest * ordered[whole] if rest else 0.0)
    missing = np.maximum(least - entries.sum(1), 0).sum()
    missing += np.maximum(least - entries.sum(0), 0).sum()
    nodes = (inputs + outputs - missing) / (inputs + outputs)
    kernels = (b - np.maximum(1 - entries, 0).sum()) / b
    share = (paths[:, None] * entries).sum() / longest
    return program.alpha * nodes + (1 - program.alpha) * share + program.beta * kernels
