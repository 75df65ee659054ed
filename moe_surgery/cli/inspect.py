"""moe-surgery inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import common, ignore_unlisted, terminal_of
from moe_surgery.cli.terminal import Terminal, count, size

if TYPE_CHECKING:
    from moe_surgery.surgery.gguf.inspect import GgufInspection
    from moe_surgery.surgery.inspect import Inspection

MAX_ROWS = 10
MAX_LISTED_SHARDS = 4


@click.command("inspect")
@click.argument("ckpt")
@click.option("--all-sizes", is_flag=True, help="Show every number of experts, not only some.")
@ignore_unlisted
@common
@click.pass_context
def command(context: click.Context, ckpt: str, all_sizes: bool, ignore_unlisted: bool) -> None:
    """Show a checkpoint, and its size with fewer experts.

    Reads headers only, so it is instant at any size, and fetches little of a model on the hub. The table
    shows the parameters that remain with n experts per layer, and the bytes they take in MXFP4, in BF16
    and in the checkpoint's own format (only in that one for models other than gpt-oss, whose experts are
    not converted). --json has every n.

    CKPT may be a GGUF file, the first one of a set, or one on the hub by its path or the end of its name:
    owner/name:Q4_K_M. The table then says for which numbers llama.cpp has a fused router ("fast"), and which the
    model's router cannot choose from.

    \b
    moe-surgery inspect example:tiny
    moe-surgery inspect openai/gpt-oss-20b --json
    moe-surgery inspect Model-Q4_K_M-00001-of-00003.gguf
    moe-surgery inspect unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M
    """
    from moe_surgery.pipeline.planning import inspect

    terminal = terminal_of(context)
    inspection = inspect(ckpt, ignore_unlisted=ignore_unlisted)
    if terminal.json:
        terminal.data(inspection.as_dict())
        return
    gguf = _gguf(inspection)
    _summary(terminal, inspection)
    if gguf:
        _gguf_summary(terminal, gguf)
    _sizes(terminal, inspection, all_sizes)
    if gguf and gguf.refusal:
        terminal.note(gguf.refusal)
    for note in inspection.notes:
        terminal.note(note)


def _summary(terminal: Terminal, inspection: Inspection) -> None:
    lines = {
        "checkpoint": inspection.path,
        "family": f"{inspection.family} ({inspection.model_type}, {inspection.layout} layout)",
        "experts": _experts(inspection),
        "parameters": f"{count(inspection.parameters)} total, {count(inspection.active_parameters)} active, "
        f"{count(inspection.parameters_per_expert)} per expert",
        "bytes": f"{size(inspection.nbytes)} in {inspection.tensors} tensors: "
        + ", ".join(f"{part} {size(nbytes)}" for part, nbytes in inspection.parts.items()),
        "dtypes": ", ".join(f"{dtype} {size(nbytes)}" for dtype, nbytes in inspection.dtypes.items()),
        "shards": _shards(inspection.shards),
    }
    for name, text in lines.items():
        terminal.result(f"{name:<11} {text}")


def _gguf(inspection: Inspection) -> GgufInspection | None:
    if inspection.layout != "GGUF":
        return None
    from moe_surgery.surgery.gguf.inspect import GgufInspection

    return inspection if isinstance(inspection, GgufInspection) else None


def _gguf_summary(terminal: Terminal, inspection: GgufInspection) -> None:
    types = "; ".join(
        f"{part} " + ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in by_type.items())
        for part, by_type in inspection.types.items()
    )
    lines = {
        "llama.cpp": f"architecture {inspection.architecture}, routing: {inspection.routing}",
        "types": types,
        "per expert": f"{size(inspection.bytes_per_expert)} over all layers",
    }
    if inspection.imatrix:
        lines["imatrix"] = ", ".join(f"{key} {value}" for key, value in inspection.imatrix.items())
    if inspection.pruned:
        lines["pruned from"] = (
            f"{inspection.pruned.get('source.name')}, which has {inspection.pruned.get('source.expert_count')} experts"
        )
    for name, text in lines.items():
        terminal.result(f"{name:<11} {text}")


def _router(inspection: GgufInspection, experts: int) -> str:
    """What llama.cpp's router makes of a number of experts."""
    if experts not in inspection.possible_counts:
        return "not possible"
    return "fast" if experts in inspection.fast_counts else ""


def _experts(inspection: Inspection) -> str:
    """The experts of the MoE layers, and which other layers there are."""
    groups = inspection.groups
    text = f"{inspection.experts} in each of {inspection.layers} layers, top-{inspection.top_k}, " + (
        f"from {groups[1]} of {groups[0]} groups, " if groups else ""
    )
    text += f"stored as {inspection.expert_format.label}"
    others = []
    if inspection.dense_layers:
        count = inspection.dense_layers
        others.append(f"{count} layer{' is' if count == 1 else 's are'} dense")
    if inspection.mtp_layers:
        others.append(f"{', '.join(inspection.mtp_layers)} for multi-token prediction besides")
    return "; ".join([text, *others])


def _shards(shards: dict[str, int]) -> str:
    if len(shards) > MAX_LISTED_SHARDS:
        return f"{len(shards)} files of {size(min(shards.values()))} to {size(max(shards.values()))}"
    return ", ".join(f"{name} ({size(nbytes)})" for name, nbytes in shards.items())


def _sizes(terminal: Terminal, inspection: Inspection, all_sizes: bool) -> None:
    step = 1
    while not all_sizes and inspection.experts > step * MAX_ROWS:
        step *= 2
    listed = [s for s in inspection.sizes if s.experts % step == 0 or s.experts == inspection.experts]
    gguf = _gguf(inspection)
    rows = [
        [
            str(s.experts),
            count(s.parameters),
            count(s.active_parameters),
            *(size(s.nbytes(f)) for f in inspection.formats),
            *((_router(gguf, s.experts),) if gguf else ()),
        ]
        for s in listed
    ]
    labels = ["this file's types"] if gguf else [f.label for f in inspection.formats]
    terminal.result("")
    headings = ["n", "parameters", "active", *labels, *(["llama.cpp router"] if gguf else [])]
    terminal.table("experts kept in each layer", headings, rows)
    for memory, fits in inspection.fits.items():
        most = ", ".join(f"{n or 'none'} in {label}" for label, n in zip(labels, fits.values(), strict=True))
        terminal.result(f"most experts whose weights fit {memory} GB: {most}")
