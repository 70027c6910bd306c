"""The path oracles against the worked examples, brute force and the invariants."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from paikern import zoo
from python_tests.oracles import goldens, path_oracle, prunable, synflow_oracle, topology_oracle
from python_tests.oracles.brute_force import brute_force
from python_tests.oracles.rules import scaled_dot_product_attention
from python_tests.oracles.synflow import flow_scores, keep_exactly, kept_by_round

ONES3 = torch.ones(1, 3)


def mlp_of(matrices: tuple[list[list[float]], ...]) -> nn.Sequential:
    """Linear layers with the given weights, ReLU between, no bias."""
    modules: list[nn.Module] = []
    for matrix in matrices:
        weight = torch.tensor(matrix, dtype=torch.float64)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight)
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def random_masks(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) < density
        for name, (_, parameter) in prunable(model).items()
    }


@pytest.mark.parametrize("variant", ["paper", "published"])
@pytest.mark.parametrize("method", goldens.PATH_SCORES)
def test_worked_example_scores(method: str, variant: str) -> None:
    p_net, p_score, total, *expected = goldens.PATH_SCORES[method]
    model = mlp_of(goldens.PATH_WEIGHTS)
    log_total, scores = flow_scores(model, ONES3, p_net=p_net, p_score=p_score, variant=variant)
    assert math.exp(log_total) == pytest.approx(total, rel=1e-12)
    for score, values in zip(scores.values(), expected, strict=True):
        torch.testing.assert_close(score, torch.tensor(values, dtype=torch.float64))


def test_worked_example_log_synflow() -> None:
    _, scores = flow_scores(mlp_of(goldens.PATH_WEIGHTS), ONES3, log_score=True, norm="identity")
    for score, values in zip(scores.values(), goldens.LOG_SYNFLOW, strict=True):
        torch.testing.assert_close(
            score, torch.tensor(values, dtype=torch.float64), atol=5e-5, rtol=0
        )


def test_worked_example_selection() -> None:
    run = synflow_oracle(mlp_of(goldens.PATH_WEIGHTS), ONES3, 0.6, rounds=1)
    kept = [run.scores[name][mask] for name, mask in run.masks.items()]
    assert sorted(torch.cat(kept).tolist()) == goldens.SYNFLOW_KEPT_AT_60


def test_dpai_worked_example() -> None:
    model = mlp_of(([[0.0] * 3] * 2, [[0.0] * 2] * 2))
    names = list(prunable(model))
    masks = {n: torch.tensor(m).bool() for n, m in zip(names, goldens.DPAI_MASKS, strict=True)}
    flow = path_oracle(model, ONES3, masks)
    assert flow.total == goldens.DPAI_PATHS
    for index, name in enumerate(names):
        layer = flow.layers[name]
        assert layer.outputs[0].flatten().tolist() == goldens.DPAI_INCOMING[index]
        assert layer.output_gradients[0].flatten().tolist() == goldens.DPAI_OUTGOING[index]
        expected = torch.tensor(goldens.DPAI_GRADIENTS[index], dtype=torch.float64)
        torch.testing.assert_close(flow.mask_gradient(name), expected)
    counts = topology_oracle(model, masks, ONES3)
    assert tuple(layer.effective_nodes for layer in counts.layers.values()) == goldens.DPAI_NODES
    assert counts.effective_kernels == goldens.DPAI_KERNELS
    assert counts.effective_params == goldens.DPAI_WEIGHTS
    assert counts.layers[names[1]].dead_channels == (1,)


@pytest.mark.parametrize("seed", range(8))
def test_brute_force_path_enumeration(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(1, 5, (5,), generator=generator).tolist()
    matrices = []
    for fan_in, fan_out in itertools.pairwise(widths):
        weight = torch.randint(-3, 4, (fan_out, fan_in), generator=generator).double()
        matrices.append(weight.tolist())
    model = mlp_of(tuple(matrices))
    x = torch.ones(1, widths[0])

    weighted = brute_force([[[abs(v) for v in row] for row in matrix] for matrix in matrices])
    log_total, scores = flow_scores(model, x)
    assert math.exp(log_total) == pytest.approx(float(weighted.total), rel=1e-12)
    for score, through in zip(scores.values(), weighted.through, strict=True):
        assert score.tolist() == [[float(v) for v in row] for row in through]

    counted = brute_force([[[float(v != 0) for v in row] for row in m] for m in matrices])
    masks = {name: parameter != 0 for name, (_, parameter) in prunable(model).items()}
    counts = topology_oracle(model, masks, x)
    assert counts.effective_nodes == counted.nodes
    assert counts.effective_params == counts.effective_kernels == counted.weights
    paths = float(counted.total)
    assert counts.log_paths == (pytest.approx(math.log(paths)) if paths else -math.inf)


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("name", ["mlp", "vgg16_bn"])
def test_every_cut_carries_all_paths(name: str, p: int) -> None:
    model = zoo.create(name, seed=3)
    x = zoo.example_input(model)
    flow = path_oracle(model, x, random_masks(model, 0.3, seed=4), p_net=p, norm="scale")
    for layer in flow.layers.values():
        assert float((layer.weight * layer.gradient).sum()) == pytest.approx(flow.total, rel=1e-9)


def test_residual_network_conserves_paths_at_its_cuts() -> None:
    model = zoo.create("resnet20", seed=3)
    flow = path_oracle(model, zoo.example_input(model), random_masks(model, 0.1, seed=4))
    shares = {
        name: float((f.weight * flow.mask_gradient(name)).sum()) for name, f in flow.layers.items()
    }
    assert shares["conv1.weight"] == pytest.approx(1.0, rel=1e-9)
    assert shares["fc.weight"] == pytest.approx(1.0, rel=1e-9)
    for block in ("layer2.0", "layer3.0"):  # the two branches together are a cut
        branches = shares[f"{block}.conv2.weight"] + shares[f"{block}.downsample.0.weight"]
        assert branches == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn"])
def test_node_flow_is_the_flow_of_its_weights(name: str) -> None:
    model = zoo.create(name, seed=1)
    flow = path_oracle(model, zoo.example_input(model), random_masks(model, 0.05, seed=2))
    for layer in flow.layers.values():
        z, g = layer.outputs[0], layer.output_gradients[0]
        at_output = (z * g).transpose(0, 1).flatten(1).sum(1)  # [O]
        of_weights = (layer.weight * layer.gradient).flatten(1).sum(1)
        torch.testing.assert_close(at_output, of_weights, rtol=1e-9, atol=1e-9 * flow.total)


def test_published_and_paper_synflow_agree_at_init() -> None:
    model = zoo.create("resnet20", seed=0).eval()
    x = zoo.example_input(model)
    _, paper = flow_scores(model, x)
    _, published = flow_scores(model, x, variant="published")
    for name, score in paper.items():
        torch.testing.assert_close(published[name], score, rtol=1e-9, atol=0)


def test_batch_norm_scale_is_positive_and_has_no_offset() -> None:
    conv, norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
    model = nn.Sequential(conv, norm).eval()
    with torch.no_grad():
        conv.weight.fill_(2.0)
        norm.weight.copy_(torch.tensor([-3.0, 0.5]))
        norm.bias.fill_(7.0)
    norm.running_mean = torch.ones(2)
    norm.running_var = torch.tensor([4.0 - 1e-5, 1.0 - 1e-5])
    flow = path_oracle(model, torch.zeros(1, 1, 1, 1), p_net=1, norm="scale")
    assert flow.total == pytest.approx(2.0 * 1.5 + 2.0 * 0.5, rel=1e-6)
    squared = path_oracle(model, torch.zeros(1, 1, 1, 1), p_net=2, norm="scale")
    assert squared.total == pytest.approx(4.0 * 1.5**2 + 4.0 * 0.5**2, rel=1e-6)
    assert path_oracle(model, torch.zeros(1, 1, 1, 1), p_net=1).total == 4.0


def test_model_is_left_alone_and_pruned_nan_counts_as_zero() -> None:
    model = mlp_of(goldens.PATH_WEIGHTS)
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"][1, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = {"0.weight": torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)}
    assert path_oracle(model, ONES3, masks, p_net=1).total == 30.5  # the NaN stands where 0 stood
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(9.0), before[name].nan_to_num(9.0))


def test_max_pool_ties_go_to_the_first_position() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.MaxPool2d(2))
    flow = path_oracle(model, torch.zeros(1, 1, 4, 4))
    expected = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]] * 2, dtype=torch.float64)
    assert torch.equal(flow.layers["0.weight"].output_gradients[0][0, 0], expected)


def test_topology_of_groups_and_transposed_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False),
        nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False),
    )
    masks = {
        name: torch.ones(p.shape, dtype=torch.bool) for name, (_, p) in prunable(model).items()
    }
    masks["1.weight"][:, 1] = False  # no kernel into output channel 1
    masks["1.weight"][3] = False  # nothing leaves channel 3 of the first layer
    counts = topology_oracle(model, masks, torch.zeros(1, 2, 5, 5))
    first, second = counts.layers.values()
    assert (first.effective_nodes, first.dead_channels) == (3, (3,))
    assert (first.kernels, first.effective_kernels, first.effective_params) == (4, 3, 27)
    assert (second.effective_nodes, second.dead_channels) == (2, (1,))
    assert (second.effective_kernels, second.effective_params) == (6, 24)


def test_dead_network_counts_nothing() -> None:
    model = mlp_of(goldens.PATH_WEIGHTS)
    counts = topology_oracle(model, {"2.weight": torch.zeros(2, 2, dtype=torch.bool)}, ONES3)
    assert counts.log_paths == -math.inf
    assert counts.effective_nodes == counts.effective_kernels == counts.effective_params == 0


def test_selection_keeps_lower_indices_on_ties_and_never_revives() -> None:
    scores = {"a": torch.tensor([1.0, 0.0, 1.0]), "b": torch.tensor([[1.0, 0.0]])}
    alive = {"a": torch.tensor([True, True, False]), "b": torch.ones(1, 2, dtype=torch.bool)}
    masks = keep_exactly(scores, alive, 3)
    assert masks["a"].tolist() == [True, True, False]
    assert masks["b"].tolist() == [[True, False]]


def test_round_counts() -> None:
    assert kept_by_round(1024, 0.75, 2, "exponential") == [512, 256]
    assert kept_by_round(1024, 0.75, 2, "linear") == [640, 256]


def test_synflow_rounds_are_monotone_and_exact() -> None:
    model = zoo.create("resnet20", seed=0)
    x = zoo.example_input(model)
    few = synflow_oracle(model, x, 0.9, rounds=2)
    last = synflow_oracle(model, x, 0.9, rounds=4)
    for run in (few, last):
        assert sum(int(m.sum()) for m in run.masks.values()) == run.kept[-1] == 27090
        assert run.log_totals == sorted(run.log_totals, reverse=True)
    assert len(last.kept) == 4


SMALL = {"layers": 2, "dim": 16, "heads": 2}
TRANSFORMERS = {
    "vit_b_16": {**SMALL, "image_size": 32},
    "gpt2": {**SMALL, "vocabulary": 50, "sequence": 6},
    "llama-tiny": {"sequence": 6},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_matrix_of_a_transformer_carries_paths(name: str) -> None:
    model = zoo.create(name, seed=0, **TRANSFORMERS[name])
    flow = path_oracle(model, zoo.example_input(model), p_net=1, norm="scale")
    assert len(flow.layers) >= 8
    for layer in flow.layers.values():
        assert bool((layer.gradient > 0).all())


def test_causal_attention_counts_by_hand() -> None:
    """Two tokens, one feature: token 0 sees itself, token 1 the mean of both."""
    q, k, v = (torch.tensor(pair)[None, None, :, None] for pair in ([1.0, 2.0], [10, 30], [5, 7]))
    out = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert out.flatten().tolist() == [1 + 10 + 5, 2 + 20 + 6]


def test_constants_count_by_magnitude_and_gates_add() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            table = -torch.tensor([0.5, 2.0])
            return self.up(x) * nn.functional.silu(self.gate(x)) * table

    assert path_oracle(Gate(), ONES3).total == (3 + 3) * 0.5 + (3 + 3) * 2.0
