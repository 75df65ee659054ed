"""The model card: README.md of a pruned checkpoint, with the metadata that the hub reads.

A card does not depend on the date, the machine or the folder's name: the same program gives the same
card. Everything that comes from other people's files is escaped (`card.text`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_surgery.card.facts import Facts, facts_of_checkpoint, facts_of_program
from moe_surgery.card.method import method_section, plan_section, reproduce
from moe_surgery.card.quality import quality_section
from moe_surgery.card.repair import repair_section
from moe_surgery.card.source_card import SourceCard
from moe_surgery.card.text import code, count, counted, fenced, heading, scalar, size, table
from moe_surgery.card.usage import limits_section, usage_section
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.errors import OutputError, UsageError
from moe_surgery.families import FAMILIES, AnyFamily, identify_model
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.formats.expert_format import ExpertFormat
from moe_surgery.surgery.manifest import load_manifest
from moe_surgery.surgery.names import MANIFEST_NAME, README_NAME, SOURCE_README_NAME
from moe_surgery.surgery.program import Program
from moe_surgery.surgery.provenance import checked_base_model

if TYPE_CHECKING:
    from moe_surgery.quality.evaluation import Evaluation
    from moe_surgery.selection.arguments import PathLike

__all__ = ["make_card", "with_card"]

_UNKNOWN = "not recorded"


def with_card(program: Program, model: ModelSpec, readme: SourceCard) -> Program:
    """`program`, whose origin is filled in, with a model card as README.md.

    `model` describes the source, `readme` is the source's card.
    """
    text = _card(facts_of_program(program, model, readme), None)
    return replace(program, texts={**program.texts, README_NAME: text.encode()})


def make_card(
    out: str | os.PathLike[str],
    *,
    evaluation: Evaluation | PathLike | None = None,
    base_model: str | None = None,
    license: str | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
) -> str:
    """The card of the pruned checkpoint folder `out`, from its manifest and headers.

    `evaluation` (or the path of its file) adds its figures; `base_model` (a hub id) and `license` (an
    identifier such as "apache-2.0") override the source's. Without any of them it is the card that
    `prune` wrote. `families` are the model families to recognise.

    Raises OutputError if `out` is not a folder or has no manifest, PlanMismatchError for an
    evaluation of another model, UsageError for an invalid base_model or license, and any error of
    opening the checkpoint.
    """
    if evaluation is not None:
        from moe_surgery.quality.evaluation import as_evaluation

        evaluation = as_evaluation(evaluation)
    folder = resolve(out)
    if not folder.is_dir():
        raise OutputError(f"{printable_path(folder)}: is a file; pass the checkpoint's folder")
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        raise OutputError(
            f"{printable_path(path)}: not found; cards can only be made for checkpoints written by moe-surgery"
        )
    manifest = load_manifest(path)
    if base_model is not None:
        option = {"base_model": checked_base_model(base_model), "base_model_from": "option"}
        manifest = replace(manifest, origin={**manifest.origin, **option})
    if license is not None:
        from moe_surgery.card.front_matter import is_license

        if not is_license(license):
            raise UsageError(f"`license` {license}: is not a licence identifier such as apache-2.0")
    with Checkpoint.open(folder) as checkpoint:
        model = identify_model(checkpoint, families)
        facts = facts_of_checkpoint(Path(folder), checkpoint, model, manifest)
    if license is not None:
        card = replace(facts.card, license=license, license_name=None, license_link=None)
        facts = replace(facts, card=card, license_given=True)
    return _card(facts, evaluation)


def _card(facts: Facts, evaluation: Evaluation | None) -> str:
    sections = [
        ("", _summary(facts)),
        ("Numbers", _numbers(facts)),
        ("How the experts were chosen", method_section(facts)),
        ("Kept experts", plan_section(facts.plan)),
        *([("Repair", repair_section(facts))] if facts.repair else []),
        ("Evaluation", quality_section(evaluation, facts)),
        ("Limits", limits_section(facts, evaluation is not None)),
        ("Usage", usage_section(facts)),
        ("Verify and reproduce", _reproduce(facts)),
        ("Licence", _licence(facts)),
    ]
    if facts.card.citation is not None:
        language = "bibtex" if facts.card.citation.lstrip().startswith("@") else ""
        sections.append(("Citation", f"For the source model:\n\n{fenced(facts.card.citation, language)}"))
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections)
    return f"---\n{_metadata(facts)}\n---\n\n# {_title(facts)}\n\n{body}\n"


def _title(facts: Facts) -> str:
    kept = counted(facts.kept, "expert")
    if facts.adapter is not None:
        return f"{heading(facts.source_name)} with {heading(str(facts.adapter.get('name')))} merged"
    if facts.whole:
        return f"{heading(facts.source_name)}, all {kept}, {facts.expert_format.label}"
    return f"{heading(facts.source_name)} with {facts.kept} of {counted(facts.source.experts, 'expert')}"


def _metadata(facts: Facts) -> str:
    """The front matter; values are checked ids, or quoted."""
    card = facts.card
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if facts.base_model is not None:
        # The hub has adapter, finetune, merge and quantized; pruning is closest to finetune.
        relation = "quantized" if facts.converted and facts.expert_format.packed else "finetune"
        lines += [f"base_model: {scalar(facts.base_model)}", f"base_model_relation: {relation}"]
    for key in ("license", "license_name", "license_link"):
        value = getattr(card, key)
        if value is not None:
            lines.append(f"{key}: {scalar(value)}")
    if card.languages:
        lines += ["language:", *(f"- {scalar(language)}" for language in card.languages)]
    tags = ["moe-surgery", "mixture-of-experts", *([] if facts.whole else ["pruned"]), facts.model_type]
    return "\n".join([*lines, "tags:", *(f"- {scalar(tag)}" for tag in tags)])


def _summary(facts: Facts) -> str:
    trained = "nothing was trained"
    if facts.adapter is not None:
        first = f"{_source(facts)} with {_adapter(facts.adapter)} merged into its weights by moe-surgery."
        trained = "nothing else was trained"
    elif facts.whole:
        first = f"{_source(facts)} with all of its experts, rewritten by moe-surgery."
    else:
        first = (
            f"A pruned version of {_source(facts)}: each of its {counted(facts.layers, facts.layer_name)} keeps "
            f"{facts.kept} of {counted(facts.source.experts, 'expert')}; the others are removed from the "
            "weights and from the router."
        )
    here, source = facts.expert_format, facts.source.expert_format
    trained = "small tensors were repaired (see below)" if facts.repair else "nothing was trained"
    if source is not None and here.can_represent(source) and facts.converted:
        way = f"from {source.label} to {here.label}"
        second = f"Expert weights were converted {way}, which is lossless; {trained}."
    elif source is not None and facts.converted and here.packed:
        second = (
            f"Expert weights were converted from {source.label} to MXFP4 (`conversion` in `surgery.json` has the "
            f"error); {trained}."
        )
    elif source is not None and facts.converted:
        second = (
            f"Expert weights were rounded from {source.label} to {here.label}, to nearest (ties to even); "
            f"{trained}."
        )
    elif facts.repair:
        second = (
            "The weights of the kept experts are those of the source, byte for byte; small tensors around them were "
            "repaired (see below)."
        )
    elif facts.adapter is not None:
        second = "All other weights are those of the source, byte for byte."
    elif source is None:
        second = "Nothing was trained."
    else:
        second = "The kept weights are those of the source, byte for byte."
    return f"{first} {second}"


def _adapter(adapter: Mapping[str, object]) -> str:
    """The adapter with its rank, and where it is known the model that it was trained on."""
    ranks, base = adapter.get("ranks"), adapter.get("base_model")
    listed = [r for r in ranks if type(r) is int] if isinstance(ranks, list) else []
    rank = f" of rank {' and '.join(map(str, listed[:4]))}" if listed else ""
    trained = f", trained on {code(base)}," if isinstance(base, str) else ""
    return f"the LoRA adapter {code(str(adapter.get('name')))}{rank}{trained}"


def _bits(expert_format: ExpertFormat) -> str:
    """The format's name, with bits per weight if packed."""
    bits = expert_format.block_bytes * 8 / expert_format.block_values
    return (
        f"{expert_format.label} ({bits:g} bits per weight)" if expert_format.packed else expert_format.label
    )


def _source(facts: Facts) -> str:
    """The source's name for readers, and where that name comes from."""
    name, base = facts.recorded("name"), facts.base_model
    if facts.source_id is not None:
        revision = facts.recorded("revision")
        return code(facts.source_id) + (f" (revision {code(revision)})" if revision else "")
    if base is None:
        return code(name or "model")
    where = "config.json" if facts.recorded("base_model_from") == "config" else "model card"
    return f"{code(name or 'model')} (its {where} names {code(base)})"


def _numbers(facts: Facts) -> str:
    this, source = facts.this, facts.source

    def row(name: str, show: object, ours: object, of_source: object) -> list[str]:
        assert callable(show)
        return [name, *(_UNKNOWN if value is None else show(value) for value in (ours, of_source))]

    def of(show: object, name: str, field: str) -> list[str]:
        return row(name, show, getattr(this, field), getattr(source, field))

    rows = [
        of(str, "experts per layer", "experts"),
        of(str, "experts per token (top-k)", "top_k"),
        row(f"{facts.layer_name}s", str, facts.layers, facts.layers),
        of(count, "parameters", "parameters"),
        of(count, "active parameters", "active_parameters"),
        of(_bits, "expert weights", "expert_format"),
        row("other weights", ", ".join, facts.dense_dtypes, facts.dense_dtypes),
        of(size, "weight files", "nbytes"),
    ]
    return table(["", "this model", "source"], rows)


def _reproduce(facts: Facts) -> str:
    return (
        f"Written by {code(facts.tool)}. `surgery.json` holds the digest of every file and tensor, and "
        f"`moe-surgery verify` detects a single flipped byte:\n\n{fenced('moe-surgery verify .', 'sh')}\n\n"
        f"{reproduce(facts)}"
    )


def _licence(facts: Facts) -> str:
    card = facts.card
    named = code(card.license_name or card.license) if card.license else None
    if facts.license_given:
        parts = [f"{named}, as given when this card was made."]
    elif named:
        parts = [f"{named}, according to the source's model card."]
    else:
        parts = ["The source's model card does not name a licence."]
    if facts.terms:
        listed = ", ".join(code(name) for name in facts.terms)
        parts.append(f"The source's terms are included: {listed}.")
    parts.append("Removing experts does not change the rights you have.")
    if facts.has_source_card:
        parts.append(f"Its model card is kept as `{SOURCE_README_NAME}`.")
    return " ".join(parts)
