"""Compares models with the full one on the same texts, layer by layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from moe_surgery.checkpoint.checkpoint import open_folder
from moe_surgery.checkpoint.source import Folder
from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.families import FAMILIES, AnyFamily
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.quality.ask import MAX_NEW_TOKENS, Answered, Respondent, ask
from moe_surgery.quality.candidates import Candidate, pruned_candidate
from moe_surgery.quality.corpus import Passage, batches, open_corpus
from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality
from moe_surgery.quality.hidden_states import HiddenStates
from moe_surgery.quality.layers import LayerModel
from moe_surgery.quality.open_layers import open_layers
from moe_surgery.quality.own_layers import as_layers
from moe_surgery.quality.parts import ModelArguments
from moe_surgery.quality.questions import read_questions
from moe_surgery.quality.resume import default_context, identify, job_digest, stamp_digest
from moe_surgery.quality.text_files import Texts, as_text_files
from moe_surgery.runtime.load import load_model
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.text import Text
from moe_surgery.runtime.view import view
from moe_surgery.selection.arguments import Named, PathLike, load_pairs
from moe_surgery.selection.plan import Plan, check_top_k, load_plan, plan_keeping
from moe_surgery.surgery.routing import check_view
from moe_surgery.workers import Workers, everywhere

__all__ = ["Measured", "evaluate", "evaluate_passages", "measure", "results_of"]

BATCH_TOKENS = 8192
LOGIT_BYTES = 64 << 20
log = logging.getLogger("moe_surgery")


@dataclass(slots=True)
class _Sums:
    """Sums over predicted tokens of one domain (see `Quality`), and over routes per layer."""

    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    routes: list[int] = field(default_factory=list)
    rerouted: list[int] = field(default_factory=list)

    def quality(self, routes_known: bool) -> Quality:
        pairs = zip(self.rerouted, self.routes, strict=True)
        rerouted = tuple(changed / max(1, routes) for changed, routes in pairs) if routes_known else ()
        n = self.tokens
        return Quality(n, self.loss / n, max(0.0, self.kl / n), self.agreed / n, rerouted)

    def add(self, other: _Sums) -> None:
        self.tokens += other.tokens
        self.loss += other.loss
        self.kl += other.kl
        self.agreed += other.agreed
        self.routes = [a + b for a, b in zip(self.routes, other.routes, strict=True)]
        self.rerouted = [a + b for a, b in zip(self.rerouted, other.rerouted, strict=True)]


@dataclass(slots=True)
class Measured:
    """Sums of the full model and of candidates, in that order, by domain, and the experts and top-k of each layer."""

    sums: list[dict[str, _Sums]]
    counts: list[list[tuple[int, int]]]

    @classmethod
    def nothing(cls, models: int) -> Measured:
        return cls([{} for _ in range(models)], [[] for _ in range(models)])

    def add(self, other: Measured) -> None:
        """Add the sums over other passages."""
        self.counts = other.counts
        for mine, others in zip(self.sums, other.sums, strict=True):
            for domain, sums in others.items():
                if domain in mine:
                    mine[domain].add(sums)
                else:
                    mine[domain] = sums


def evaluate(
    checkpoint: PathLike | Folder,
    texts: Texts | None = None,
    *,
    answers: PathLike | Sequence[PathLike] = (),
    plans: Named[Plan] = (),
    pruned: Sequence[PathLike | Folder] = (),
    top_k: int | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    format: str | None = None,
    answers_only: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    replies: PathLike | None = None,
    batch_tokens: int = BATCH_TOKENS,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
    workers: Workers | None = None,
    progress: OnProgress | None = None,
) -> Evaluation:
    """Compare plans and pruned checkpoints with the full `checkpoint` on `texts`, by `answers` to questions, or both.

    Plans are (name, plan) pairs or paths, evaluated as views: nothing is written. All models go through
    one layer before the next is loaded, so memory holds one layer and each model's hidden states for a
    batch. `top_k` overrides the experts per token of plans and pruned checkpoints; without either, the
    full model with that top-k is compared with itself. `answers_only` counts only tokens of the
    conversations' answers. `texts`, `format`, `context` and `max_tokens` as for `profile`. `families` are the
    model families to recognise. `workers` do several batches at a time, and several groups of models where there are
    few batches; the figures are the same. `progress` is called with each `Progress`, in tokens finished by all models;
    split texts are reported as a warning on the logger "moe_surgery".

    `answers` are files of questions (`read_questions`): every model answers all of them greedily, in at most
    `max_new_tokens`, or chooses by likelihood, and is compared with the full model question by question
    (`Accuracy`). Without `texts` the models are compared on the questions and the full model's replies. Replies are
    appended to the file `replies` as they come, from which the same call resumes.

    Raises UsageError if there is nothing to predict or `top_k` is not in 1 to the number of experts kept,
    PlanMismatchError for a plan or checkpoint of another model, and any error of opening the checkpoint.
    """
    if batch_tokens < 1:
        raise UsageError(f"`batch_tokens` {batch_tokens}: must be at least 1")
    if texts is None and not answers:
        raise UsageError("nothing to compare on; pass `texts` or `answers`")
    if texts is None and (max_tokens is not None or answers_only):
        raise UsageError("`max_tokens` and `answers_only` need `texts`")
    named_plans = load_pairs(plans, Plan, load_plan)
    files = None if texts is None else as_text_files(texts, format)
    question_files = read_questions(answers)
    spec, source_identity = identify(checkpoint, families)
    if question_files:
        spec.require_description()
    model = open_layers(checkpoint, device, dtype, backend=backend, families=families)

    def load(path: PathLike | Folder, top_k: int | None = None) -> CausalLM:
        return load_model(path, device, dtype, backend=backend, top_k=top_k, families=families)

    whole = cache(lambda: load(checkpoint))

    respondents = [Respondent("full", "full", Candidate("full", None, model=model), whole)]
    if top_k is not None and not named_plans and not pruned:
        check_top_k(top_k, spec.experts, f"{checkpoint} has")
        named_plans = [(f"top-k {top_k}", plan_keeping(None, spec))]
    for name, named_plan in named_plans:
        plan = named_plan.with_top_k(top_k, name)
        check_view(spec, plan, str(checkpoint))
        viewed = Candidate(name, plan.layers, plan.top_k, None, dict(plan.provenance))
        key = job_digest([plan.layers, plan.top_k])
        respondents.append(Respondent(name, key, viewed, partial(_viewed, whole, plan)))
    for path in pruned:
        other = open_layers(path, device, dtype, backend=backend, top_k=top_k, families=families)
        with closing(open_folder(path)) as opened:
            candidate = pruned_candidate(str(path), opened, other, model, spec.layer_numbers)
        key = job_digest([stamp_digest(path), top_k])
        respondents.append(Respondent(str(path), key, candidate, partial(load, path, top_k)))
    candidates = [respondent.candidate for respondent in respondents[1:]]
    tokenizer = Text(checkpoint)
    limit = default_context(spec, context)
    answered: Answered | None = None
    if question_files:
        answered = ask(
            question_files,
            tokenizer,
            model,
            respondents,
            context=limit,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            stop_tokens=tokenizer.stop_tokens or None,
            file=None if replies is None else Path(replies),
            job=[stamp_digest(checkpoint), model.computation],
            progress=progress,
        )
        whole.cache_clear()
    passages: Iterable[Passage]
    if files is not None:
        passages = corpus = open_corpus(files, tokenizer, context=limit, max_tokens=max_tokens)
        read = corpus.texts
    else:
        assert answered is not None
        passages, read, answers_only = answered.passages(), answered.questions, True
    total = sum(len(p.tokens) for p in passages)  # reads all texts once, before the long work
    if files is not None and corpus.split:
        log.warning("%d texts are longer than %d tokens and were split", corpus.split, corpus.context)
    done = Counter(progress, "evaluate", total, "tokens")
    groups = batches(passages, batch_tokens)
    if workers is None:
        models = evaluate_passages(
            model, groups, candidates, answers_only=answers_only, progress=done.advance
        )
    else:
        from moe_surgery.quality.evaluate_parts import evaluate_spread

        computation = tuple(sorted(model.computation.items()))
        loaded = ModelArguments(
            everywhere(str(checkpoint)), device, dtype, backend, source_identity, computation
        )
        others: list[ModelArguments | None] = [None] * len(named_plans)
        others += [
            replace(
                loaded,
                checkpoint=everywhere(str(path)),
                identity=identify(path, families)[1],
                top_k=top_k,
            )
            for path in pruned
        ]
        models = evaluate_spread(
            workers,
            groups,
            -(-total // batch_tokens),
            loaded,
            [*zip(candidates, others, strict=True)],
            answers_only=answers_only,
            progress=done.advance,
        )
    if answered is not None:
        accuracies = answered.accuracies()
        models = tuple(replace(m, accuracy=a) for m, a in zip(models, accuracies, strict=True))
    settings: dict[str, object] = {
        **model.computation,
        "context": limit,
        "max_tokens": max_tokens,
        "answers_only": answers_only,
    }
    if answered is not None:
        settings["max_new_tokens"] = max_new_tokens
    return Evaluation(
        spec.model_type,
        str(checkpoint),
        source_identity,
        spec.experts,
        models,
        read,
        settings,
        answered.questions if answered else {},
    )


def _viewed(whole: Callable[[], CausalLM], plan: Plan) -> CausalLM:
    return view(whole(), plan)


def evaluate_passages(
    model: LayerModel | CausalLM,
    groups: Iterable[Sequence[Passage]],
    candidates: Sequence[Candidate],
    *,
    answers_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[ModelResult, ...]:
    """The full `model` and the candidates on batches of passages, in that order.

    Raises UsageError if there is no token to predict, InvalidInputError if a model's predictions
    are not finite (weights that overflow in the compute dtype). `progress` is called with each batch's tokens.
    """
    total = Measured.nothing(len(candidates) + 1)
    for passages in groups:
        total.add(measure(model, [passages], candidates, answers_only=answers_only, progress=progress))
    return results_of(total, candidates, answers_only)


@torch.inference_mode()
def measure(
    model: LayerModel | CausalLM,
    groups: Iterable[Sequence[Passage]],
    candidates: Sequence[Candidate],
    *,
    answers_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """The sums of the full `model` and the candidates over batches of passages."""
    model = as_layers(model)
    full = Candidate("full", (tuple(range(model.experts)),) * model.moe_layers, model=model)
    models = [full, *candidates]
    sums: list[dict[str, _Sums]] = [{} for _ in models]
    counts: list[list[tuple[int, int]]] = [[] for _ in models]  # experts and top-k of each MoE layer
    for passages in groups:
        targets = _targets(passages, answers_only)
        for per_domain in sums:
            for domain in targets.domains:
                zeros = [0] * model.moe_layers
                per_domain.setdefault(domain, _Sums(routes=list(zeros), rerouted=zeros))
        states = [(c.model or model).embed([p.tokens for p in passages]) for c in models]
        for number in range(model.depth):
            reference: Tensor | None = None
            for i, (candidate, state) in enumerate(zip(models, states, strict=True)):
                layer = candidate.enter(number, model, state)
                if layer is None:
                    continue
                if len(counts[i]) == layer.row:
                    counts[i].append((layer.experts, layer.top_k))
                ids = layer.apply()
                if reference is None:
                    reference = ids
                if candidate.kept is not None:
                    tail = range(model.experts, model.experts + layer.tail)
                    rerouted = _rerouted(ids, (*candidate.kept[layer.row], *tail), reference)
                    _count_routes(sums[i], targets, layer.row, rerouted)
        _compare(model, models, states, targets, sums)
        if progress:
            progress(states[0].tokens)
    return Measured(sums, counts)


def results_of(
    measured: Measured, candidates: Sequence[Candidate], answers_only: bool
) -> tuple[ModelResult, ...]:
    """The results of the full model and the candidates; raises as `evaluate_passages`."""
    sums, counts = measured.sums, measured.counts
    if not any(s.tokens for s in sums[0].values()):
        raise UsageError(
            "the texts have no token to predict"
            + (" in an answer of a conversation (`answers_only`)" if answers_only else "; give longer ones")
        )
    results = []
    full = Candidate("full", ((),))
    for i, (candidate, per_domain) in enumerate(zip([full, *candidates], sums, strict=True)):
        kind = "full" if i == 0 else ("plan" if candidate.model is None else "checkpoint")
        kept = tuple(n for n, _ in counts[i])
        for domain, s in per_domain.items():
            if not math.isfinite(s.loss + s.kl):
                raise InvalidInputError(
                    f"{candidate.name}: its predictions on domain {domain!r} are not finite; "
                    "try a larger `dtype`"
                )
        domains = {d: s.quality(candidate.kept is not None) for d, s in per_domain.items() if s.tokens}
        top_k = max(k for _, k in counts[i])
        results.append(ModelResult(candidate.name, kind, kept, top_k, domains, candidate.provenance))
    return tuple(results)


@dataclass(frozen=True, slots=True)
class _Targets:
    """Rows that predict, their next tokens and domains, int64 [predicted]; and for every row the domain
    whose routes it counts towards, -1 for none."""

    domains: list[str]
    rows: Tensor
    tokens: Tensor
    owner: Tensor
    row_owner: Tensor


def _targets(passages: Sequence[Passage], answers_only: bool) -> _Targets:
    domains: dict[str, int] = {}
    rows: list[int] = []
    tokens: list[int] = []
    owner: list[int] = []
    row_owner: list[int] = []
    start = 0
    for passage in passages:
        domain = domains.setdefault(passage.domain, len(domains))
        first = 1
        if answers_only:
            first = len(passage.tokens) if passage.answer is None else max(1, passage.answer)
        for position in range(first, len(passage.tokens)):
            rows.append(start + position - 1)
            tokens.append(passage.tokens[position])
            owner.append(domain)
        counted = range(first - 1, len(passage.tokens) - 1) if answers_only else range(len(passage.tokens))
        row_owner.extend(domain if row in counted else -1 for row in range(len(passage.tokens)))
        start += len(passage.tokens)
    return _Targets(
        list(domains), *(torch.tensor(x, dtype=torch.int64) for x in (rows, tokens, owner, row_owner))
    )


def _rerouted(ids: Tensor, kept: tuple[int, ...], reference: Tensor) -> Tensor:
    """Which routes go to experts that the full model did not choose for the token, bool [tokens, slots]."""
    source = torch.tensor(kept, dtype=torch.int64)[ids[:, : reference.shape[1]]]
    return ~(source[:, :, None] == reference[:, None, :]).any(dim=-1)


def _count_routes(sums: dict[str, _Sums], targets: _Targets, number: int, rerouted: Tensor) -> None:
    for i, domain in enumerate(targets.domains):
        in_domain = rerouted[targets.row_owner == i]
        sums[domain].rerouted[number] += int(in_domain.sum())
        sums[domain].routes[number] += in_domain.numel()


def _compare(
    model: LayerModel,
    models: Sequence[Candidate],
    states: Sequence[HiddenStates],
    targets: _Targets,
    sums: Sequence[dict[str, _Sums]],
) -> None:
    """Add the predictions of all models for the target rows to `sums`, a bounded piece at a time."""
    step = max(1, LOGIT_BYTES // (model.vocab_size * 4))
    for start in range(0, len(targets.rows), step):
        piece = slice(start, start + step)
        rows, owner = targets.rows[piece], targets.owner[piece]
        next_tokens = targets.tokens[piece].to(model.device)
        reference: Tensor | None = None
        for candidate, state, per_domain in zip(models, states, sums, strict=True):
            log_p = torch.log_softmax((candidate.model or model).logits(state[rows]), dim=-1)
            if reference is None:
                reference, probs, top_token = log_p, log_p.exp(), log_p.argmax(dim=-1)
            loss = -log_p.gather(1, next_tokens[:, None])[:, 0]
            kl = (probs * (reference - log_p)).sum(dim=-1)
            agreed = log_p.argmax(dim=-1) == top_token
            for i, domain in enumerate(targets.domains):
                in_domain = (owner == i).to(loss.device)
                total = per_domain[domain]
                total.tokens += int(in_domain.sum())
                total.loss += float(loss[in_domain].cpu().double().sum())
                total.kl += float(kl[in_domain].cpu().double().sum())
                total.agreed += int(agreed[in_domain].sum())
