"""The demonstration that trains in packed form: the three ways differ in time and memory only."""

from __future__ import annotations

import pytest
import torch
from tqdm import tqdm

import paikern as pk
from bench import train_packed


def test_the_ways_train_the_same_network() -> None:
    row = train_packed.train("lenet300", [0], 1, tqdm(disable=True))
    ways = row["ways"]
    assert row["packed_layers"] >= 1
    assert ways["packed"]["accuracy_mean"] > 0.7
    assert ways["packed"]["accuracy_mean"] == pytest.approx(
        ways["dense-masked"]["accuracy_mean"], abs=0.02
    )
    assert ways["packed"]["bytes"] < 0.3 * ways["dense"]["bytes"] < ways["dense-masked"]["bytes"]
    (result,) = train_packed.result_rows([row])
    assert result["ratio"] == pytest.approx(result["reference_seconds"] / result["seconds"])
    table = train_packed.summary_table([row], 1)
    assert list(table.columns[1].cells) == list(train_packed.WAYS)


def test_the_patch_network_can_be_pruned_and_packed() -> None:
    net = train_packed.PatchMLP(width=32, hidden=64, depth=1)
    x = torch.randn(2, 1, 28, 28)
    masks = pk.prune(net, "dpai", sparsity=0.8, example_inputs=x[:1])
    before = net(x)
    net = pk.sparsify(net, masks, force=True)
    assert sum(isinstance(m, pk.PackedWeight) for m in net.modules()) == 4
    torch.testing.assert_close(net(x), before)
