"""A family built like gpt-oss whose names, model type and config keys are others is data alone."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_surgery import Checkpoint, load_model, plan_keeping
from moe_surgery.families import FAMILIES, describe
from moe_surgery.families.base import ConfigKey, Family
from moe_surgery.families.gpt_oss import GPT_OSS
from moe_surgery.families.gpt_oss.tensors import tensors
from moe_surgery.surgery.compiler import compile_program
from moe_surgery.surgery.inspect import inspect_checkpoint
from moe_surgery.surgery.preflight import check_output
from moe_surgery.surgery.run import run_program
from tests.support.checkpoints import Shape, load_tensors, make_config, make_tensors, write_folder

SHAPE = Shape()
RENAMED = {
    "model.layers": "decoder.blocks",
    "self_attn": "mixer",
    "mlp.router": "moe.gate",
    "mlp.experts": "moe.bank",
    "gate_up_proj": "w13",
    "down_proj": "w2",
    "embed_tokens": "wte",
    "input_layernorm": "ln_1",
    "lm_head": "output",
}


def renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def renamed_all(names: Any) -> Any:
    if not is_dataclass(names):
        return renamed(names)
    return replace(names, **{f.name: renamed_all(getattr(names, f.name)) for f in fields(names)})  # type: ignore[type-var]


def other_key(key: ConfigKey) -> ConfigKey:
    return replace(key, keys=tuple(f"x_{k}" for k in key.keys), unread=())


WEIGHTS = renamed_all(GPT_OSS.weights)
PRETEND: Family = replace(
    GPT_OSS,
    model_type="pretend",
    title="pretend",
    weights=WEIGHTS,
    tensors=tensors(WEIGHTS),
    layouts=GPT_OSS.layouts[:1],
    dimensions={k: other_key(v) for k, v in GPT_OSS.dimensions.items()},
    config_keys={k: other_key(v) for k, v in GPT_OSS.config_keys.items()},
)
KNOWN = (*FAMILIES, PRETEND)


def write_both(folder: Path) -> tuple[Path, Path]:
    values, config = make_tensors(SHAPE, "mxfp4", scales=(121, 124)), make_config(SHAPE, "mxfp4")
    config |= {"rms_norm_eps": 1e-3, "swiglu_limit": 3.0, "sliding_window": 3, "rope_theta": 1234.0}
    keys = {k for d in (GPT_OSS.dimensions, GPT_OSS.config_keys) for key in d.values() for k in key.keys}
    other = {f"x_{k}" if k in keys else k: v for k, v in config.items()} | {"model_type": "pretend"}
    ours = write_folder(folder / "ours", values, config)
    return ours, write_folder(folder / "pretend", {renamed(k): v for k, v in values.items()}, other)


def logits(path: Path) -> torch.Tensor:
    model = load_model(path, backend="reference", dtype=torch.float32, families=KNOWN)
    cache = model.new_cache(1, 12)
    return model(torch.arange(9)[None], cache)


def test_it_is_inspected_pruned_and_run(tmp_path: Path) -> None:
    sources = write_both(tmp_path)
    outs = []
    for source in sources:
        with Checkpoint.open(source) as opened:
            model = describe(opened, KNOWN)
            assert inspect_checkpoint(opened, model).experts == SHAPE.experts
            program = compile_program(opened, model, plan_keeping([3, 1, 0], model))
            outs.append(tmp_path / f"{source.name}-3")
            run_program(program, opened, check_output(opened, outs[-1], overwrite=False))
    assert json.loads((outs[1] / "config.json").read_text())["x_num_local_experts"] == 3
    ours, theirs = map(load_tensors, outs)
    assert sorted(map(renamed, ours)) == sorted(theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(theirs[renamed(name)], value)
    for a, b in (sources, outs):
        assert torch.equal(logits(a), logits(b))
