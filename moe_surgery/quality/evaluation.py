"""Results of `evaluate`: figures of models compared with the full one, and their file format."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.kinds import EVALUATION, expects
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import describe_value
from moe_surgery.errors import InvalidInputError
from moe_surgery.quality.accuracy import Accuracy
from moe_surgery.selection.arguments import PathLike, load_if_path
from moe_surgery.selection.fields import is_integer

__all__ = ["EVALUATION_FORMAT", "Evaluation", "ModelResult", "Quality", "as_evaluation", "load_evaluation"]

EVALUATION_FORMAT = "moe-surgery.evaluation"
VERSION = 1
MAX_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Quality:
    """A model on the texts of one domain, over `tokens` predicted tokens.

    cross_entropy: mean negative log-likelihood, nats per token. kl: mean KL(full || this) of the next
    token's distribution, nats. agreement: share of tokens where the most likely token is the full
    model's. rerouted[layer] ("redirected" in files): share of (token, slot) routes to an expert that the
    full model did not choose for the token (by source number; if top-k differs, of the routes that
    the smaller has). The full model has kl 0, agreement 1, rerouted 0.
    """

    tokens: int
    cross_entropy: float
    kl: float
    agreement: float
    rerouted: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp(cross_entropy); infinite past double range."""
        return math.exp(self.cross_entropy) if self.cross_entropy < 709 else math.inf


@dataclass(frozen=True, slots=True)
class ModelResult:
    """Results of one model: the full one, a plan evaluated as a view, or a pruned checkpoint.

    `kind` is "full", "plan" or "checkpoint". `experts` are kept per layer. `provenance` is the
    plan's: `method`, `domains`, `seed` and so on; empty for the full model. `accuracy` is by domain of the
    questions; empty where none were asked.
    """

    name: str
    kind: str
    experts: tuple[int, ...]
    top_k: int
    domains: Mapping[str, Quality]
    provenance: Mapping[str, object] = field(default_factory=dict)
    accuracy: Mapping[str, Accuracy] = field(default_factory=dict)

    @property
    def overall(self) -> Quality:
        """All domains together, weighted by tokens."""
        return _pooled(self.domains.values())

    @property
    def overall_accuracy(self) -> Accuracy:
        """All questions together."""
        return Accuracy.pooled(list(self.accuracy.values()))

    @property
    def mean_experts(self) -> float:
        return sum(self.experts) / len(self.experts)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Models compared on the same texts; `models[0]` is the full one.

    `checkpoint` and `identity` are of the full model. `texts` lists the texts of each domain:
    {"name", "xxh3_128", "tokens"}. `settings`: dtype, backend, answers_only, context and the like. `questions` lists
    the questions of each domain: {"name", "xxh3_128", "questions"}; where they are also the texts, figures are of
    the full model's replies to them.
    """

    model_type: str
    checkpoint: str
    identity: str
    num_experts: int
    models: tuple[ModelResult, ...]
    texts: Mapping[str, list[dict[str, object]]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    questions: Mapping[str, list[dict[str, object]]] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        return sorted(self.models[0].domains)

    def as_dict(self) -> dict[str, object]:
        """The evaluation as the JSON object of its file form (version 1)."""
        return {
            "format": EVALUATION_FORMAT,
            "version": VERSION,
            "model_type": self.model_type,
            "checkpoint": self.checkpoint,
            "identity": self.identity,
            "num_experts": self.num_experts,
            "texts": dict(self.texts),
            "settings": dict(self.settings),
            **({"questions": dict(self.questions)} if self.questions else {}),
            "models": [
                {
                    "name": m.name,
                    "kind": m.kind,
                    "experts": list(m.experts),
                    "top_k": m.top_k,
                    "provenance": dict(m.provenance),
                    "overall": _quality_dict(m.overall),
                    "domains": {d: _quality_dict(q) for d, q in m.domains.items()},
                    **_accuracy_dict(m),
                }
                for m in self.models
            ],
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"


def as_evaluation(evaluation: Evaluation | PathLike) -> Evaluation:
    """`evaluation`, or the one in the file of that path."""
    return load_if_path(evaluation, Evaluation, load_evaluation)


@expects("an evaluation", EVALUATION)
def load_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read an evaluation file.

    Raises InvalidInputError for another format, an unknown version or missing figures, OutputError
    if the file cannot be read.
    """
    where = printable_path(path)
    root = parse_json(
        read_small_file(path, limit=MAX_BYTES, what="an evaluation"), where=where, allow_floats=True
    )
    if not isinstance(root, dict) or root.get("format") != EVALUATION_FORMAT:
        raise InvalidInputError(
            f'{where}: not an evaluation: expected a JSON object with "format": "{EVALUATION_FORMAT}"'
        )
    if not is_integer(root.get("version"), VERSION):
        raise InvalidInputError(
            f"{where}: evaluation version {describe_value(root.get('version'))} is unknown (supported: "
            f"{VERSION}); upgrade moe-surgery"
        )
    try:
        models = tuple(_model_result(m) for m in root["models"])
        if not models or models[0].kind != "full":
            raise ValueError("models must start with the full one")
        texts, settings, questions = root["texts"], root["settings"], root.get("questions", {})
        if not isinstance(texts, dict) or not isinstance(settings, dict) or not isinstance(questions, dict):
            raise ValueError("texts, settings and questions must be objects")
        for listed in (*texts.values(), *questions.values()):
            if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
                raise ValueError("texts and questions must be lists of objects")
        return Evaluation(
            str(root["model_type"]),
            str(root["checkpoint"]),
            str(root["identity"]),
            int(root["num_experts"]),
            models,
            texts,
            settings,
            questions,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(f"{where}: incomplete evaluation: {error}") from None


def _accuracy_dict(model: ModelResult) -> dict[str, object]:
    if not model.accuracy:
        return {}
    by_domain = {domain: accuracy.as_dict() for domain, accuracy in model.accuracy.items()}
    return {"answers": {"overall": model.overall_accuracy.as_dict(), "domains": by_domain}}


def _quality_dict(quality: Quality) -> dict[str, object]:
    figures = asdict(quality)
    figures["redirected"] = figures.pop("rerouted")
    return figures | {"perplexity": quality.perplexity if math.isfinite(quality.perplexity) else None}


def _model_result(m: Mapping[str, object]) -> ModelResult:
    domains, experts, top_k = m["domains"], m["experts"], m["top_k"]
    provenance = m["provenance"]
    if not isinstance(domains, dict) or not domains or not isinstance(provenance, dict):
        raise ValueError("domains and provenance must be objects")
    if not isinstance(experts, list) or not experts or not all(type(n) is int and n > 0 for n in experts):
        raise ValueError("experts must be a list of positive integers")
    if type(top_k) is not int or top_k < 1:
        raise ValueError("top_k must be a positive integer")
    qualities = {str(name): _quality(q, len(experts)) for name, q in domains.items()}
    if len({len(quality.rerouted) for quality in qualities.values()}) > 1:
        raise ValueError("redirected is missing for some domains")
    accuracy = {}
    if "answers" in m:
        answers = m["answers"]
        if (
            not isinstance(answers, dict)
            or not isinstance(answers["domains"], dict)
            or not answers["domains"]
        ):
            raise ValueError("answers must be an object with domains")
        accuracy = {str(domain): Accuracy.read(found) for domain, found in answers["domains"].items()}
    return ModelResult(str(m["name"]), str(m["kind"]), tuple(experts), top_k, qualities, provenance, accuracy)


def _quality(q: Mapping[str, object], layers: int) -> Quality:
    rerouted, tokens = q["redirected"], q["tokens"]
    if not isinstance(rerouted, list) or len(rerouted) not in (0, layers):
        raise ValueError(f"redirected must list {layers} layers or none")
    if type(tokens) is not int or tokens < 1:
        raise ValueError("tokens must be a positive integer")
    loss, kl, agreement = (_number(q[key], key) for key in ("cross_entropy", "kl", "agreement"))
    return Quality(tokens, loss, kl, agreement, tuple(_number(x, "redirected") for x in rerouted))


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name} must be a number of at least 0")
    return float(value)


def _pooled(parts: Iterable[Quality]) -> Quality:
    rows = list(parts)
    tokens = sum(q.tokens for q in rows)

    def mean(values: Iterable[float]) -> float:
        return sum(q.tokens * v for q, v in zip(rows, values, strict=True)) / tokens

    return Quality(
        tokens,
        mean(q.cross_entropy for q in rows),
        mean(q.kl for q in rows),
        mean(q.agreement for q in rows),
        tuple(mean(layer) for layer in zip(*(q.rerouted for q in rows), strict=True)),
    )
