"""`merge`: an adapter, its program, the card, and the run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_surgery.card.source_card import read_readme
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.source import Folder
from moe_surgery.checkpoint.staging import stale_partials
from moe_surgery.engine.fetch import Fetch, OnFetch, to_fetch
from moe_surgery.families import FAMILIES, AnyFamily, identify_model
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.selection.arguments import PathLike
from moe_surgery.surgery.compiler import DEFAULT_SHARD_SIZE
from moe_surgery.surgery.merge.adapter import SHARD, Adapter
from moe_surgery.surgery.merge.compiler import ADAPTER_KEY, MergeOptions, merge_program
from moe_surgery.surgery.names import SOURCE_README_NAME
from moe_surgery.surgery.preflight import check_output
from moe_surgery.surgery.program import Program
from moe_surgery.surgery.provenance import origin_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_surgery.surgery.run import Outcome

__all__ = ["MergeResult", "merge_adapter"]

log = logging.getLogger("moe_surgery")
LOST = 0.5
"""Of the update: a larger error of MXFP4 is worth a note."""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The result of `merge_adapter`. `outcome` is None for a dry run; `tensors` are the merged ones. `notes` and
    `stale`, `fetch` as in `PruneResult`."""

    out: Path
    program: Program
    outcome: Outcome | None
    tensors: tuple[str, ...]
    notes: tuple[str, ...]
    stale: tuple[Path, ...]
    fetch: Fetch | None = None

    @property
    def adapter(self) -> Mapping[str, object]:
        """The manifest's entry on the adapter: its name, digest and ranks."""
        entry = self.program.origin[ADAPTER_KEY]
        assert isinstance(entry, dict)
        return entry


def merge_adapter(
    adapter: PathLike | Folder,
    checkpoint: PathLike | Folder,
    out: PathLike,
    *,
    store: str = "keep",
    numbering: str = "auto",
    rank_order: str = "peft",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    dry_run: bool = False,
    overwrite: bool = False,
    ignore_free_space: bool = False,
    ignore_unlisted: bool = False,
    card: bool = True,
    base_model: str | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
    progress: OnProgress | None = None,
    on_fetch: OnFetch | None = None,
    ops: FileOps | None = None,
) -> MergeResult:
    """Write `checkpoint` with the LoRA `adapter` added to its weights as the new checkpoint folder `out`.

    `adapter` is the folder of a PEFT adapter (adapter_config.json and adapter_model.safetensors), or one on the
    hub. Weights become W + scale * B @ A, computed in float32 and rounded once to the weight's format: as
    PEFT's `merge_and_unload` of a model in float32. MXFP4 experts are packed again, each block with the scale of the
    least error of three (`store` "keep"), or stored otherwise: `store` is that of `prune`. Weights and experts that
    the adapter does not change keep their bytes.

    An adapter that was made for the model before it was pruned is merged through expert_mapping.json or the
    manifest; `numbering` "checkpoint" or "source" says whose expert numbers it has where that cannot be seen.
    `rank_order`: "peft", or "expert" for stacked expert adapters whose second factor holds the ranks of one expert
    next to each other.

    Other parameters, atomicity and errors are those of `prune`. What the adapter has and cannot be
    merged is an InvalidInputError that names it.
    """
    options = MergeOptions(numbering, rank_order)
    with (
        Adapter.open(adapter) as lora,
        Checkpoint.open(checkpoint, ignore_unlisted=ignore_unlisted, ops=ops) as opened,
    ):
        model = identify_model(opened, families)
        program, changes = merge_program(
            opened, model, lora, options, store=store, max_shard_size=max_shard_size
        )
        copied = program.copies.get(SOURCE_README_NAME)
        readme = read_readme(None if copied is None else opened.files.open(copied))
        origin = origin_of(opened, model, base_model=base_model, card_base_model=readme.base_model)
        program = replace(program, origin={**origin, **program.origin})
        if card:
            from moe_surgery.card.card import with_card

            program = with_card(program, model, readme)
        target = check_output(opened, out, overwrite=overwrite)
        log.info("reading %.2f GB from %d shards", program.bytes_read / 1e9, len(program.sources))
        fetch = to_fetch(program.shards, program.copies.values(), opened)
        outcome = None
        if not dry_run:
            from moe_surgery.surgery.run import run_program

            outcome = run_program(
                program,
                opened,
                target,
                overwrite=overwrite,
                ignore_free_space=ignore_free_space,
                progress=Counter(progress, "merge", program.nbytes, "bytes").advance,
                on_fetch=on_fetch,
                ops=ops,
                also={SHARD: lora.shard},
            )
    notes = [*model.notes]
    if changes.left_out:
        notes.append(
            f"{changes.left_out} updates of experts that were pruned are left out: the adapter was made for "
            f"{changes.numbering.experts} experts, the checkpoint has {model.experts}"
        )
    lost = outcome.conversion.get("update_error") if outcome and outcome.conversion else None
    if isinstance(lost, float) and lost > LOST:
        notes.append(
            f"MXFP4 is too coarse for this update: the error of packing is {lost:.2g} times what the adapter adds "
            "to the experts; `store` bf16 keeps it"
        )
    entry = program.origin[ADAPTER_KEY]
    assert isinstance(entry, dict)
    return MergeResult(
        target,
        program,
        outcome,
        tuple(entry["tensors"]),
        tuple(notes),
        tuple(stale_partials(target)),
        fetch,
    )
