"""A model as profile, search and evaluate go through it: one layer after the other, all tokens at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_surgery.kernels.interface import MeasuredExperts
from moe_surgery.quality.hidden_states import CHUNK_TOKENS, HiddenStates, rows_buffer

if TYPE_CHECKING:
    from moe_surgery.quality.routing import Routing

__all__ = ["LayerModel", "MoeLayer", "Output", "routes_by_expert"]

Output = Callable[[Tensor, Tensor], Tensor]
"""The output [n, hidden] of one expert for tokens int64 [n], each in the slot int64 [n] of its choice, before its
routing weight."""


class MoeLayer(ABC):
    """An MoE layer that the tokens have reached: their experts are chosen, and have not been applied yet.

    `row` is its row of a plan. It has `experts`; the ids of `tail` further ones, which are no part of plans, follow.
    A token has `top_k`.
    """

    row: int
    experts: int
    top_k: int
    tail: int = 0
    weighted_input = False
    """Whether an expert gets its input times the routing weight, and its output is added as it is."""

    @property
    @abstractmethod
    def ids(self) -> Tensor:
        """The experts of each token, int64 [tokens, top_k]."""

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """Their routing weights, [tokens, top_k]."""

    @abstractmethod
    def restricted(self, kept: Sequence[int], top_k: int | None = None) -> MoeLayer:
        """The same layer with the experts `kept` alone, in that order; ids count them from 0."""

    @abstractmethod
    def expert(self, number: int) -> Output:
        """The expert `number`, whose weights stay in memory as long as the function."""

    @abstractmethod
    def finish(self, mixture: Tensor) -> None:
        """Complete the layer, with `mixture` [tokens, hidden] as the output of its experts."""

    @abstractmethod
    def routing(self) -> Routing:
        """How tokens would choose from fewer experts.

        Raises InvalidInputError for a router that `search` does not know.
        """

    @property
    @abstractmethod
    def hidden(self) -> int:
        """Components of an expert's output."""

    @property
    @abstractmethod
    def states(self) -> HiddenStates:
        """The hidden states: before the experts, and after `finish` those of the next layer."""

    def mixture(self) -> Tensor:
        """The weighted sum of the chosen experts' outputs, float32 [tokens, hidden]."""
        y = rows_buffer(self.states.tokens, self.hidden, torch.float32, self.states.device)
        for _, token, slot, output in self._outputs():
            y.index_add_(0, token.to(y.device), self.share(output, token, slot).to(y.device))
        return y

    def _outputs(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Chosen experts one after the other, with some of their tokens, the slots of these, and the outputs."""
        for number, tokens, slots in routes_by_expert(self.ids):
            expert = self.expert(number)
            for a in range(0, len(tokens), CHUNK_TOKENS):
                token, slot = tokens[a : a + CHUNK_TOKENS], slots[a : a + CHUNK_TOKENS]
                yield number, token, slot, expert(token, slot)

    def measured(self, owner: Tensor, sums: Tensor) -> MeasuredExperts:
        """`mixture`, and measures of each chosen expert's output, before its weight. Those of the tail are zero.

        `owner` int64 [tokens] on the CPU: each output is added to `sums`, float64 [domains, experts, hidden] on the
        CPU, in the row of its token's domain and its expert.
        """
        ids, device = self.ids, self.states.device
        y = rows_buffer(self.states.tokens, self.hidden, torch.float32, device)
        norms = torch.zeros(ids.shape, dtype=torch.float64)
        least, largest = torch.zeros(ids.shape), torch.zeros(ids.shape)
        for number, token, slot, out in self._outputs():
            y.index_add_(0, token.to(y.device), self.share(out, token, slot).to(y.device))
            if number >= self.experts:
                continue
            token, slot, out = token.cpu(), slot.cpu(), out.cpu().double()
            norms[token, slot] = torch.linalg.vector_norm(out, dim=1)
            least[token, slot], largest[token, slot] = (v.float() for v in out.aminmax(dim=1))
            for domain in torch.unique(owner[token]).tolist():
                sums[domain, number] += out[owner[token] == domain].sum(dim=0)
        return MeasuredExperts(y, norms, least, largest)

    def share(self, output: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        """What an expert's `output` for `tokens` adds to the mixture, float32."""
        if self.weighted_input:
            return output.float()
        return output.float() * self.weights[tokens, slots, None].float()

    def apply(self) -> Tensor:
        """Complete the layer with its own experts; the ids, on the CPU."""
        self.finish(self.mixture())
        return self.ids.cpu()


class LayerModel(ABC):
    """A model whose layers are in memory one at a time."""

    depth: int
    """Decoder layers, with and without experts."""
    moe_layers: int
    """Those with experts: the rows of a plan."""
    experts: int
    hidden_size: int
    vocab_size: int
    device: torch.device
    dtype: torch.dtype
    computation: dict[str, str]
    """The "backend", "device" and "dtype" that figures depend on."""

    @abstractmethod
    def embed(self, passages: Sequence[Sequence[int]]) -> HiddenStates:
        """Hidden states before the first layer, of passages of token ids."""

    @abstractmethod
    def enter(self, number: int, states: HiddenStates) -> MoeLayer | None:
        """Take `states` into layer `number`, up to its experts; None where it has none and is done.

        Passages attend only to themselves.
        """

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 [rows, vocabulary] of hidden states after the last layer."""


def routes_by_expert(ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that is chosen in `ids` [tokens, top_k], with its tokens (ascending) and their slots."""
    order = ids.flatten().argsort(stable=True)
    experts, counts = torch.unique_consecutive(ids.flatten()[order], return_counts=True)
    for expert, routes in zip(experts.tolist(), torch.split(order, counts.tolist()), strict=True):
        yield expert, routes // ids.shape[1], routes % ids.shape[1]
