"""The `sweep` job: plans, costs, variants made and verified one after another or by workers, and the index."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.resolve import is_gguf
from moe_surgery.checkpoint.staging import output_lock, stale_partials
from moe_surgery.engine.output import check_space
from moe_surgery.errors import OutputError, PlanMismatchError, UsageError, VerificationError
from moe_surgery.families import identify_model
from moe_surgery.families.identity import identity
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.pipeline.sweep.costs import Costs, costs_of
from moe_surgery.pipeline.sweep.figures import add_figures
from moe_surgery.pipeline.sweep.index_page import write_pages
from moe_surgery.pipeline.sweep.make import (
    Job,
    Layout,
    is_result,
    make_variant,
    manifest_digest,
    manifest_of,
    program_of,
    shared_files,
)
from moe_surgery.pipeline.sweep.state import INDEX_JSON, Entry, State, load_state, save_state
from moe_surgery.pipeline.sweep.variants import Variant, named_rankings, variants_of
from moe_surgery.progress import OnProgress, Progress
from moe_surgery.selection.arguments import Named, PathLike
from moe_surgery.selection.ranking import Ranking
from moe_surgery.surgery.compiler import DEFAULT_SHARD_SIZE
from moe_surgery.surgery.names import MANIFEST_NAME
from moe_surgery.surgery.preflight import check_folder_of_outputs
from moe_surgery.surgery.program import SourceFile
from moe_surgery.surgery.verify import verify_checkpoint
from moe_surgery.workers import Workers, everywhere

__all__ = ["SweepResult", "sweep"]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """`costs` as they were before the run, `made` and `verified` the names of variants of this run, `entries` all
    variants that the index of the folder lists. A dry run makes and verifies none. `stale` are partial folders that
    another plan for a variant left, untouched."""

    out: Path
    costs: Costs
    variants: tuple[Variant, ...]
    made: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()
    stale: tuple[Path, ...] = ()


def sweep(
    checkpoint: PathLike,
    out: PathLike,
    rankings: Named[Ranking],
    experts: Iterable[int],
    *,
    store: str = "keep",
    order: str = "ascending",
    max_shard_size: int | None = None,
    mtp: str | None = None,
    base_model: str | None = None,
    share: bool = True,
    evaluations: Iterable[PathLike] = (),
    dry_run: bool = False,
    ignore_free_space: bool = False,
    ignore_unlisted: bool = False,
    on_costs: Callable[[SweepResult], None] | None = None,
    workers: Workers | None = None,
    progress: OnProgress | None = None,
    ops: FileOps | None = None,
) -> SweepResult:
    """Prune `checkpoint` by every ranking to every number of `experts`, each into a folder of its own in `out`.

    `rankings` are paths (of what `load_ranking` reads) or (name, ranking) pairs. The variant of `law.json` with 8
    experts is the checkpoint folder `out`/law-8: with a card, and verified. `store`, `order` of the experts,
    `max_shard_size`, `mtp` and `base_model` are as for `prune` and plans, but tensors that do not count experts lie in
    shards of their own. Those are written once; with `share` the other variants get them as reflinks, or as hard
    links, which are read-only. `workers` do several variants at a time; they must see `checkpoint` and `out` under the
    same paths.

    `out` also gets index.html, index.md and index.json: all variants with sizes and, where an evaluation is found
    (the files `evaluations` and those that lie in `out`), figures. Other sweeps of the same checkpoint may use the
    same folder; the index lists the variants of all.

    `dry_run` only computes the costs; `on_costs` is called with them before anything is written. `progress` is called
    with stage "sweep", in bytes of variants made and verified. The same call after an interruption makes what is
    missing, finishes what was begun, and verifies what was not.

    Raises UsageError, PlanMismatchError and InvalidInputError for arguments that do not fit, before anything is
    written; OutputError where a folder that is in the way holds anything else, DiskFullError where all together does
    not fit, VerificationError where a variant is damaged.
    """
    ops = ops or FileOps()
    if is_gguf(checkpoint):
        raise UsageError(
            f"{checkpoint}: is a GGUF file; sweep writes checkpoint folders, use prune for GGUF files"
        )
    shard_size = DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size
    layout = Layout(store, shard_size, mtp, base_model, ignore_unlisted, ignore_free_space, share)
    named = named_rankings(rankings)
    with Checkpoint.open(checkpoint, ignore_unlisted=ignore_unlisted, ops=ops) as opened:
        if opened.files.on_disk is None:
            raise UsageError(
                f"{checkpoint}: is not on this machine, and every variant would fetch it again; "
                f"first run hf download {checkpoint}"
            )
        model = identify_model(opened)
        variants = variants_of(model, str(checkpoint), named, tuple(experts), order=order, store=store)
        folder = check_folder_of_outputs(opened, out)
        run = _Sweep(str(checkpoint), opened, model, folder, variants, layout, ops, progress)
        planned = SweepResult(folder, run.costs, tuple(variants))
        if dry_run:
            return planned
        if on_costs is not None:
            on_costs(planned)
        with _locked(folder, ops):
            if not ignore_free_space:
                check_space(run.costs.needed, folder, folder, ops)
            run.execute(workers)
            add_figures(run.state, folder, evaluations)
            run.state.sort()
            save_state(run.state, folder, ops)
            write_pages(run.state, folder, ops)
    entries = tuple(run.state.variants.values())
    stale = tuple(p for v in variants for p in stale_partials(folder / v.name))
    return replace(planned, made=tuple(run.made), verified=tuple(run.verified), entries=entries, stale=stale)


class _Sweep:
    """The variants of one run and how far they are."""

    def __init__(
        self,
        checkpoint: str,
        opened: Checkpoint,
        model: ModelSpec,
        folder: Path,
        variants: Sequence[Variant],
        layout: Layout,
        ops: FileOps,
        progress: OnProgress | None,
    ) -> None:
        self._checkpoint, self._model, self._folder = checkpoint, model, folder
        self._variants, self._layout, self._ops = variants, layout, ops
        self.state, self._source_changed = _state_in(folder, opened, model)
        sources = tuple(SourceFile(n, s.nbytes, s.header.digest) for n, s in sorted(opened.shards.items()))
        self._there = {v.name for v in variants if is_result(folder / v.name, v.plan, sources, layout)}
        # With which the others share their dense shards: of this sweep or, verified, of an earlier one.
        known = [*sorted(self._there), *(n for n in self.state.variants if self._is_recorded(n))]
        self._donor = _donor(opened, variants, layout, [folder / name for name in known])
        self.costs = costs_of(
            opened,
            variants,
            layout,
            self._there,
            share=layout.separate_dense,
            donor=self._donor is not None,
            free=ops.free_bytes(folder if folder.is_dir() else folder.parent),
        )
        self.made: list[str] = []
        self.verified: list[str] = []
        self._progress = progress
        self._total = sum(map(self._nbytes, variants))
        self._done = self._finished = self._reported = 0

    def execute(self, workers: Workers | None) -> None:
        """Make and verify what is not yet."""
        self._check_source()
        todo = [v for v in self._variants if not self._is_verified(v)]
        self._finished = len(self._variants) - len(todo)
        self._done = self._total - sum(map(self._nbytes, todo))
        self._report(0, "")
        if self._layout.separate_dense and todo:
            first = next((v for v in todo if self._donor in (None, self._folder / v.name)), None)
            if first is not None:  # verified before the others share its files
                self._make(first, None)
                self._donor = self._folder / first.name
                todo.remove(first)
        if workers is None:
            for variant in todo:
                self._make(variant, self._donor)
        else:
            for number, _ in workers.run(make_variant, [self._job(v, self._donor) for v in todo]):
                self._record(todo[number])

    def _check_source(self) -> None:
        """Where the source's files are not those of earlier runs, compare a variant with them, byte for byte.

        Raises VerificationError where it differs, as do then those that would be added.
        """
        if not self._source_changed or not (self._donor or self._there):
            return
        first = self._donor or self._folder / min(self._there)
        found = verify_checkpoint(first, source=self._checkpoint)
        if not found.ok:
            raise VerificationError(
                f"{found.problems[0]}; {printable_path(self._folder)} has variants of another state of "
                f"{self._checkpoint}: choose another folder"
            )

    def _is_verified(self, variant: Variant) -> bool:
        """Whether the variant has the manifest with which it was verified; its other files are not read again."""
        return variant.name in self._there and self._is_recorded(variant.name)

    def _is_recorded(self, name: str) -> bool:
        entry, folder = self.state.variants.get(name), self._folder / name
        if entry is None or entry.manifest is None or not (folder / MANIFEST_NAME).is_file():
            return False
        return entry.manifest == manifest_digest(folder)

    def _job(self, variant: Variant, donor: Path | None) -> Job:
        return Job(
            everywhere(self._checkpoint), self._folder / variant.name, variant.plan, self._layout, donor
        )

    def _make(self, variant: Variant, donor: Path | None) -> None:
        half = self._nbytes(variant) // 2

        def show(p: Progress) -> None:
            part = min(half, half * p.done // max(p.total, 1))
            self._report(part + (half if p.stage == "verify" else 0), variant.name)

        make_variant(self._job(variant, donor), show, self._ops)
        self._record(variant)

    def _record(self, variant: Variant) -> None:
        """`variant` is there and verified."""
        out, cost = self._folder / variant.name, self.costs.by_count[variant.experts]
        if variant.name not in self._there:
            self.made.append(variant.name)
        self.verified.append(variant.name)
        before = self.state.variants.get(variant.name)
        self.state.variants[variant.name] = Entry(
            variant.name,
            variant.ranking,
            variant.experts,
            cost.top_k,
            cost.store,
            cost.parameters,
            self._model.active_parameters(variant.experts),
            sum(r.size for r in manifest_of(out).files.values()) + (out / MANIFEST_NAME).stat().st_size,
            cost.dense_nbytes,
            manifest_digest(out),
            before.figures if before else {},
        )
        save_state(self.state, self._folder, self._ops)
        self._finished += 1
        self._done += self._nbytes(variant)
        self._report(0, variant.name)

    def _nbytes(self, variant: Variant) -> int:
        return self.costs.by_count[variant.experts].nbytes

    def _report(self, part: int, name: str) -> None:
        """Progress, with `part` of the bytes of the variant under way."""
        self._reported = max(self._reported, self._done + part)
        if self._progress is not None:
            note = f"{self._finished} of {len(self._variants)} variants" + (f", {name}" if name else "")
            self._progress(Progress("sweep", self._reported, self._total, "bytes", note))


def _state_in(folder: Path, opened: Checkpoint, model: ModelSpec) -> tuple[State, bool]:
    """The state of earlier sweeps in `folder`, or a new one, and whether the source's files have changed since.

    Raises PlanMismatchError where it is of another checkpoint.
    """
    stamp = repr([s.stamp for _, s in sorted(opened.shards.items())])
    state = State(
        (opened.files.hub_model or (opened.path.resolve().name,))[0],
        model.model_type,
        identity(opened, model),
        xxhash.xxh3_128_hexdigest(stamp.encode()),
        model.experts,
        model.top_k,
        sum(s.nbytes for s in opened.shards.values()),
    )
    old = load_state(folder)
    if old is None:
        return state, False
    if old.identity != state.identity:
        raise PlanMismatchError(
            f"{printable_path(folder)}: holds variants of another checkpoint ({old.model}, identity {old.identity}); "
            "choose another folder"
        )
    state.full = old.full
    state.variants = {n: entry for n, entry in old.variants.items() if os.path.isdir(folder / n)}
    return state, old.stamp != state.stamp


def _donor(
    opened: Checkpoint, variants: Sequence[Variant], layout: Layout, folders: Sequence[Path]
) -> Path | None:
    """The first of `folders` that has the dense shards of all `variants`, which share them then."""
    if not layout.separate_dense or not folders:
        return None
    program = program_of(opened, variants[0].plan, layout)
    return next((f for f in folders if shared_files(f, program) is not None), None)


@contextmanager
def _locked(folder: Path, ops: FileOps) -> Iterator[None]:
    """Make `folder` where it does not exist, and keep other sweeps out of it within the block."""
    try:
        if not folder.is_dir():
            ops.mkdir(folder)
    except OSError as error:
        raise OutputError(f"{printable_path(folder)}: cannot create: {error.strerror}") from error
    with output_lock(folder / INDEX_JSON):
        yield
