"""Any model that transformers has, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.families import ModelSpec
from moe_surgery.families.catalog_config import COUNT_KEYS, TOP_K_KEYS, with_counts
from moe_surgery.quality.hidden_states import HiddenStates
from moe_surgery.quality.layers import LayerModel, MoeLayer
from moe_surgery.quality.transformers_layers.allocator import return_large_blocks
from moe_surgery.quality.transformers_layers.moe_layer import Chosen, TransformersMoeLayer
from moe_surgery.quality.transformers_layers.skeleton import Skeleton, expert_parameters
from moe_surgery.quality.transformers_layers.weights import AHEAD, Weights

__all__ = ["TransformersModel"]

VOCABULARY_ROWS = 8192


class _States(HiddenStates):
    """Hidden states with the token ids of the passages, int64, which some layers look at."""

    def __init__(
        self, passages: Sequence[Tensor], width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__([len(p) for p in passages], width, dtype, device)
        self.passages = passages


class TransformersModel(LayerModel):
    """The model `spec` in `checkpoint`, computed by transformers' modules in `dtype` on `device`.

    A layer takes two passes: the first ends where its experts are called, so that each expert is decoded once for
    all tokens; the second goes on with their output. `checkpoint` must stay open where its files cannot be mapped.
    `top_k` replaces the model's experts per token.

    Raises InvalidInputError for a model that transformers does not have, or tensors that it does not know.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        top_k: int | None = None,
    ) -> None:
        self.spec, self.where = spec, printable_path(checkpoint.path)
        self.device, self.dtype = device, dtype
        name = str(dtype).removeprefix("torch.")
        self.computation = {"backend": "transformers", "device": device.type, "dtype": name}
        self._experts: Callable[..., Tensor] | None = None
        return_large_blocks()
        self._skeletons: dict[tuple[int, int], Skeleton] = {}
        self.full = self.skeleton(spec.experts, min(top_k or spec.top_k, spec.experts))
        self.weights = Weights(checkpoint, spec, self.full.parameters, self.full.prefix, dtype, device)
        self.depth, self.moe_layers, self.experts = len(self.full.layers), spec.layers, spec.experts
        self.hidden_size = self.full.hidden_size
        self._number: int | None = None
        self._dense: dict[str, Tensor] = {}
        self._table = self._stored(self.full.embedding)
        self.vocab_size = len(self._table)
        self._set_outside()

    def skeleton(self, experts: int, top_k: int) -> Skeleton:
        """The model with so many experts in every layer and for a token."""
        key = experts, top_k
        if key not in self._skeletons:
            config = self.spec.hub_config
            if key != (self.spec.experts, self.spec.top_k):
                config = with_counts(config, {COUNT_KEYS: experts, TOP_K_KEYS: top_k})
            made = Skeleton(config, top_k, self.dtype, self.device, self._run_experts, self.where)
            self._skeletons[key] = made
        return self._skeletons[key]

    @torch.inference_mode()
    def embed(self, passages: Sequence[Sequence[int]]) -> HiddenStates:
        tokens = [torch.tensor(list(p), dtype=torch.int64) for p in passages]
        states: _States | None = None
        for number, passage in enumerate(tokens):
            x = self.full.call(0, passage, self._table).states[0].flatten(1)
            if states is None:
                states = _States(tokens, x.shape[1], self.dtype, self.device)
            states[states.starts[number] : states.starts[number + 1]] = x
        assert states is not None
        return states

    @torch.inference_mode()
    def enter(self, number: int, states: HiddenStates) -> MoeLayer | None:
        assert isinstance(states, _States)
        self._open(number)
        weights = self.weights.layer(number)
        if weights.row is None:
            self.walk(self.full, number, states, None)
            return None
        return TransformersMoeLayer(self, number, weights.row, states, self.full)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        shape = self.full.call(0, torch.zeros(len(x), dtype=torch.int64)).states.shape
        return self.full.logits(x.reshape(shape))

    def walk(
        self,
        skeleton: Skeleton,
        number: int,
        states: HiddenStates,
        experts: Callable[[slice, nn.Module, Tensor, Tensor, Tensor], Tensor] | None,
        results: Sequence[list[Any] | None] | None = None,
    ) -> None:
        """Take `states` through layer `number`, passage by passage; `experts` runs in place of its experts.

        It gets the passage's rows, the module of experts, their input, ids and weights. Where it raises `Chosen`
        the passage's states stay. `results` are a list for each passage, as for `Skeleton.run`.
        """
        assert isinstance(states, _States)
        for index, passage in enumerate(states.passages):
            rows = slice(states.starts[index], states.starts[index + 1])
            call = skeleton.call(number, passage)
            self._experts = None if experts is None else partial(experts, rows)
            try:
                x = states[rows].reshape(call.states.shape)
                found = skeleton.run(number, call, x, None if results is None else results[index])
                states[rows] = found[0].flatten(1)
            except Chosen:
                pass
            finally:
                self._experts = None

    def set_layer(self, skeleton: Skeleton, number: int, kept: Sequence[int] | None) -> None:
        """Give layer `number` of `skeleton` its parameters, the router's for the experts `kept` (None: all)."""
        router = self.weights.router_of(self.weights.layer(number), kept)
        for name, value in {**self._dense, **router}.items():
            skeleton.parameters.set(name, value)

    def _open(self, number: int) -> None:
        """Read the weights of layer `number` but for its experts, and let go of those of the one before."""
        if self._number == number:
            return
        self.close()
        weights = self.weights.layer(number)
        self._number, self._dense = number, self.weights.parameters_of(weights.whole)
        for expert in range(AHEAD):
            self.weights.prefetch(weights, expert)
        self.set_layer(self.full, number, None)
        layer = self.full.layers[number]
        experts = {id(p) for p in expert_parameters(layer).values()}
        self.weights.check_complete(
            [
                f"{self.full.prefix}{number}.{n}"
                for n, p in layer.named_parameters()
                if p.is_meta and id(p) not in experts
            ]
        )

    def close(self) -> None:
        """Let go of the layer in memory."""
        if self._number is None:
            return
        for skeleton in self._skeletons.values():
            skeleton.forget(self._number)
        self.weights.release(self.weights.layer(self._number))
        self._number, self._dense = None, {}

    def _run_experts(self, module: nn.Module, *args: Tensor) -> Tensor:
        assert self._experts is not None
        return self._experts(module, *args)

    def _stored(self, module: nn.Module) -> Tensor:
        """The weight of the embedding or unembedding as stored: only what is looked up is read."""
        name = next(n for n, m in self.full.model.named_modules() if m is module) + ".weight"
        stored = self.weights.stored(name)
        if stored is None:
            self.weights.check_complete([name])
        assert stored is not None
        return stored

    def _set_outside(self) -> None:
        """Read what comes before and after the layers, but for the two tables of the vocabulary."""
        model, decoder = self.full.model, self.full.decoder
        unembedding = model.get_output_embeddings()
        tables = [self.full.embedding.weight, unembedding.weight]
        needed = {
            f"{self.full.decoder_prefix}{name}"
            for name, value in decoder.named_parameters()
            if not f"{self.full.decoder_prefix}{name}".startswith(self.full.prefix)
            and not any(value is table for table in tables)
        }
        name = next(n for n, m in model.named_modules() if m is unembedding)
        needed |= {f"{name}.{leaf}" for leaf, value in unembedding.named_parameters() if leaf != "weight"}
        wanted = [d for d in self.weights.outside.whole if self.full.parameters.target(d.name)[0] in needed]
        found = self.weights.parameters_of(wanted)
        for parameter, value in found.items():
            self.full.parameters.set(parameter, value)
        self.weights.check_complete(sorted(needed - set(found)))
        table = self.weights.stored(f"{name}.weight")
        if table is None and _tied(model.config):
            table = self._table
        self.weights.check_complete([] if table is not None else [f"{name}.weight"])
        assert table is not None
        unembedding.forward = partial(_unembed, unembedding, table)


def _tied(config: Any) -> bool:
    """Whether the unembedding is the embedding."""
    text = config.get_text_config()
    return bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))


def _unembed(module: nn.Module, table: Tensor, x: Tensor) -> Tensor:
    """x times the transposed `table`, converted some rows at a time."""
    parts = [
        torch.nn.functional.linear(x, rows.to(x.device, x.dtype))
        for rows in torch.split(table, VOCABULARY_ROWS)
    ]
    result = torch.cat(parts, dim=-1)
    bias = getattr(module, "bias", None)
    return result if bias is None else result + bias
