"""The content of a card, from a program before it runs or from a finished checkpoint.

Both give the same facts, so the card of a finished checkpoint is the one that was written with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.card.source_card import SourceCard, read_readme
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.hub import is_hub_id
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.errors import VerificationError
from moe_surgery.families.base import Family, Role
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.formats.expert_format import AS_STORED, BF16, FORMATS, ExpertFormat
from moe_surgery.selection.plan import Plan
from moe_surgery.surgery.manifest import Manifest
from moe_surgery.surgery.names import MANIFEST_NAME, SOURCE_README_NAME
from moe_surgery.surgery.program import Program
from moe_surgery.version import __version__

__all__ = ["Facts", "ModelNumbers", "facts_of_checkpoint", "facts_of_program"]

_TERMS = ("license", "licence", "notice", "copying", "usage_policy")


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """A model in numbers; None if not recorded. `nbytes` is the size of the shard files."""

    experts: int
    top_k: int | None
    parameters: int
    active_parameters: int | None
    expert_format: ExpertFormat | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """`tensor_bytes` is the size of all tensors, `bf16_bytes` with expert weights in BF16; `dense_dtypes` are
    the dtypes of the other weights.

    `terms` are files with terms of use, `origin` and `repair` are the manifest's, `card` the source's.
    """

    plan: Plan
    model_type: str
    layers: int
    this: ModelNumbers
    source: ModelNumbers
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
    gpt_oss: bool = True
    repair: Mapping[str, object] | None = None

    @property
    def kept(self) -> int:
        return self.this.experts

    @property
    def layer_name(self) -> str:
        """What `layers` counts: gpt-oss has experts in every layer."""
        return "layer" if self.gpt_oss else "MoE layer"

    @property
    def whole(self) -> bool:
        """Whether no expert was removed."""
        return self.this.experts == self.source.experts

    @property
    def expert_format(self) -> ExpertFormat:
        """Format of the expert weights."""
        assert self.this.expert_format is not None
        return self.this.expert_format

    @property
    def converted(self) -> bool:
        """Whether expert weights are recorded to be in another format than in the source."""
        return self.source.expert_format not in (None, self.this.expert_format)

    def recorded(self, key: str) -> str | None:
        """A string of `origin`, None if missing."""
        value = self.origin.get(key)
        return value if isinstance(value, str) and value else None

    @property
    def adapter(self) -> Mapping[str, object] | None:
        """The manifest's entry on the adapter that was merged, None without one."""
        value = self.origin.get("adapter")
        return value if isinstance(value, Mapping) else None

    @property
    def base_model(self) -> str | None:
        """Hub id of the published model."""
        name = self.recorded("base_model")
        return name if name and is_hub_id(name) else None

    @property
    def source_name(self) -> str:
        """Name of the source, without its owner."""
        return self.recorded("name") or (self.base_model or "the source").rpartition("/")[2]

    @property
    def source_id(self) -> str | None:
        """Hub id of exactly the source."""
        return self.base_model if self.recorded("base_model_from") in ("option", "cache") else None


def facts_of_program(program: Program, model: ModelSpec, readme: SourceCard) -> Facts:
    """The facts of what `program` will write; `model` describes its source, `readme` is the source's card."""
    return _facts(
        model.without_mtp() if program.plan.mtp_layers == () else model,
        program.plan,
        program.top_k,
        program.expert_format,
        program.nbytes,
        sum(s.size for s in program.sources),
        program.origin,
        program.copies,
        readme,
        f"moe-surgery {__version__}",
        program.repair,
    )


def facts_of_checkpoint(folder: Path, checkpoint: Checkpoint, model: ModelSpec, manifest: Manifest) -> Facts:
    """The facts of the finished checkpoint in `folder`, from its manifest and headers.

    Raises VerificationError if the two describe different models, OutputError if the copy of the
    source's README cannot be read.
    """
    plan = manifest.plan
    if (model.model_type, model.layers, model.experts) != (
        plan.model_type,
        plan.num_layers,
        plan.uniform_experts,
    ):
        raise VerificationError(
            f"{printable_path(folder / MANIFEST_NAME)}: its plan does not match the weights; run moe-surgery "
            "verify to see what changed"
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
        manifest.repair,
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
    repair: Mapping[str, object] | None,
) -> Facts:
    """`model` is of the source or of the result: for the same number of experts they agree."""
    kept, experts = len(plan.layers[0]), plan.num_source_experts
    names = set(files)
    source_top_k, source_format = origin.get("top_k"), origin.get("expert_storage")
    top_k_of_source = source_top_k if type(source_top_k) is int and 1 <= source_top_k <= experts else None

    def active(count: int, top_k: int) -> int:
        return model.parameters(count) - (count - top_k) * model.expert_parameters()

    this = ModelNumbers(kept, top_k, model.parameters(kept), active(kept, top_k), expert_format, nbytes)
    source = ModelNumbers(
        experts,
        top_k_of_source,
        model.parameters(experts),
        None if top_k_of_source is None else active(experts, top_k_of_source),
        expert_format
        if source_format == expert_format.name
        else FORMATS.get(source_format)
        if isinstance(source_format, str)
        else None,
        source_bytes,
    )
    others = [t for t in model.tensors if t.role is not Role.EXPERT_WEIGHT]
    other = sum(t.share(t.nbytes, model.experts, kept) for t in others)
    in_experts = [t for t in model.tensors if t.role is Role.EXPERT_WEIGHT]
    weights = sum(t.share(t.parameters, model.experts, kept) for t in in_experts)
    if expert_format.name == AS_STORED.name:  # copied in their own format
        other += sum(t.share(t.nbytes, model.experts, kept) for t in in_experts)
        weights = 0
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
        gpt_oss=isinstance(model.family, Family),
        repair=repair or None,
    )
