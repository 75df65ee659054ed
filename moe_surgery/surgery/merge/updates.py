"""What an adapter changes: the updates of each weight, and the tensors that it replaces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.checkpoint.text import printable
from moe_surgery.engine.spans import Span
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.base import Role
from moe_surgery.families.model_spec import ModelSpec, ModelTensor
from moe_surgery.surgery.merge.adapter import Adapter, Pair
from moe_surgery.surgery.merge.modules import ExpertTensor, Modules, Parameter
from moe_surgery.surgery.merge.numbering import Numbering, choose_numbering
from moe_surgery.surgery.program import Factor, Update

__all__ = ["RANK_ORDERS", "Changes", "find_changes"]

RANK_ORDERS: Final = ("peft", "expert")
"""What `rank_order` may be: how the columns of a stacked second factor are ordered."""
_SWAPPED_UNTIL: Final = (0, 19, 1)
"""PEFT before this took the stored axes of a stacked parameter for its inputs and outputs, whatever they were."""

Key = tuple[str, int | None]
"""A tensor's name and an expert of the checkpoint, None for the whole tensor."""


@dataclass(slots=True)
class Changes:
    """`updates` and `saved`, new values [adapter's tensor], by weight; `numbering` of the experts in the adapter.

    `left_out` counts updates of experts that the checkpoint does not have.
    """

    numbering: Numbering
    updates: dict[Key, list[Update]] = field(default_factory=dict)
    saved: dict[str, TensorRef] = field(default_factory=dict)
    left_out: int = 0

    def add(self, tensor: ModelTensor, expert: int | None, update: Update) -> None:
        self.updates.setdefault((tensor.name, expert), []).append(update)


@dataclass(frozen=True, slots=True)
class _Stacked:
    """A pair on a stacked parameter: updates of all experts."""

    pair: Pair
    module: str
    parameter: Parameter
    layer: int
    experts: int
    swapped: bool


@dataclass(frozen=True, slots=True)
class _Whole:
    pair: Pair
    tensor: ModelTensor


@dataclass(frozen=True, slots=True)
class _OfExpert:
    pair: Pair
    target: ExpertTensor


def find_changes(
    checkpoint: Checkpoint, model: ModelSpec, adapter: Adapter, *, numbering: str, rank_order: str
) -> Changes:
    """What `adapter` changes in `checkpoint`: every tensor of the adapter has its place, or an error names it.

    Raises InvalidInputError for a tensor without a place, of another shape than the weight or of one that is stored
    in a format that nothing can be added to; and as `choose_numbering`.
    """
    return _Finder(checkpoint, model, adapter, rank_order).find(numbering)


class _Finder:
    def __init__(self, checkpoint: Checkpoint, model: ModelSpec, adapter: Adapter, rank_order: str) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._adapter = adapter
        self._expert_major = rank_order == "expert"
        self._modules = Modules(model)

    def find(self, numbering: str) -> Changes:
        placed = [*self._placed()]
        saved = {name: self._saved(name, ref) for name, ref in self._adapter.saved.items()}
        counts = {p.experts for p in placed if isinstance(p, _Stacked)}
        counts |= {p.pair.b.shape[0] for p in placed if isinstance(p, _Whole) and p.tensor.role.has_experts}
        counts |= {self._adapter.saved[name].shape[0] for name, t in saved.items() if t.role.has_experts}
        numbers = {p.target.expert for p in placed if isinstance(p, _OfExpert)}
        chosen = choose_numbering(
            self._checkpoint, self._model, numbering, counts, numbers, self._adapter.where
        )
        changes = Changes(chosen)
        for entry in placed:
            if isinstance(entry, _Stacked):
                self._add_stacked(entry, changes)
            elif isinstance(entry, _OfExpert):
                self._add_expert(entry, changes)
            else:
                self._add_whole(entry, changes)
        for name, tensor in saved.items():
            self._check_saved(self._adapter.saved[name], tensor, chosen)
            changes.saved[tensor.name] = self._adapter.saved[name]
        self._check_disjoint(changes)
        return changes

    # --- where each pair belongs

    def _placed(self) -> Iterator[_Stacked | _Whole | _OfExpert]:
        modules: dict[str, list[Pair]] = {}
        for pair in self._adapter.pairs:
            modules.setdefault(pair.module, []).append(pair)
        for module, pairs in modules.items():
            if (tensor := self._modules.weight(module)) is not None:
                if len(pairs) > 1:
                    raise self._adapter.error(pairs[1].a, "is a second update of the same weight")
                yield _Whole(pairs[0], tensor)
            elif (target := self._modules.expert(module)) is not None and len(pairs) == 1:
                yield _OfExpert(pairs[0], target)
            elif parameters := self._modules.parameters(module):
                yield from self._stacked(module, parameters, pairs)
            else:
                stem, _, leaf = module.rpartition(".")
                named = [p for p in self._modules.parameters(stem) if p.name == leaf]
                if not named or len(pairs) > 1:
                    raise self._no_place(pairs[0].a, module)
                yield self._on(named[0], pairs[0], stem)

    def _no_place(self, ref: TensorRef, module: str) -> InvalidInputError:
        return self._adapter.error(
            ref,
            f"has no place: {self._checkpoint.path} has no module '{printable(module)}' that can be adapted",
        )

    def _stacked(
        self, module: str, parameters: tuple[Parameter, ...], pairs: list[Pair]
    ) -> Iterator[_Stacked]:
        """Which parameter each pair is on: PEFT wraps the first one innermost, and the names do not say it."""
        config = self._adapter.config
        targets = [p for p in parameters if config.targets(f"{module}.{p.name}")] or list(parameters)
        ordered = sorted(pairs, key=lambda pair: -pair.depth)
        if len(targets) == len(ordered):
            for parameter, pair in zip(targets, ordered, strict=True):
                yield self._on(parameter, pair, module)
            return
        for pair in ordered:
            fitting = [p for p in targets if self._experts_of(p, pair, module) is not None]
            if len(fitting) != 1:
                names = ", ".join(p.name for p in targets)
                raise self._adapter.error(
                    pair.a,
                    f"{list(pair.a.shape)} and lora_B {list(pair.b.shape)} fit {len(fitting)} of {names}; list the "
                    "adapted ones in target_parameters of adapter_config.json",
                )
            yield self._on(fitting[0], pair, module)

    def _on(self, parameter: Parameter, pair: Pair, module: str) -> _Stacked:
        found = self._experts_of(parameter, pair, module)
        layer = parameter.pieces[0].tensor.layer
        assert layer is not None
        rank = self._adapter.config.rank_of(f"{module}.{parameter.name}")
        if found is None:
            sizes = f"{parameter.columns} -> {parameter.rows or 'experts'}"
            raise self._adapter.error(
                pair.a,
                f"{list(pair.a.shape)} and lora_B {list(pair.b.shape)} do not fit {module}.{parameter.name} "
                f"({sizes}) of rank {rank}; the adapter was made for another model, or its config has another rank",
            )
        if pair.bias is not None:
            raise self._adapter.error(
                pair.bias, "is a bias of an update of a stacked parameter, which has none"
            )
        return _Stacked(pair, module, parameter, layer, *found)

    def _experts_of(self, parameter: Parameter, pair: Pair, module: str) -> tuple[int, bool] | None:
        """The number of experts of a stacked pair, and whether its inputs are the parameter's rows; None where it
        does not fit."""
        rank, (size, inputs), outputs = (
            self._adapter.config.rank_of(f"{module}.{parameter.name}"),
            pair.a.shape,
            pair.b.shape[0],
        )
        if not parameter.rows:  # a row an expert
            return (outputs, False) if (size, inputs) == (rank, parameter.columns) else None
        if size % rank:
            return None
        same = (inputs, outputs) == (parameter.columns, parameter.rows)
        swapped = (inputs, outputs) == (parameter.rows, parameter.columns)
        if self._inputs_first(parameter):
            return (size // rank, False) if same else None
        if same and swapped:
            version = self._adapter.config.peft_version
            if version is None or version < _SWAPPED_UNTIL or not parameter.oriented:
                raise self._adapter.error(
                    pair.a,
                    f"is on a square parameter ({parameter.name}), of which PEFT before 0.19.1 took the inputs for "
                    "outputs; its adapter_config.json does not say that a later version (peft_version) saved it",
                )
            swapped = False
        return (size // rank, swapped) if same or swapped else None

    def _inputs_first(self, parameter: Parameter) -> bool:
        """Whether transformers stores it as [experts, inputs, outputs], which all versions of PEFT read alike."""
        return parameter.pieces[0].tensor.format is not None

    # --- updates

    def _add_stacked(self, entry: _Stacked, changes: Changes) -> None:
        parameter, kept = entry.parameter, changes.numbering.kept[entry.layer]
        scale = self._adapter.config.scale_of(f"{entry.module}.{parameter.name}")
        if not parameter.rows:
            (piece,) = parameter.pieces
            up, down = self._factor(entry.pair.b), self._factor(entry.pair.a)
            changes.add(piece.tensor, None, Update(up._replace(picked=kept), down, scale))
            return
        changes.left_out += entry.experts - len(kept)
        for expert, number in enumerate(kept):
            a, b = self._of_expert(entry.pair, entry.experts, number)
            up, down = (a.transposed, b.transposed) if entry.swapped else (b, a)
            for piece in parameter.pieces:
                rows = up.rows_from(piece.first, piece.rows) if piece.step == 1 else up
                changes.add(piece.tensor, expert, Update(rows, down, scale))

    def _of_expert(self, pair: Pair, experts: int, number: int) -> tuple[Factor, Factor]:
        """Factors [rank, inputs] and [outputs, rank] of one expert.

        The rank axis of both holds all experts: slowest in a, fastest in b (PEFT's ParamWrapper), or slowest in both
        (`rank_order` "expert").
        """
        a, b = self._factor(pair.a), self._factor(pair.b)
        rank = a.rows // experts
        first = a.rows_from(number * rank, rank)
        start, step = (number * rank, 1) if self._expert_major else (number, experts)
        return first, b._replace(columns=rank, start=start, column_step=step)

    def _add_expert(self, entry: _OfExpert, changes: Changes) -> None:
        piece, pair = entry.target.piece, entry.pair
        tensor = piece.tensor
        assert tensor.layer is not None
        self._check_shape(pair, (piece.rows, tensor.shape[2]), pair.module)
        if pair.bias is not None:
            raise self._adapter.error(pair.bias, "is a bias of an expert's update, which cannot be merged")
        kept = changes.numbering.kept[tensor.layer]
        if entry.target.expert not in kept:
            changes.left_out += 1
            return
        update = Update(
            self._factor(pair.b),
            self._factor(pair.a),
            self._scale(pair),
            piece.first if piece.step > 1 else 0,
            piece.step,
        )
        changes.add(tensor, kept.index(entry.target.expert), update)

    def _add_whole(self, entry: _Whole, changes: Changes) -> None:
        pair, tensor, scale = entry.pair, entry.tensor, self._scale(entry.pair)
        if len(tensor.shape) != 2:
            raise self._adapter.error(pair.a, f"adapts {tensor.name}, which is no matrix")
        if tensor.role in (Role.EMBEDDING, Role.UNEMBEDDING):
            self._check_untied(pair.a)
        rows, columns = tensor.shape
        if tensor.role.has_experts:
            if tensor.tail or tensor.layer is None:
                raise self._adapter.error(
                    pair.a, f"adapts {tensor.name}, whose rows are not those of experts alone"
                )
            self._check_shape(pair, (changes.numbering.experts, columns), pair.module)
            picked = changes.numbering.kept[tensor.layer]
            up = self._factor(pair.b)._replace(picked=picked)
            changes.add(tensor, None, Update(up, self._factor(pair.a), scale))
        elif pair.embedding:
            self._check_shape(pair, (columns, rows), pair.module)
            up, down = self._factor(pair.a).transposed, self._factor(pair.b).transposed
            changes.add(tensor, None, Update(up, down, scale))
        else:
            self._check_shape(pair, (rows, columns), pair.module)
            changes.add(tensor, None, Update(self._factor(pair.b), self._factor(pair.a), scale))
        if pair.bias is not None:
            self._add_bias(pair.bias, pair.module, tensor, scale, changes)

    def _add_bias(
        self, ref: TensorRef, module: str, weight: ModelTensor, scale: float, changes: Changes
    ) -> None:
        bias = self._modules.tensor(module + ".bias")
        if bias is None or ref.shape != bias.shape or weight.role.has_experts:
            raise self._adapter.error(ref, f"adds to the bias of {module}, which has none of this shape")
        up = self._factor(ref)
        changes.add(bias, None, Update(up, None, scale))

    def _factor(self, ref: TensorRef) -> Factor:
        """The whole tensor; a vector is one column."""
        rows, columns = ref.shape if len(ref.shape) == 2 else (ref.shape[0], 1)
        span = Span(ref.shard, ref.offset, ref.nbytes)
        return Factor(span, self._adapter.format_of(ref), rows, columns, 0, columns, 1)

    def _scale(self, pair: Pair) -> float:
        return self._adapter.config.scale_of(self._target(pair))

    def _check_shape(self, pair: Pair, shape: tuple[int, int], target: str) -> None:
        rank = self._adapter.config.rank_of(self._target(pair))
        expected = (rank, shape[1]), (shape[0], rank)
        if (pair.a.shape, pair.b.shape) != expected:
            raise self._adapter.error(
                pair.a,
                f"{list(pair.a.shape)} and lora_B {list(pair.b.shape)} do not fit {target} ({shape[1]} -> "
                f"{shape[0]}) of rank {rank}; the adapter was made for another model, or its config has another rank",
            )

    def _target(self, pair: Pair) -> str:
        """What patterns of ranks and alphas are matched with: the module, or a parameter that PEFT wraps itself."""
        name = f"{pair.module}.weight"
        return name if self._adapter.config.targets(name) else pair.module

    def _check_untied(self, ref: TensorRef) -> None:
        if not any(t.role is Role.UNEMBEDDING for t in self._model.tensors):
            raise self._adapter.error(
                ref, "adapts an embedding that is also the output layer (tied); merging would change both"
            )

    # --- saved tensors

    def _saved(self, name: str, ref: TensorRef) -> ModelTensor:
        tensor = self._modules.tensor(name)
        if tensor is None:
            raise self._no_place(ref, name)
        if tensor.role in (Role.EMBEDDING, Role.UNEMBEDDING):
            self._check_untied(ref)
        self._adapter.format_of(ref)
        return tensor

    def _check_saved(self, ref: TensorRef, tensor: ModelTensor, numbering: Numbering) -> None:
        shape = tensor.shape
        if tensor.role is Role.EXPERT_WEIGHT and tensor.format is not None:
            shape = (shape[0], shape[2], shape[1])
        if tensor.role.has_experts:
            shape = (numbering.experts, *shape[1:])
        if ref.shape != shape or tensor.pieces or tensor.axis or tensor.tail:
            raise self._adapter.error(
                ref,
                f"{list(ref.shape)} cannot replace {tensor.name} {list(shape)}; the adapter was made for another model",
            )

    def _check_disjoint(self, changes: Changes) -> None:
        """Only updates of different rows of a weight can be added together."""
        for (name, _), updates in changes.updates.items():
            starts = Counter((u.first, u.step) for u in updates)
            if len(updates) > 1 and (max(starts.values()) > 1 or any(u.step == 1 for u in updates)):
                raise InvalidInputError(
                    f"{self._adapter.where}: has several updates of {printable(name)}, such as of the whole weight and "
                    "of a part"
                )
