"""The full model's next-token distributions, as the likeliest tokens and the mass of all others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.writer import write_file
from moe_surgery.quality.layerwise import apply_attention, apply_experts, embed, logits_of
from moe_surgery.quality.repair.samples import Sample, token_batches
from moe_surgery.runtime.model import CausalLM

__all__ = ["TOP_TOKENS", "Targets", "compute_targets", "divergence", "predicting_rows", "top_tokens"]

TOP_TOKENS = 64
BATCH_TOKENS = 8192
LOGIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Targets:
    """Distributions over the next token, one a row: `ids` int32 and `log_p` float32 [rows, top] of the likeliest
    tokens, and `rest` float32 [rows], the logarithm of the probability of all others (-inf for none)."""

    ids: Tensor
    log_p: Tensor
    rest: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Targets:
        return Targets(self.ids[rows], self.log_p[rows], self.rest[rows])

    def to(self, device: torch.device) -> Targets:
        return Targets(self.ids.to(device), self.log_p.to(device), self.rest.to(device))

    def of(self, samples: Sequence[Sample]) -> Targets:
        """The rows of `samples`, one sample after another."""
        rows = [torch.arange(s.row, s.row + s.count) for s in samples]
        return self[torch.cat(rows)]


def top_tokens(logits: Tensor, top: int) -> Targets:
    """The distributions of `logits` float32 [rows, vocabulary], with the `top` likeliest tokens (at most all)."""
    top = min(top, logits.shape[1])
    log_z = logits.logsumexp(dim=-1)
    values, ids = logits.topk(top, dim=-1)
    others = logits.scatter(1, ids, float("-inf")).logsumexp(dim=-1)
    return Targets(ids.to(torch.int32), values - log_z[:, None], others - log_z)


def divergence(logits: Tensor, targets: Targets) -> Tensor:
    """KL(targets || softmax(logits)) in nats, [rows], for logits float32 [rows, vocabulary].

    Tokens outside the stored ones count as one: never more than the whole divergence, and equal to it where all
    tokens are stored.
    """
    ids, log_p, rest = targets.ids.long(), targets.log_p, targets.rest
    log_z = logits.logsumexp(dim=-1)
    log_q = logits.gather(1, ids) - log_z[:, None]
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    if ids.shape[1] == logits.shape[1]:
        return kl
    others = logits.scatter(1, ids, float("-inf")).logsumexp(dim=-1) - log_z
    return kl + rest.exp() * (rest.clamp(min=-1e4) - others)


def compute_targets(
    model: CausalLM,
    samples: Sequence[Sample],
    file: Path,
    job: str,
    *,
    top: int = TOP_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Targets:
    """The full model's distributions for what `samples` (with their rows) predict, kept in `file`.

    A batch at a time goes through the model, layer by layer, and `file` is written again after each; the same `job`
    begins after the last one. `progress` is called with the tokens of each batch, those of an earlier run first.
    """
    groups = list(token_batches(samples, BATCH_TOKENS))
    parts, done = _load(file, job)
    if progress and done:
        progress(sum(len(s.tokens) for group in groups[:done] for s in group))
    for number, group in enumerate(groups[done:], done + 1):
        parts.append(_batch_targets(model, group, top))
        parts = [_joined(parts)]
        _save(parts[0], file, job, number)
        if progress:
            progress(sum(len(s.tokens) for s in group))
    return _joined(parts)


def _batch_targets(model: CausalLM, samples: Sequence[Sample], top: int) -> Targets:
    t = _inferred_targets(model, samples, top)
    return Targets(t.ids.clone(), t.log_p.clone(), t.rest.clone())  # that autograd and safetensors accept


@torch.inference_mode()
def _inferred_targets(model: CausalLM, samples: Sequence[Sample], top: int) -> Targets:
    states = embed(model, [s.tokens for s in samples])
    for number in range(len(model.layers)):
        layer = model.layers[number]
        apply_attention(model, number, layer, states)
        apply_experts(model, layer, states)
    rows = predicting_rows(samples)
    step = max(1, LOGIT_BYTES // (model.config.vocab_size * 4))
    parts = [
        top_tokens(logits_of(model, states[r]), top).to(torch.device("cpu")) for r in torch.split(rows, step)
    ]
    return _joined(parts)


def predicting_rows(samples: Sequence[Sample]) -> Tensor:
    """Where in the tokens of `samples`, one after another, the counted predictions are made: int64 [rows]."""
    rows, start = [], 0
    for sample in samples:
        rows.append(torch.arange(start + sample.start, start + sample.start + sample.count))
        start += len(sample.tokens)
    return torch.cat(rows)


def _joined(parts: Sequence[Targets]) -> Targets:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*((t.ids, t.log_p, t.rest) for t in parts), strict=True)
    ids, log_p, rest = (torch.cat(column) for column in columns)
    return Targets(ids, log_p, rest)


def _save(targets: Targets, file: Path, job: str, batches: int) -> None:
    from safetensors.torch import save

    tensors = {"ids": targets.ids, "log_p": targets.log_p, "rest": targets.rest}
    metadata = {"moe_surgery": json.dumps({"job": job, "batches": batches})}
    write_file(file, save(tensors, metadata), FileOps())


def _load(file: Path, job: str) -> tuple[list[Targets], int]:
    """The targets of batches that an earlier run of this job finished, and their number."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            state = json.loads((opened.metadata() or {})["moe_surgery"])
            if state["job"] != job:
                return [], 0
            names = ("ids", "log_p", "rest")
            return [Targets(*(opened.get_tensor(name) for name in names))], int(state["batches"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return [], 0
