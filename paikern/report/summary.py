"""The facts of a run as plain numbers, for `summary.json` and for other programs."""

from __future__ import annotations

import math
from typing import Any

from paikern.analysis import Topology
from paikern.masks import MaskSet
from paikern.version import __version__

SCHEMA_VERSION = 1


def summarize(masks: MaskSet, topology: Topology | None = None) -> dict[str, Any]:
    """Counts, provenance and, with `topology`, path statistics; a row a layer.

    Of masks by channels the fraction of the outputs that is removed, too: "node_sparsity".

    Args:
        masks: from `pk.prune` or a file.
        topology: of the masked model; None leaves the path statistics out.

    >>> import torch
    >>> masks = MaskSet.from_bool({"fc.weight": torch.tensor([[True, False]])})
    >>> found = summarize(masks)
    >>> found["kept"], found["total"], found["layers"]
    (1, 2, [{'name': 'fc.weight', 'shape': [1, 2], 'kept': 1, 'total': 2}])
    """
    about = {key: value for key, value in masks.metadata.items() if key != "history"}
    shapes, kept = masks.shapes, masks.kept_by_layer
    layers: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": list(shapes[name]),
            "kept": kept[name],
            "total": math.prod(shapes[name]),
        }
        for name in masks
    ]
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "paikern_version": __version__,
        "method": about.get("method"),
        "kept": masks.kept,
        "total": masks.total,
        "sparsity": masks.sparsity,
        **({"node_sparsity": masks.node_sparsity} if masks.channels else {}),
        "digest": masks.digest,
        "provenance": about,
        "layers": layers,
    }
    if topology is not None:
        found |= path_statistics(topology)
        by_name = {layer.name: layer for layer in topology.layers}
        for row in layers:
            layer = by_name.get(row["name"])
            if layer is not None:
                row |= {
                    "effective_nodes": layer.effective_nodes,
                    "nodes": layer.nodes,
                    "effective_kernels": layer.effective_kernels,
                    "kernels": layer.kernels,
                    "effective_params": layer.effective_params,
                    "dead": layer.dead,
                    "dead_channels": list(layer.dead_channels),
                }
    return found


def path_statistics(topology: Topology) -> dict[str, Any]:
    """The totals of a `Topology`, beside the number there is of each."""
    return {
        "log_paths": topology.log_paths,
        "effective_nodes": topology.effective_nodes,
        "nodes": sum(layer.nodes for layer in topology.layers),
        "effective_kernels": topology.effective_kernels,
        "kernels": sum(layer.kernels for layer in topology.layers),
        "effective_params": topology.effective_params,
        "dead_layers": [layer.name for layer in topology.layers if layer.dead],
    }
