"""All that a card says, gathered from a program before it runs or from a checkpoint that is there.

Both ways give the same facts, so that the card of a finished checkpoint is the one it was written with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.card.front_matter import SourceCard, read_readme
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.hub import is_hub_id
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.errors import VerificationError
from moe_surgery.families.base import Role
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.formats.expert_format import BF16, FORMATS, ExpertFormat
from moe_surgery.selection.plan import Plan
from moe_surgery.surgery.manifest import Manifest
from moe_surgery.surgery.names import MANIFEST_NAME, SOURCE_README_NAME
from moe_surgery.surgery.program import Program
from moe_surgery.version import __version__

__all__ = ["Facts", "Size", "facts_of_checkpoint", "facts_of_program"]

_TERMS = ("license", "licence", "notice", "copying", "usage_policy")


@dataclass(frozen=True, slots=True)
class Size:
    """A model in numbers; None where nothing records it. `nbytes` are those of the shard files."""

    experts: int
    top_k: int | None
    parameters: int
    active_parameters: int | None
    expert_format: ExpertFormat | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """`tensor_bytes` are the tensors, `bf16_bytes` with expert weights in BF16; `dense_dtypes` those of all others.

    `terms` names files with terms of use, `origin` is the manifest's, `card` the source's own.
    """

    plan: Plan
    model_type: str
    layers: int
    this: Size
    source: Size
    tensor_bytes: int
    bf16_bytes: int
    dense_dtypes: tuple[str, ...]
    origin: Mapping[str, object]
    card: SourceCard
    terms: tuple[str, ...]
    has_source_card: bool
    has_tokenizer: bool
    has_template: bool
    tool: str
    license_given: bool = False

    @property
    def kept(self) -> int:
        return self.this.experts

    @property
    def whole(self) -> bool:
        """Whether no expert was removed."""
        return self.this.experts == self.source.experts

    @property
    def expert_format(self) -> ExpertFormat:
        """How expert weights are stored here."""
        assert self.this.expert_format is not None
        return self.this.expert_format

    @property
    def converted(self) -> bool:
        """Whether expert weights are in another format than in the source, as far as is recorded."""
        return self.source.expert_format not in (None, self.this.expert_format)

    def said(self, key: str) -> str | None:
        """A string that `origin` holds."""
        value = self.origin.get(key)
        return value if isinstance(value, str) and value else None

    @property
    def base_model(self) -> str | None:
        """The published model's id on the hub."""
        said = self.said("base_model")
        return said if said and is_hub_id(said) else None

    @property
    def source_name(self) -> str:
        """What the source is called, without its owner."""
        return self.said("name") or (self.base_model or "the source").rpartition("/")[2]

    @property
    def source_id(self) -> str | None:
        """The id under which the hub has the very source."""
        return self.base_model if self.said("base_model_from") in ("option", "cache") else None


def facts_of_program(program: Program, model: ModelSpec, readme: SourceCard) -> Facts:
    """The facts of what `program` will write; `model` describes its source, `readme` is the source's card."""
    return _facts(
        model,
        program.plan,
        program.top_k,
        program.expert_format,
        program.nbytes,
        sum(s.size for s in program.sources),
        program.origin,
        program.copies,
        readme,
        f"moe-surgery {__version__}",
    )


def facts_of_checkpoint(folder: Path, checkpoint: Checkpoint, model: ModelSpec, manifest: Manifest) -> Facts:
    """The facts of the finished checkpoint in `folder`, from its manifest and headers.

    Raises VerificationError where the two do not speak of one model, OutputError where its copy of
    the source's README cannot be read.
    """
    plan = manifest.plan
    if (model.model_type, model.layers, model.experts) != (
        plan.model_type,
        plan.num_layers,
        plan.uniform_experts,
    ):
        raise VerificationError(
            f"{printable_path(folder / MANIFEST_NAME)}: its plan is not the one of these weights; run moe-surgery "
            "verify to see what was changed"
        )
    sizes = (source.get("size") for source in manifest.sources)
    readme = LocalFile(folder / SOURCE_README_NAME) if SOURCE_README_NAME in manifest.files else None
    return _facts(
        model,
        plan,
        model.top_k,
        model.expert_format,
        sum(shard.nbytes for shard in checkpoint.shards.values()),
        sum(size for size in sizes if isinstance(size, int)),
        manifest.origin,
        manifest.files,
        read_readme(readme),
        manifest.tool,
    )


def _facts(
    model: ModelSpec,
    plan: Plan,
    top_k: int,
    expert_format: ExpertFormat,
    nbytes: int,
    source_bytes: int,
    origin: Mapping[str, object],
    files: Iterable[str],
    card: SourceCard,
    tool: str,
) -> Facts:
    """`model` describes the source or the result: with the number of experts given, they agree."""
    kept, experts = len(plan.layers[0]), plan.num_source_experts
    names = set(files)
    source_top_k, source_format = origin.get("top_k"), origin.get("expert_storage")
    known = source_top_k if type(source_top_k) is int and 1 <= source_top_k <= experts else None

    def active(count: int, top_k: int) -> int:
        return model.parameters(count) - (count - top_k) * model.expert_parameters()

    this = Size(kept, top_k, model.parameters(kept), active(kept, top_k), expert_format, nbytes)
    source = Size(
        experts,
        known,
        model.parameters(experts),
        None if known is None else active(experts, known),
        FORMATS.get(source_format) if isinstance(source_format, str) else None,
        source_bytes,
    )
    others = [t for t in model.tensors if t.role is not Role.EXPERT_WEIGHT]
    other = sum(t.nbytes // model.experts * kept if t.has_experts else t.nbytes for t in others)
    weights = sum(t.parameters // model.experts * kept for t in model.tensors if t.role is Role.EXPERT_WEIGHT)
    return Facts(
        plan,
        model.model_type,
        model.layers,
        this,
        source,
        other + expert_format.nbytes(weights),
        other + BF16.nbytes(weights),
        tuple(sorted({t.stored.dtype for t in others})),
        origin,
        card,
        tuple(sorted(n for n in names if n.lower().startswith(_TERMS))),
        SOURCE_README_NAME in names,
        "tokenizer.json" in names or "tokenizer.model" in names,
        "chat_template.jinja" in names,
        tool,
    )
