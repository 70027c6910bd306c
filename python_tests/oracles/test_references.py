"""The pure-PyTorch references against worked examples, published numbers and the oracles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bench.references import magnitude as magnitude_module
from bench.references import path_layer
from bench.references.dpai import DeadNetworkError, DPaIReference
from bench.references.erk import erk_densities, erk_quotas
from bench.references.layers import prunable_layers
from bench.references.selection import round_removals, select_global
from bench.references.synflow import synflow
from paikern import zoo
from python_tests.oracles import goldens, path_oracle, synflow_oracle, topology_oracle


def shapes_of(model: nn.Module) -> list[tuple[int, ...]]:
    weights = dict(model.named_parameters())
    return [tuple(weights[name].shape) for name in prunable_layers(model)]


def tiny_dpai(variant: str, **options: float) -> DPaIReference:
    """The worked example of two linear layers, given its masks through the scores."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    reference = DPaIReference(model, (1, 3), 0.5, variant=variant, dtype=torch.float64, **options)  # type: ignore[arg-type]
    for layer, keep in zip(reference.layers, (3, 2), strict=True):
        layer.keep = keep
    reference.set_scores(
        {
            layer.name: torch.where(torch.tensor(mask) > 0, 2.0, 0.25)
            for layer, mask in zip(reference.layers, goldens.DPAI_MASKS, strict=True)
        }
    )
    return reference


@pytest.mark.parametrize("sparsity", goldens.LENET300_QUOTAS)
def test_erk_quotas_of_lenet300(sparsity: float) -> None:
    expected = goldens.LENET300_QUOTAS[sparsity]
    assert erk_quotas(goldens.LENET300_SHAPES, sparsity) == expected


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [("resnet20", 10, goldens.RESNET20_QUOTAS_90), ("vgg19_bn", 100, goldens.VGG19_QUOTAS_90)],
)
def test_erk_quotas_of_the_zoo(name: str, classes: int, expected: list[int]) -> None:
    with torch.device("meta"):
        model = zoo.create(name, num_classes=classes)
    assert erk_quotas(shapes_of(model), 0.9) == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98, 0.999])
def test_erk_budget(sparsity: float) -> None:
    with torch.device("meta"):
        shapes = shapes_of(zoo.create("resnet20"))
    total = 270_896
    numels = [torch.Size(shape).numel() for shape in shapes]
    densities = erk_densities(shapes, sparsity)
    assert max(densities) <= 1.0
    assert sum(d * n for d, n in zip(densities, numels, strict=True)) == pytest.approx(
        (1 - sparsity) * total
    )
    exact = total - int(sparsity * total)
    assert sum(erk_quotas(shapes, sparsity, "paper")) == exact
    assert 0 <= sum(erk_quotas(shapes, sparsity)) - exact <= len(shapes)


@pytest.mark.parametrize("variant", ["published", "paper"])
def test_dpai_worked_example(variant: str) -> None:
    reference = tiny_dpai(variant)
    objective, gradients = reference.gradients()
    assert objective == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-6)
    for gradient, expected in zip(gradients.values(), goldens.DPAI_GRADIENTS, strict=True):
        torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))
    step = reference.step()
    assert (step.nodes, step.kernels, step.weights) == (3, 5, 5)


def test_update_weight_of_the_worked_example() -> None:
    """The three-term ascent direction is u * sign(s) * q with the u of the worked example."""
    reference = tiny_dpai("paper", alpha=0.99, beta=0.5, lr=0.1)
    before = reference.scores()
    reference.step()
    after = reference.scores()
    for layer, u, q in zip(
        reference.layers, goldens.DPAI_UPDATE_WEIGHTS, goldens.DPAI_GRADIENTS, strict=True
    ):
        moved = (after[layer.name] - before[layer.name]) / (0.1 * layer.keep)
        torch.testing.assert_close(moved, (torch.tensor(u) * torch.tensor(q)).double())


def papers_model(name: str) -> nn.Module:
    """The net of the published run; its VGG-19 has four max pools and ends in a mean pool."""
    torch.manual_seed(0)
    model = zoo.create(name, num_classes=10 if name == "resnet20" else 100)
    features = getattr(model, "features", None)
    if features is not None and isinstance(features[-1], nn.MaxPool2d):
        features[-1] = nn.AvgPool2d(2)
    return model


@pytest.mark.parametrize("name", ["resnet20", pytest.param("vgg19_bn", marks=pytest.mark.slow)])
def test_dpai_start_matches_the_published_run(name: str) -> None:
    """J, log R_P and the counts of a random ERK start lie in the band of the published run."""
    j, log_paths, nodes, kernels, weights = goldens.DPAI_START[name, 0.98]
    model = papers_model(name)
    reference = DPaIReference(model, zoo.example_input(model), 0.98, seed=None)
    true_log_paths = reference.log_paths()
    counts = topology_oracle(model, reference.masks(), zoo.example_input(model))
    step = reference.step()
    assert step.objective == pytest.approx(j, abs=1.5)
    assert true_log_paths == pytest.approx(log_paths, abs=1.5)
    assert step.nodes == pytest.approx(nodes, abs=5)
    assert step.kernels == pytest.approx(kernels, rel=0.01)
    if weights is not None:
        assert step.weights == pytest.approx(weights, rel=0.01)
    assert counts.log_paths == pytest.approx(true_log_paths, rel=1e-9)
    assert (counts.effective_nodes, counts.effective_kernels) == (step.nodes, step.kernels)
    assert counts.effective_params == step.weights


def test_published_objective_is_the_path_count_on_a_chain_only() -> None:
    chain = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    for model, equal in ((chain, True), (zoo.create("resnet20", seed=0), False)):
        x = torch.zeros(1, 3, 32, 32)
        reference = DPaIReference(model, x, 0.9, dtype=torch.float64)
        objective, gradients = reference.gradients()
        flow = path_oracle(model, x, reference.masks())
        assert (abs(objective - flow.log_total) < 1e-9) == equal
        close = [
            torch.allclose(gradient, flow.mask_gradient(layer), rtol=1e-9, atol=1e-12)
            for layer, gradient in gradients.items()
        ]
        assert all(close) == equal


@pytest.mark.parametrize("name", ["resnet20", "mlp"])
def test_paper_gradient_is_that_of_log_paths(name: str) -> None:
    model = zoo.create(name, seed=0)
    x = zoo.example_input(model)
    reference = DPaIReference(model, x, 0.9, variant="paper", dtype=torch.float64)
    objective, gradients = reference.gradients()
    flow = path_oracle(model, x, reference.masks())
    assert objective == pytest.approx(flow.log_total, rel=1e-12)
    for layer, gradient in gradients.items():
        torch.testing.assert_close(gradient, flow.mask_gradient(layer), rtol=1e-9, atol=1e-15)


def test_paper_ascent_raises_its_objective() -> None:
    """Random ERK start on ResNet-20 at 98 %, alpha 0: log R_P from about 42 above 65."""
    model = zoo.create("resnet20", seed=0)
    reference = DPaIReference(
        model, zoo.example_input(model), 0.98, variant="paper", alpha=0.0, dtype=torch.float64
    )
    start = reference.step().objective
    for _ in range(29):
        end = reference.step().objective
    assert start == pytest.approx(42.05, abs=1.5)
    assert end > 65.0


def test_quotas_hold_at_every_step_and_published_equals_paper_masks_on_a_chain() -> None:
    model = zoo.create("mlp", seed=0)
    x = zoo.example_input(model)
    published = DPaIReference(model, x, 0.9, dtype=torch.float64, optimizer="adam")
    paper = DPaIReference(model, x, 0.9, variant="paper", dtype=torch.float64, optimizer="adam")
    for other, layer in zip(paper.layers, published.layers, strict=True):
        other.keep = layer.keep  # the two round the quotas differently
    for _ in range(3):
        published.step()
        paper.step()
        masks = published.masks()
        assert [int(m.sum()) for m in masks.values()] == [p.keep for p in published.layers]
        for name, mask in paper.masks().items():
            assert torch.equal(mask, masks[name])


def test_ties_in_the_scores_keep_the_lower_index() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    reference = DPaIReference(model, (1, 4), 0.5)
    reference.set_scores({"0.weight": torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, 1]])})
    assert reference.masks()["0.weight"].tolist() == [[True] * 4, [False] * 4]


@pytest.mark.parametrize("variant", ["published", "paper"])
def test_dead_network_is_an_error_that_names_the_layer(variant: str) -> None:
    reference = tiny_dpai(variant)
    scores = reference.scores()
    reference.layers[0].keep, reference.layers[1].keep = 3, 1
    scores["0.weight"][0], scores["0.weight"][1] = 2.0, 0.25
    scores["2.weight"] = torch.tensor([[0.1, 2.0], [0.1, 0.2]])
    reference.set_scores(scores)
    with pytest.raises(DeadNetworkError, match=r"2\.weight"):
        reference.step()


@pytest.mark.parametrize("selection", ["published", "exact"])
def test_synflow_reference_follows_the_oracle(selection: str) -> None:
    model = zoo.create("resnet20", seed=0)
    x = zoo.example_input(model)
    before = copy.deepcopy(model.state_dict())
    masks = synflow(model, x, 0.9, rounds=3, selection=selection, dtype=torch.float64)
    expected = synflow_oracle(model, x, 0.9, rounds=3, variant="published").masks
    agree = sum(int((masks[name] == mask).sum()) for name, mask in expected.items())
    assert agree >= 270_896 * 0.9999
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_synflow_reference_reports_its_rounds() -> None:
    done: list[int] = []
    synflow(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (1, 4), 0.5, 3,
            report=done.append)  # fmt: skip
    assert done == [1, 2, 3]


def test_sweeps_of_one_layer_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    before = weight.clone()
    x, g = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0])
    assert path_layer.forward(weight, x).tolist() == [4.0, 5.0]
    assert path_layer.forward(weight, x, mask, power=2).tolist() == [1.5, 11.0]
    assert path_layer.backward(weight, g).tolist() == [1.0, 8.0, 2.5]
    # scores [[1, 2, 1], [0, 6, 4]]; the mask takes the 2
    adjoint, kept, count = path_layer.sweep(weight, x, g, 1.0, mask)
    assert adjoint.tolist() == [1.0, 6.0, 2.5]
    assert kept.tolist() == [[False, False, False], [False, True, True]]
    assert count == 2
    assert torch.equal(weight, before)


def test_selection_rules_on_ties() -> None:
    scores = {"a": torch.tensor([0.0, 1.0, 1.0]), "b": torch.tensor([1.0])}
    published = select_global(scores, 2, "published")
    exact = select_global(scores, 2, "exact")
    assert [m.tolist() for m in published.values()] == [[False, False, False], [False]]
    assert [m.tolist() for m in exact.values()] == [[False, True, True], [False]]


def test_round_removals_end_at_the_exact_count() -> None:
    removals = round_removals(270_896, 0.98, 100)
    assert removals == sorted(removals)
    assert len(removals) == 100
    assert removals[-1] == 265_478


@pytest.mark.parametrize("scope", ["global", "local"])
def test_magnitude_and_random_keep_the_exact_count(scope: str) -> None:
    model = zoo.create("resnet20", seed=0)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for masks in (
        magnitude_module.magnitude(model, 0.98, scope=scope),
        magnitude_module.random(model, 0.98, scope=scope, seed=5),
    ):
        kept = sum(int(mask.sum()) for mask in masks.values())
        per_layer = sum(m.numel() - int(0.98 * m.numel()) for m in masks.values())
        assert kept == (5418 if scope == "global" else per_layer)
    masks = magnitude_module.magnitude(model, 0.98)
    smallest_kept = min(
        weights[n].detach()[m].abs().min().item() for n, m in masks.items() if m.any()
    )
    largest_gone = max(weights[n].detach()[~m].abs().max().item() for n, m in masks.items())
    assert smallest_kept >= largest_gone
