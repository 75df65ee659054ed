"""Traces a text through a model: the experts of every token, and what plans change there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moe_surgery.checkpoint.source import Folder
from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.families import FAMILIES, AnyFamily
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.quality.candidates import Candidate
from moe_surgery.quality.hidden_states import HiddenStates
from moe_surgery.quality.layerwise import apply_attention, apply_experts, embed, logits_of
from moe_surgery.quality.resume import identify_runnable
from moe_surgery.quality.routing_trace import ModelTrace, Trace
from moe_surgery.runtime.generate import clamp_new_tokens, generate
from moe_surgery.runtime.load import load_model
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.text import Text
from moe_surgery.selection.arguments import Named, PathLike, load_pairs
from moe_surgery.selection.plan import Plan, load_plan

__all__ = ["trace"]

LOGIT_BYTES = 64 << 20


def trace(
    checkpoint: PathLike | Folder,
    prompt: str | None = None,
    *,
    chat: str | None = None,
    generate: int | None = None,
    plans: Named[Plan] = (),
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
    progress: OnProgress | None = None,
) -> Trace:
    """The experts that each token of `prompt` is routed to, by the full model and with each of `plans`.

    `chat` instead of `prompt` is a user message, rendered by the checkpoint's chat template. With `generate`
    the full model first continues the text (greedily, by at most that many tokens). `plans` are (name, plan)
    pairs or paths; all models go through the same tokens, one layer after the other, so memory holds one layer
    and each model's hidden states. `device`, `dtype` and `backend` as for `load_model`. `families` are
    the model families to recognise. `progress` is called with each `Progress`.

    Raises UsageError for an empty text or one beyond the model's context, PlanMismatchError for a plan of
    another model, InvalidInputError if predictions are not finite, and any error of opening the checkpoint.
    """
    named_plans = load_pairs(plans, Plan, load_plan)
    if (prompt is None) == (chat is None):
        raise UsageError("give one of `prompt` and `chat`")
    spec, source_identity = identify_runnable(checkpoint, families)
    candidates = [Candidate("full", (tuple(range(spec.experts)),) * spec.layers)]
    for name, plan in named_plans:
        plan.check_fits(spec.model_type, spec.experts, spec.layers, str(checkpoint))
        candidates.append(Candidate(name, plan.layers, plan.top_k, None, dict(plan.provenance)))
    text = Text(checkpoint)
    if chat is not None:
        prompt = text.chat([{"role": "user", "content": chat}])
    assert prompt is not None
    tokens = text.encode(prompt)
    if not tokens:
        raise UsageError("the prompt is empty; give at least one token")
    prompt_tokens = len(tokens)
    model = load_model(checkpoint, device, dtype, backend=backend, one_layer=True, families=families)
    limit = model.config.max_position_embeddings
    if prompt_tokens > limit:
        raise UsageError(f"the prompt has {prompt_tokens} tokens; this model supports 1 to {limit}")
    if generate is not None:
        full = load_model(checkpoint, device, dtype, backend=backend, families=families)
        tokens += _continuation(full, tokens, generate, text.stop_tokens or None, progress)
        del full
    done = Counter(progress, "trace", len(tokens) * spec.layers * len(candidates), "tokens x layers")
    runs = _routed(model, tokens, candidates, done)
    _predict(model, tokens, runs)
    models = []
    for i, run in enumerate(runs):
        if not np.isfinite(np.concatenate([run.loss, run.kl])).all():
            raise InvalidInputError(
                f"{run.candidate.name}: its predictions are not finite; try a larger `dtype`"
            )
        models.append(run.finished("plan" if i else "full", text))
    settings: dict[str, object] = {**model.computation, "chat": chat is not None, "generate": generate}
    return Trace(
        spec.model_type,
        str(checkpoint),
        source_identity,
        spec.experts,
        spec.top_k,
        tuple(tokens),
        tuple(text.pieces(tokens)),
        prompt_tokens,
        tuple(models),
        settings,
    )


def _continuation(
    model: CausalLM,
    tokens: list[int],
    most: int,
    stop_tokens: Sequence[int] | None,
    progress: OnProgress | None,
) -> list[int]:
    """The model's greedy continuation of `tokens`, by at most `most` tokens."""
    if most < 1:
        raise UsageError(f"`generate` {most}: must be at least 1")
    done = Counter(progress, "generate", clamp_new_tokens(model, len(tokens), most, None), "tokens")
    generated = generate(
        model, [tokens], max_new_tokens=most, stop_tokens=stop_tokens, callback=lambda _: done.advance(1)
    )
    return generated.tokens[0]


@dataclass(slots=True)
class _Run:
    """One model's hidden states, and what is recorded of it so far; fields as in `ModelTrace`."""

    candidate: Candidate
    states: HiddenStates
    experts: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)

    def finished(self, kind: str, text: Text) -> ModelTrace:
        kept = self.candidate.kept
        assert kept is not None
        slots = max(ids.shape[1] for ids in self.experts)
        shape = (len(self.experts), self.states.tokens, slots)
        experts, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for number, (ids, shares) in enumerate(zip(self.experts, self.weights, strict=True)):
            experts[number, :, : ids.shape[1]] = np.asarray(kept[number], np.int32)[ids.numpy()]
            weights[number, :, : ids.shape[1]] = shares.float().numpy()
        texts = {token: text.pieces([token])[0] for token in set(self.predicted)}
        return ModelTrace(
            self.candidate.name,
            kind,
            kept,
            experts,
            weights,
            np.array(self.loss),
            np.array(self.kl),
            tuple(self.predicted),
            tuple(texts[token] for token in self.predicted),
            np.array(self.probability),
            self.candidate.provenance,
        )


@torch.inference_mode()
def _routed(
    model: CausalLM, tokens: Sequence[int], candidates: Sequence[Candidate], done: Counter
) -> list[_Run]:
    """Every candidate after the last layer, with its routes recorded."""
    runs = [_Run(candidate, embed(model, [tokens])) for candidate in candidates]
    for number in range(len(model.layers)):
        full_layer = model.layers[number]
        for i, run in enumerate(runs):
            layer = run.candidate.layer(number, full_layer) if i else full_layer
            apply_attention(model, number, layer, run.states)
            ids, weights = apply_experts(model, layer, run.states)
            run.experts.append(ids)
            run.weights.append(weights)
            done.advance(len(tokens))
    return runs


@torch.inference_mode()
def _predict(model: CausalLM, tokens: Sequence[int], runs: Sequence[_Run]) -> None:
    """Record what each model predicts after every token, a bounded piece at a time; the first is the full one."""
    step = max(1, LOGIT_BYTES // (model.config.vocab_size * 4))
    for start in range(0, len(tokens), step):
        next_tokens = torch.tensor(tokens[start + 1 : start + step + 1], device=model.device)
        reference: Tensor | None = None
        for run in runs:
            log_p = torch.log_softmax(logits_of(model, run.states[slice(start, start + step)]), dim=-1)
            if reference is None:
                reference, probs = log_p, log_p.exp()
            kl = (probs * (reference - log_p)).sum(dim=-1).clamp(min=0)
            top, predicted = log_p.max(dim=-1)
            followed = log_p[: len(next_tokens)]  # not the text's last token
            run.loss += (-followed.gather(1, next_tokens[:, None])[:, 0]).tolist()
            run.kl += kl.tolist()
            run.predicted += predicted.tolist()
            run.probability += top.exp().tolist()
