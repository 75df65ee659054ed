"""config.json of the output: the source's, in its key order, with what surgery changes changed."""

from __future__ import annotations

from moe_surgery.families.model import Model
from moe_surgery.formats.expert_format import ExpertFormat

__all__ = ["output_config"]

QUANTIZATION = "quantization_config"


def output_config(model: Model, experts: int, top_k: int, expert_format: ExpertFormat) -> dict[str, object]:
    """The configuration of `model` with `experts` experts, `top_k` of them active, stored as `expert_format`.

    Keys keep their order. Every spelling of the two counts that the source uses is changed;
    "quantization_config" leaves with a dense format and enters with MXFP4.
    """
    source = dict(model.config)
    config = model.layout.hub_config(source) if model.layout.hub_config else source
    dimensions = model.family.dimensions
    for dimension, value in (("experts", experts), ("top_k", top_k)):
        for key in dimensions[dimension].keys:
            if key in config:
                config[key] = value
    if not expert_format.packed:
        config.pop(QUANTIZATION, None)
    elif QUANTIZATION not in config:
        config = _inserted(config, QUANTIZATION, dict(model.family.quantization_config))
    return config


def _inserted(config: dict[str, object], key: str, value: object) -> dict[str, object]:
    """`config` with `key` in its alphabetical place, where the hub's writers put it."""
    before = {k: v for k, v in config.items() if k < key}
    after = {k: v for k, v in config.items() if k > key}
    if [*before, *after] != list(config):  # not sorted: leave the order alone
        return {**config, key: value}
    return {**before, key: value, **after}
