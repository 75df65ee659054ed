"""config.json of the output: the source's, in its key order, with updated values."""

from __future__ import annotations

from moe_surgery.families.base import CatalogFamily, Role
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.formats.expert_format import ExpertFormat
from moe_surgery.selection.plan import Plan

__all__ = ["output_config"]

QUANTIZATION = "quantization_config"


def output_config(
    model: ModelSpec, plan: Plan, experts: int, top_k: int, expert_format: ExpertFormat
) -> dict[str, object]:
    """The configuration of `model` with `experts` experts, `top_k` of them active, stored as `expert_format`.

    Of a catalogue family only counts change, under all their names and in every place, and expert numbers
    in names of tensors.

    Keys keep their order. Every spelling of the two counts that the source uses is updated, and one
    that transformers reads is added if there is none; "quantization_config" is removed for a dense format
    and added for MXFP4; the key that ties the embeddings is false if the unembedding is stored.
    """
    if isinstance(model.family, CatalogFamily):
        from moe_surgery.families.catalog_config import COUNT_KEYS, MTP_KEYS, TOP_K_KEYS, with_counts
        from moe_surgery.surgery.expert_names import renumbered

        counts = {COUNT_KEYS: experts, TOP_K_KEYS: top_k}
        if plan.mtp_layers == ():
            counts[MTP_KEYS] = 0
        config = renumbered(with_counts(model.config, counts), model, plan)
        assert isinstance(config, dict)
        return config
    source = dict(model.config)
    config = model.layout.hub_config(source) if model.layout.hub_config else source
    family = model.described
    dimensions = family.dimensions
    for dimension, value in (("experts", experts), ("top_k", top_k)):
        key = dimensions[dimension]
        for name in (*key.keys, *key.unread):
            if name in config:
                config[name] = value
        if not any(name in config for name in key.keys):
            config = _inserted(config, key.keys[0], value)
    tied = family.tied_key
    if tied and config.get(tied) and any(t.role is Role.UNEMBEDDING for t in model.tensors):
        config[tied] = False  # transformers uses a stored unembedding anyway, other programs do not
    if not expert_format.packed:
        config.pop(QUANTIZATION, None)
    elif QUANTIZATION not in config:
        config = _inserted(config, QUANTIZATION, dict(family.quantization_config))
    return config


def _inserted(config: dict[str, object], key: str, value: object) -> dict[str, object]:
    """`config` with `key` inserted in alphabetical order, as transformers writes it."""
    before = {k: v for k, v in config.items() if k < key}
    after = {k: v for k, v in config.items() if k > key}
    if [*before, *after] != list(config):  # not sorted: keep the order
        return {**config, key: value}
    return {**before, key: value, **after}
