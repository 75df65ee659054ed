"""A model family as data: a table of tensors, their axes and config keys.

A family says nothing about a particular checkpoint; `families.identify_model` checks a checkpoint against it
and returns a `ModelSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from moe_surgery.families.gguf_architecture import GgufArchitecture
    from moe_surgery.families.model_config import ModelConfig
    from moe_surgery.families.model_spec import ModelSpec

__all__ = [
    "AnyFamily",
    "CatalogFamily",
    "ConfigKey",
    "Family",
    "GgufFamily",
    "LayerNames",
    "Layout",
    "ProjectionNames",
    "Role",
    "StoredAs",
    "Tensor",
    "WeightNames",
]


class Role(Enum):
    """What a tensor is in the model; the value is its name in messages."""

    EMBEDDING = "embedding"
    NORM = "norm"
    ATTENTION = "attention"
    ROUTER = "router"
    EXPERT_WEIGHT = "expert weight"
    EXPERT_BIAS = "expert bias"
    UNEMBEDDING = "unembedding"
    SHARED_EXPERT = "shared expert"
    ROUTING_TABLE = "routing table"
    OTHER = "other"

    @property
    def has_experts(self) -> bool:
        """Whether axis 0 counts experts, so that surgery copies slices of it instead of the whole tensor."""
        return self is Role.ROUTER or self.in_expert

    @property
    def in_expert(self) -> bool:
        """Whether it is part of an expert itself, unlike the router's rows."""
        return self in (Role.EXPERT_WEIGHT, Role.EXPERT_BIAS)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the output layout.

    `name` may hold `{layer}`. `shape` is written in dimension names, each a product such as
    "heads*head_dim"; the first is "experts" where `role` has experts. An expert weight is written
    ("experts", rows, columns) and stored in any `ExpertFormat`: as MXFP4 under two names (`name` +
    "_blocks" and "_scales"), or in BF16, F16 or F32, transposed.
    `present_if` is a config key and its default that decide whether the tensor exists; "!" negates the key.
    """

    name: str
    shape: tuple[str, ...]
    role: Role
    present_if: tuple[str, bool] | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


class StoredAs(NamedTuple):
    """Where a layout stores a tensor: under `name`, as a whole or as rows [start, start + its rows) of a fused one.

    `start` and `rows` are dimension expressions; `rows` is the row count of the fused tensor.
    """

    name: str
    start: str = ""
    rows: str = ""


class ConfigKey(NamedTuple):
    """A value in config.json: that of the first of `keys` present, else `default`.

    `unread` are spellings that `Layout.reader` does not read; they are written along with `keys`.
    """

    keys: tuple[str, ...]
    default: float | None = None
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """How one way of storing a family names its tensors.

    `names` maps an output name to its `StoredAs`; names not in it are the same. `blocks` and `scales`
    are the two suffixes of an MXFP4 tensor. `side_files_dropped` are files that only make sense in
    this layout; `parent_side_files` are taken from the parent folder where it has a config.json.
    `hub_config` converts this layout's config.json to the hub's. `reader` is the program whose
    interpretation of config.json is followed; `dimensions` overrides the family's where it reads
    other keys.
    """

    name: str
    reader: str
    names: Mapping[str, StoredAs] = field(default_factory=dict)
    blocks: str = "_blocks"
    scales: str = "_scales"
    side_files_dropped: frozenset[str] = frozenset()
    parent_side_files: tuple[str, ...] = ()
    hub_config: Callable[[Mapping[str, object]], dict[str, object]] | None = None
    dimensions: Mapping[str, ConfigKey] = field(default_factory=dict)

    def find(self, name: str) -> StoredAs:
        return self.names.get(name, StoredAs(name))


class ProjectionNames(NamedTuple):
    """Weight and bias of a linear layer."""

    weight: str
    bias: str


class LayerNames(NamedTuple):
    """The tensor names of a decoder layer; each contains `{layer}`.

    `gate_up` and `down` are expert weights, gate rows at even and up rows at odd positions of `gate_up`.
    """

    attention_norm: str
    q: ProjectionNames
    k: ProjectionNames
    v: ProjectionNames
    o: ProjectionNames
    sinks: str
    mlp_norm: str
    router: ProjectionNames
    gate_up: str
    gate_up_bias: str
    down: str
    down_bias: str


class WeightNames(NamedTuple):
    """The tensor names of a model that the runtime runs, in the hub's layout."""

    embedding: str
    norm: str
    unembedding: str
    layer: LayerNames


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: its dimensions, tensors, and the config keys that surgery changes.

    `read_config` reads the constants that `config_keys` names; `weights` holds the tensor names by their
    part of the model. `gguf` returns how llama.cpp names them; it is None where llama.cpp does not support
    the family. Both are functions so that only running and exporting import what is behind them.
    """

    model_type: str
    title: str
    dimensions: Mapping[str, ConfigKey]
    tensors: tuple[Tensor, ...]
    layouts: tuple[Layout, ...]
    quantization_config: Mapping[str, object]
    config_keys: Mapping[str, ConfigKey]
    read_config: Callable[[ModelSpec], ModelConfig]
    weights: WeightNames
    gguf: Callable[[], GgufArchitecture] | None = None

    @property
    def tied_key(self) -> str | None:
        """The config key that ties the unembedding to the embedding; None if there is none."""
        tensor = next(t for t in self.tensors if t.role is Role.UNEMBEDDING)
        return tensor.present_if[0].removeprefix("!") if tensor.present_if else None


LAYERS = ("model.layers.", "model.language_model.layers.", "language_model.model.layers.")


@dataclass(frozen=True, slots=True)
class CatalogFamily:
    """A family that is pruned but not run: which tensors count experts, by name. All others are copied whole.

    Names are those within a layer, whose number follows one of `layers`, or of `mtp` for layers that predict
    further tokens; those may also be numbered after the others. A layer with the tensor `router` is an MoE
    layer. Experts are stored under `experts`, each under its number or stacked along axis 0; `stacked` are prefixes of
    stacked tensors elsewhere. `slices` are further tensors with one entry an expert, and their axis; `whole`
    are those beside the router that have none. `tail_key` is the config key for rows of the router after
    those of the experts, which stay. `table` is a tensor whose values are expert numbers. With groups,
    `group_minimum` is the number of experts that a group's score needs. `minimum` is the fewest experts with
    which the model is still an MoE. `routing` says how a token's experts are chosen.
    """

    model_type: str
    title: str
    routing: str
    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts."
    stacked: tuple[str, ...] = ()
    slices: Mapping[str, int] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    layers: tuple[str, ...] = LAYERS
    mtp: tuple[str, ...] = ("mtp.layers.",)
    tail_key: str | None = None
    table: str | None = None
    group_minimum: int = 2
    minimum: int = 1


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A model in a GGUF file: which tensors count experts follows from names that all architectures share.

    `architecture` is llama.cpp's name; `model_types` are transformers' for the models with it, `model_type` the
    first of them. `routing` says how a token's experts are chosen.
    """

    model_type: str
    title: str
    architecture: str
    routing: str
    model_types: tuple[str, ...]


AnyFamily = Family | CatalogFamily
"""A family with a full description, or one of the catalogue."""
