"""The table of automatic choices, and that the registry goes by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import paikern as pk
from paikern.backends import choice, registry
from paikern.backends.choice import Rule

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rule", choice.RULES)
def test_rules_name_backends_and_what_they_rest_on(rule: Rule) -> None:
    assert set(rule.order) <= set(registry._LOADERS)
    assert rule.order[-1] == "reference"
    assert rule.measured == "not yet measured" or (ROOT / rule.measured).is_file()


def test_every_device_has_a_rule_for_all_sizes() -> None:
    for device in ("cpu", "cuda"):
        assert choice.order("topk_mask", device)[-1] == "reference"
    assert choice.order("topk_mask", "mps") == ("reference",)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = (
        Rule("cpu", "", 0, ("cpu", "reference"), "not yet measured"),
        Rule("cpu", "pack_mask", 0, ("cpu", "reference"), "not yet measured"),
        Rule("cpu", "pack_mask", 100, ("other", "cpu", "reference"), "not yet measured"),
    )
    seen = SimpleNamespace(pack_mask=lambda mask: torch.zeros(1, dtype=torch.uint8))
    monkeypatch.setattr(choice, "RULES", made)
    other = registry.Backend(seen, ("cpu",), "a test")
    monkeypatch.setitem(registry._LOADERS, "other", lambda: other)

    def forget() -> None:
        choice._fitting.cache_clear()
        registry._resolve.cache_clear()
        registry.load.cache_clear()

    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.mark.usefixtures("rules")
def test_size_decides() -> None:
    assert pk.ops.pack_mask(torch.ones(99, dtype=torch.bool)).numel() == 13
    assert pk.ops.pack_mask(torch.ones(100, dtype=torch.bool)).numel() == 1
    assert pk.ops.kth_largest([torch.arange(200.0)], 1) == 199.0  # no rule of its own
    with registry.using("cpu"):
        assert pk.ops.pack_mask(torch.ones(100, dtype=torch.bool)).numel() == 13
