"""Cards taken apart by independent readers: huggingface_hub, PyYAML and markdown-it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import xxhash
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from safetensors import safe_open

from moe_surgery import Checkpoint, plan_keeping, plan_random
from moe_surgery.families import identify_model
from moe_surgery.families.identity import identity
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality
from moe_surgery.selection.plan import Plan, load_plan
from tests.support.checkpoints import Shape

ModelCard = pytest.importorskip("huggingface_hub").ModelCard


def metadata(card: str) -> dict[str, Any]:
    """The front matter, on which huggingface_hub and PyYAML must agree."""
    data = yaml.safe_load(card.split("---\n")[1])
    assert ModelCard(card).data.to_dict() == data
    return data


def tokens(card: str) -> list[Token]:
    """Markdown tokens of the body, inline ones in their place."""
    result: list[Token] = []
    for token in MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text):
        result += [token, *(token.children or [])]
    return result


def headings(card: str) -> list[str]:
    result = tokens(card)
    return [after.content for token, after in pairwise(result) if token.type == "heading_open"]


def cells(card: str) -> dict[str, list[str]]:
    """First cell -> the others, of every table row."""
    rows: list[list[str]] = []
    inside = False
    for token in tokens(card):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open", "td_close", "th_close"):
            inside = token.type.endswith("open")
        elif inside and token.type == "inline":
            rows[-1].append(token.content)
    return {row[0]: row[1:] for row in rows}


def spans(card: str) -> set[str]:
    return {token.content for token in tokens(card) if token.type == "code_inline"}


def blocks(card: str, language: str) -> list[str]:
    return [token.content for token in tokens(card) if token.type == "fence" and token.info == language]


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def counted(folder: Path, experts: int, top_k: int) -> tuple[int, int]:
    """Weights in all and for one token, from the shapes that the safetensors library reads."""
    total = active = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                size = 1
                for dimension in opened.get_slice(name).get_shape():
                    size *= dimension
                size = (
                    0
                    if name.endswith("_scales")
                    else size * 2
                    if name.endswith("_blocks") and _packed(opened, name)
                    else size
                )
                total += size
                active += size // experts * top_k if ".mlp.experts." in name else size
    return total, active


def _packed(opened: Any, name: str) -> bool:
    return bool(opened.get_slice(name).get_dtype() == "U8")


def quality(seed: int, layers: int, tokens: int = 100) -> Quality:
    return Quality(
        tokens, 1.0 + seed / 7, seed / 11, 1 - seed / 13, tuple(i / 17 + seed / 19 for i in range(layers))
    )


def evaluation_of(source: Path | str, plan: Plan, top_k: int, **changed: Any) -> Evaluation:
    """An evaluation, with made-up figures, of `plan` against the checkpoint `source`."""
    with Checkpoint.open(source) as opened:
        model = identify_model(opened)
        known = identity(opened, model)
    zero = Quality(100, 0.75, 0.0, 1.0, (0.0,) * model.layers)
    full = ModelResult(
        "full", "full", (model.experts,) * model.layers, model.top_k, {"law": zero, "code": zero}
    )
    experts = tuple(len(row) for row in plan.layers)
    domains = {"law": quality(1, model.layers, 300), "code": quality(2, model.layers)}
    actual = ModelResult("mine", "plan", experts, top_k, domains, plan.provenance)
    texts = {"law": [{"name": "law.txt", "xxh3_128": xxhash.xxh3_128_hexdigest(b""), "tokens": 300}]}
    parts: dict[str, Any] = {
        "model_type": model.model_type,
        "checkpoint": str(source),
        "identity": known,
        "num_experts": model.experts,
        "models": (full, actual),
        "texts": texts,
        "settings": {"dtype": "f32", "answers_only": False},
    }
    return Evaluation(**{**parts, **changed})


SHAPE = Shape(layers=3, experts=8, top_k=2)
README = b"""\
---
license: apache-2.0
language:
- en
- "no"
tags:
- vllm
---

# A model

## How to cite

As here:

```bibtex
@misc{model, title={A ``model''}}
```

# More
"""


def cut(model: ModelSpec) -> Plan:
    return plan_random(3, 5, model)


def keep_all(model: ModelSpec) -> Plan:
    return plan_keeping(None, model)


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def load_plan_of(out: Path) -> Plan:
    plan = out.parent / "plan.json"
    plan.write_text(json.dumps(json.loads((out / "surgery.json").read_text())["plan"]))
    return load_plan(plan)


SECTIONS = [
    "Numbers",
    "How the experts were chosen",
    "Kept experts",
    "Evaluation",
    "Limits",
    "Usage",
    "Verify and reproduce",
    "Licence",
    "Citation",
]
