"""What the quality study runs: the networks, how they are trained, and every way of pruning them.

A way is a method of `pk.methods()`, or of `pk.pruner` where it prunes during training, with its
options. Its family decides how it is run and in which tables it stands.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

SPARSITIES = (0.9, 0.95, 0.98, 0.99)
#: Variants of a method beside its defaults, where they differ most.
FAR = (0.98, 0.99)
SEEDS = (0, 1, 2)
#: Samples of each digit that methods with data read.
SAMPLES_PER_CLASS = 10
#: A training run is told to a `pk.pruner` in so many parts, as so many epochs.
PARTS = 20
DENSE = "dense"


class Net(NamedTuple):
    """A network of the zoo and how it is trained (SGD with momentum, one cycle)."""

    zoo: str
    options: dict[str, Any]
    image_size: int
    epochs: int
    batch: int
    learning_rate: float
    norms: bool = True


#: The epochs are those that let the whole study end within two hours on two cores: a run takes
#: 2.8 s, 10 s and 5.3 s on an AMD EPYC, and there are 1,377.
NETS = {
    "lenet300": Net("lenet300", {}, 28, 20, 100, 0.1, norms=False),
    "resnet20": Net("resnet20", {"in_channels": 1, "image_size": 16}, 16, 3, 100, 0.1),
    "vgg16_bn/8": Net(
        "vgg16_bn",
        {"in_channels": 1, "image_size": 16, "num_classes": 10, "width": 0.125},
        16, 6, 100, 0.1,
    ),
}  # fmt: skip

NO_DATA, DATA, STRUCTURED, TRAINING = "no data", "data", "structured", "training"
FAMILIES = {
    NO_DATA: "at initialisation, without data",
    DATA: "at initialisation, with data",
    STRUCTURED: "structured",
    TRAINING: "during training",
}


class Way(NamedTuple):
    """A method and its options; `structured` where it removes channels."""

    family: str
    method: str
    options: dict[str, Any]
    sparsities: tuple[float, ...] = SPARSITIES
    needs_norms: bool = False
    structured: bool = False

    def at(self, sparsity: float) -> bool:
        """Whether it is run: a variant only where the study has it, or where nothing has."""
        return sparsity in self.sparsities or sparsity not in SPARSITIES

    @property
    def settings(self) -> str:
        """What a row depends on, as one line of a results file."""
        return json.dumps([self.method, self.options], sort_keys=True, default=str)


def _no_data(method: str, *sparsities: float, **options: Any) -> Way:
    return Way(NO_DATA, method, options, sparsities or SPARSITIES)


def _data(method: str, **options: Any) -> Way:
    return Way(DATA, method, options)


def _structured(method: str, needs_norms: bool = False, **options: Any) -> Way:
    options = {"target": "weights", **options}
    return Way(STRUCTURED, method, options, needs_norms=needs_norms, structured=True)


def _training(
    method: str, needs_norms: bool = False, structured: bool = False, **options: Any
) -> Way:
    return Way(TRAINING, method, options, needs_norms=needs_norms, structured=structured)


_ON_WEIGHTS = {"target": "weights"}

#: name in the tables -> what it is
WAYS: dict[str, Way] = {
    "random": _no_data("random", scope="erk"),
    "random_u": _no_data("random_u"),
    "magnitude": _no_data("magnitude"),
    "synflow": _no_data("synflow"),
    "synflow_l2": _no_data("synflow_l2"),
    "logsynflow": _no_data("logsynflow"),
    "npb": _no_data("npb"),
    "npb, few": _no_data("npb", *FAR, outputs="few"),
    "phew": _no_data("phew"),
    "dpai": _no_data("dpai"),
    "dpai, alpha 0": _no_data("dpai", *FAR, alpha=0.0),
    "dpai, adam": _no_data("dpai", *FAR, variant="published"),
    "dpai, revive": _no_data("dpai", *FAR, revive=True),
    "dpai, keep_nodes": _no_data("dpai", *FAR, keep_nodes=True),
    "dpai, keep_nodes, alpha 0": _no_data("dpai", *FAR, keep_nodes=True, alpha=0.0),
    "px": _data("px"),
    "wanda": _data("wanda"),
    "snip": _data("snip"),
    "itersnip": _data("itersnip"),
    "force": _data("force"),
    "grasp": _data("grasp"),
    "grasp_it": _data("grasp_it"),
    "crop": _data("crop"),
    "cropit": _data("cropit"),
    "prospr": _data("prospr"),
    "ntk_sap": _data("ntk_sap"),
    "random_s": _structured("random_s"),
    "l1_filters": _structured("l1_filters"),
    "snap": _structured("snap"),
    "crop_s": _structured("crop_s"),
    "cropit_s": _structured("cropit_s"),
    "prospr_s": _structured("prospr_s"),
    "gate_decorators": _structured("gate_decorators", needs_norms=True),
    "earlycrop_u": _training("earlycrop_u"),
    "earlycrop_s": _training("earlycrop_s", structured=True, method_options=_ON_WEIGHTS),
    "earlybird_ticket": _training(
        "earlybird_ticket", needs_norms=True, structured=True, method_options=_ON_WEIGHTS
    ),
    "gate_decorators, ticks": _training(
        "gate_decorators", needs_norms=True, structured=True, ticks=3, target="weights"
    ),
    "imp": _training("imp", levels=2),
    "ltr": _training("ltr", levels=2, rewind=2, unit="epoch"),
    # The last update leaves two parts of the training to recover, and 99 % needs a steep sigmoid.
    "asni": _training("asni", gamma=0.075 * PARTS, last_update=PARTS - 2),
}
#: Networks that are trained with the masks of an `asni` run, each in a row of its own.
ASNI_FORMS = {
    "asni": "trained while it is pruned",
    "asni, centroids": "trained again from two centroids a layer",
    "asni, original init": "trained again from the weights that it had first",
}

#: Networks of the comparison that are pruned and counted, but not trained: name -> sparsities.
COUNTED: dict[str, tuple[float, ...]] = {"vgg19_bn": (0.98,), "resnet18@64": (0.98,)}
COUNTED_WAYS = tuple(
    name for name, way in WAYS.items() if way.family == NO_DATA and name != "dpai, adam"
)

#: The sweep of the node-path plane: name -> options, on ResNet-20 at 98 %.
SWEEP_SPARSITY = 0.98
SWEEP: dict[str, dict[str, Any]] = {
    **{
        f"{optimizer}{', keep_nodes' if keep else ''}, alpha {alpha:g}, beta {beta:g}": {
            "optimizer": optimizer, "keep_nodes": keep, "alpha": alpha, "beta": beta,
            "steps": 300 if optimizer == "ascent" else 1000,
        }
        for optimizer in ("ascent", "adam")
        for keep in (False, True)
        for alpha in (0.0, 0.5, 0.9, 0.99)
        for beta in ((0.0, 0.5, 1.0) if alpha else (0.5,))
    },
}  # fmt: skip


def fits(net: str, way: str) -> bool:
    """Whether the way can be run on this network: methods of batch norm need some."""
    return NETS[net].norms or not WAYS[way].needs_norms


def rows_of(way: str) -> tuple[str, ...]:
    """The names of the rows that one run of a way gives."""
    return tuple(ASNI_FORMS) if way == "asni" else (way,)


def row_names() -> list[str]:
    """Every name that a row can have, in the order of the tables."""
    return [row for way in WAYS for row in rows_of(way)]


def way_of(row_name: str) -> Way:
    return WAYS[row_name.partition(",")[0] if row_name in ASNI_FORMS else row_name]
