"""The modules that an adapter names, as tensors of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from moe_surgery.families.base import CatalogFamily, Role
from moe_surgery.families.model_spec import EXPERT, ModelSpec, ModelTensor

__all__ = ["ExpertTensor", "Modules", "Parameter", "Piece"]

_NUMBERED: Final = re.compile(r"(?P<stem>.*\bexperts)\.(?P<expert>[0-9]{1,5})\.(?P<leaf>.+)")
_LISTED: Final = re.compile(
    r"(?P<stem>.*\bexperts)\.(?P<leaf>gate_up_proj|down_proj)s\.(?P<expert>[0-9]{1,5})"
)
"""Experts as lists of linear layers, as some programs hold them in 4 bits."""
_LAYERS: Final = ("model.layers.", "model.language_model.layers.", "language_model.model.layers.")
# The projections of an expert stored by itself, and what transformers stacks of them: gate rows, then up rows.
_STACKED: Final = (
    ("gate_up_proj", ("gate_proj.weight", "up_proj.weight")),
    ("gate_up_proj", ("w1.weight", "w3.weight")),
    ("down_proj", ("down_proj.weight",)),
    ("down_proj", ("w2.weight",)),
)
_INTERLEAVED: Final = {"gate_proj": 0, "up_proj": 1, "w1": 0, "w3": 1}


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first`, `first` + `step`, ... of an expert's matrix: its `tensor`, of `rows` rows."""

    tensor: ModelTensor
    rows: int
    first: int = 0
    step: int = 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of transformers with all experts of a layer, and the tensors that it is stored in.

    An expert's matrix is [rows, columns], inputs along its columns; `oriented` False: the stored one may also be the
    other way around. `rows` 0: one row an expert, as biases are.
    """

    name: str
    rows: int
    columns: int
    pieces: tuple[Piece, ...]
    oriented: bool = True


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """Rows of one expert's weight that a module of that expert alone stands for."""

    expert: int
    piece: Piece


class Modules:
    """Finds the tensors of `model` by names of modules."""

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._tensors: Mapping[str, ModelTensor] = {t.name: t for t in model.tensors}
        self._moe = (
            model.family.router.partition(".")[0] if isinstance(model.family, CatalogFamily) else "mlp"
        )

    def tensor(self, name: str) -> ModelTensor | None:
        """The tensor that transformers calls `name`, that of no single expert."""
        return next((self._tensors[n] for n in self._spellings(name) if n in self._tensors), None)

    def weight(self, module: str) -> ModelTensor | None:
        """The weight of a module outside the experts, such as "model.layers.0.self_attn.q_proj"."""
        return self.tensor(module + ".weight")

    def expert(self, module: str) -> ExpertTensor | None:
        """A module of one expert: "model.layers.0.mlp.experts.3.down_proj"."""
        match = _NUMBERED.fullmatch(module) or _LISTED.fullmatch(module)
        if match is None:
            return None
        stem, leaf, expert = match["stem"], match["leaf"], int(match["expert"])
        for spelling in self._spellings(f"{stem}.{EXPERT}.{leaf}.weight"):
            if (tensor := self._tensors.get(spelling)) is not None:
                return ExpertTensor(expert, Piece(tensor, tensor.shape[1]))
        for parameter in self.parameters(stem):
            if parameter.name == leaf and parameter.rows and parameter.oriented:
                (piece,) = parameter.pieces if len(parameter.pieces) == 1 else (None,)
                return None if piece is None else ExpertTensor(expert, piece)
            if parameter.name == "gate_up_proj" and leaf in _INTERLEAVED and self._interleaved:
                (piece,) = parameter.pieces
                half = Piece(piece.tensor, piece.rows // 2, _INTERLEAVED[leaf], 2)
                return ExpertTensor(expert, half)
        return None

    def parameters(self, module: str) -> tuple[Parameter, ...]:
        """The parameters of a module that holds a layer's experts, in the order that transformers declares them."""
        for spelling in self._spellings(module):
            found = tuple(self._described(spelling)) or tuple(self._catalogued(spelling))
            if found:
                return found
        return ()

    @property
    def _interleaved(self) -> bool:
        return not isinstance(self._model.family, CatalogFamily)

    def _described(self, module: str) -> Iterator[Parameter]:
        if isinstance(self._model.family, CatalogFamily):
            return
        names = self._model.described.weights.layer
        for template in (names.gate_up, names.gate_up_bias, names.down, names.down_bias):
            stem, _, leaf = template.rpartition(".")
            match = re.fullmatch(re.escape(stem).replace(re.escape("{layer}"), "([0-9]+)"), module)
            tensor = self._tensors.get(f"{module}.{leaf}") if match else None
            if tensor is None:
                continue
            rows = tensor.shape[1] if tensor.role is Role.EXPERT_WEIGHT else 0
            yield Parameter(leaf, rows, tensor.shape[-1], (Piece(tensor, rows),))

    def _catalogued(self, module: str) -> Iterator[Parameter]:
        for name, leaves in _STACKED:
            tensors = [self._tensors.get(f"{module}.{EXPERT}.{leaf}") for leaf in leaves]
            found = [t for t in tensors if t is not None and len(t.shape) == 3]
            if len(found) == len(leaves):
                starts = [sum(t.shape[1] for t in found[:i]) for i in range(len(found))]
                pieces = tuple(Piece(t, t.shape[1], start) for t, start in zip(found, starts, strict=True))
                yield Parameter(name, sum(t.shape[1] for t in found), found[0].shape[2], pieces)
        for name in ("gate_up_proj", "down_proj"):
            for suffix in ("", ".weight"):
                tensor = self._tensors.get(f"{module}.{name}{suffix}")
                if tensor is not None and len(tensor.shape) == 3:
                    rows, columns = tensor.shape[1:]
                    yield Parameter(name, rows, columns, (Piece(tensor, rows),), oriented=False)

    def _spellings(self, name: str) -> Iterator[str]:
        """`name`, and as checkpoints may have it: other prefixes of the layers, another name of the MoE module."""
        names = [name, f"model.{name}", name.removeprefix("model.")]
        for prefix in _LAYERS:
            if name.startswith(prefix):
                names += [other + name.removeprefix(prefix) for other in _LAYERS]
        seen = dict.fromkeys(names)
        yield from seen
        for spelling in seen:
            for one in ("mlp", "block_sparse_moe", "feed_forward", "moe"):
                if f".{one}." in spelling and one != self._moe:
                    yield spelling.replace(f".{one}.", f".{self._moe}.")
