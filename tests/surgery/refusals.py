"""Checks that pruning is refused, and edits that make a checkpoint malformed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import (
    INDEX,
    Tensors,
    load_tensors,
)
from tests.support.command import call, contents

Capture = pytest.CaptureFixture[str]

ROUTER = "model.layers.1.mlp.router.weight"
BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
SCALES = "model.layers.0.mlp.experts.down_proj_scales"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refused(
    capsys: Capture, code: int, *why: str, source: Path, options: tuple[str | Path, ...] = ()
) -> None:
    """Pruning `source` exits with `code` and one line that contains each of `why`, and changes no file."""
    before = contents(source.parent)
    names = sorted(os.listdir(source.parent))
    ended = call(capsys, "prune", source, source.parent / "out", *(options or ("--keep", "0,1")))
    assert ended.code == code, ended.err
    for part in why:
        assert part in ended.error
    assert ended.error.startswith("moe-surgery: ")
    assert ended.error.isprintable()
    assert ended.out == ""
    assert sorted(os.listdir(source.parent)) == names
    assert contents(source.parent) == before


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def home(source: Path, tensor: str) -> str:
    """The shard that holds `tensor`."""
    name = json.loads((source / INDEX).read_bytes())["weight_map"][tensor]
    assert isinstance(name, str)
    return name


def other(shard: str) -> str:
    return SECOND if shard == FIRST else FIRST


def shard_tensors(source: Path, shard: str) -> Tensors:
    names_of_shard = {
        n for n, s in json.loads((source / INDEX).read_bytes())["weight_map"].items() if s == shard
    }
    return {n: t for n, t in load_tensors(source).items() if n in names_of_shard}
