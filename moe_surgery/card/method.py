"""How the kept experts were chosen, which they are, and how to choose them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moe_surgery.card.facts import Facts
from moe_surgery.card.text import code, counted, fenced, ranges, table
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.shipped import is_shipped

__all__ = ["METHODS", "SOURCE", "chosen", "plan_section", "remade"]

METHODS: Mapping[str, str] = {
    "frequency": "how often the router chose it",
    "gate": "the sum of the routing weights it was given",
    "ean_sum": "the sum of the norms of its outputs",
    "ean_mean": "the mean norm of its outputs where it was chosen",
    "weighted_ean": "the sum of its outputs' norms, each times its routing weight",
    "reap": "the mean of its outputs' norms, each times its routing weight, where it was chosen (REAP)",
    "ean_ca": "the norm of its mean output where it was chosen",
}
SOURCE = "path/to/the/source"
MAX_ROWS = 60
MAX_SHOWN_EXPERTS = 4096
_TOLD = frozenset(
    {"method", "experts", "order", "seed", "generator", "ranking", "statistics", "domains", "tokens"}
    | {"texts", "checkpoint", "interleaved_with", "protect_super_experts"}
)


def chosen(facts: Facts) -> str:
    """Paragraphs on the choice, from the plan's provenance as far as it goes."""
    if facts.whole:
        return "Nothing was chosen: every expert of the source is here."
    said = facts.plan.provenance
    parts = [_method(facts.plan, said), *_data(said)]
    if said.get("protect_super_experts") is True:
        parts.append("Experts with outlying activations (REAP's rule) were kept whatever their score.")
    if said.get("order") == "ranking":
        parts.append("They are numbered best first; without that they would keep the source's order.")
    rest = [
        f"- {code(key)}: {code(value)}"
        for key, value in list(said.items())[:MAX_ROWS]
        if key not in _TOLD and isinstance(value, (str, int, float))
    ]
    if rest:
        parts.append("The plan also records:\n\n" + "\n".join(rest))
    return "\n\n".join(parts)


def _method(plan: Plan, said: Mapping[str, object]) -> str:
    kept = counted(len(plan.layers[0]), "expert")
    method = said.get("method")
    if method == "keep":
        return f"The {kept} of every layer were named by hand, the same in each."
    if method == "random":
        return (
            f"The {kept} of every layer were drawn at random (seed {code(said.get('seed'))}), without looking at "
            "the model: a baseline to compare choices with, not a choice."
        )
    if _from_published(said):
        return (
            f"The first {kept} of every layer in {code(said['ranking'])}, one of the rankings by routing frequency "
            "that were published for gpt-oss-20b (the GPT-OSS MoE ExpertFingerprinting project, Apache-2.0)."
        )
    if method == "ranking":
        return (
            f"The first {kept} of every layer in the ranking file {code(said.get('ranking'))}. How that ranking was "
            "made is not recorded."
        )
    if isinstance(method, str) and method in METHODS:
        return f"Each layer keeps the {kept} with the highest {code(method)}: {METHODS[method]}."
    if method == "reconstruction":
        return (
            f"Each layer keeps {kept} that together rebuild its output best: the others were dropped one "
            "after the other, each time the one that changed the output least given what was left."
        )
    if method is None:
        return "How the experts were chosen is not recorded: the plan does not say."
    return f"The plan says it was made by {code(method)}."


def _from_published(said: Mapping[str, object]) -> bool:
    """Whether the choice is the first experts of a ranking `published:NAME`."""
    named = said.get("ranking")
    return said.get("method") == "ranking" and isinstance(named, str) and is_shipped(named)


def _data(said: Mapping[str, object]) -> Iterator[str]:
    """What the choice looked at."""
    files, texts = said.get("statistics"), said.get("texts")
    if isinstance(files, list) and files:
        shown = ", ".join(code(name) for name in files[:3])
        more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
        yield (
            f"Counted over {counted(len(files), 'file')} of published statistics: {shown}{more} (all are "
            "named in `surgery.json`)."
        )
    other = said.get("interleaved_with")
    if isinstance(other, Mapping):
        name = other.get("ranking") or other.get("method")
        yield f"That ranking, first, is interleaved with a second one ({code(name)}), position by position."
    if isinstance(texts, Mapping) and texts:
        rows = []
        for domain, entries in list(texts.items())[:MAX_ROWS]:
            known = [e for e in entries if isinstance(e, Mapping)] if isinstance(entries, list) else []
            tokens = [e["tokens"] for e in known if isinstance(e.get("tokens"), int)]
            names = ", ".join(code(e.get("name")) for e in known[:3]) + (", ..." if len(known) > 3 else "")
            rows.append([code(domain), str(len(known)), f"{sum(tokens):,}" if tokens else "", names])
        yield ("Measured on these texts:\n\n" + table(["domain", "texts", "tokens", "named"], rows))
    elif isinstance(said.get("domains"), list):
        shown = ", ".join(code(d) for d in said["domains"][:MAX_ROWS])  # type: ignore[index]
        yield f"Domains: {shown}."
    tokens_seen = said.get("tokens")
    if type(tokens_seen) is int:
        yield f"Tokens seen: {tokens_seen:,}."
    if (
        not isinstance(texts, Mapping)
        and "tokens" not in said
        and said.get("method") not in ("keep", "random")
        and not _from_published(said)
    ):
        yield "Which texts stand behind the choice is not recorded."


def plan_section(plan: Plan) -> str:
    """The kept experts of each layer, by their numbers in the source."""
    told = "`expert_mapping.json` says which number each kept expert has now, `surgery.json` holds the plan whole."
    if sum(map(len, plan.layers)) > MAX_SHOWN_EXPERTS:
        return told
    if len(set(plan.layers)) == 1:
        return f"Every layer keeps the source's experts {ranges(plan.layers[0])}. {told}"
    rows = [[str(layer), ranges(kept)] for layer, kept in enumerate(plan.layers)]
    body = table(["layer", "experts of the source"], rows, left=2)
    return f"<details>\n<summary>Kept experts of each layer</summary>\n\n{body}\n\n</details>\n\n{told}"


def remade(facts: Facts) -> str:
    """Commands that make the same tensors again."""
    source = facts.source_id or SOURCE
    dtype = (
        f" --store {facts.expert_format.name}"
        if facts.converted or facts.source.expert_format is None
        else ""
    )
    commands = [
        'python3 -c \'import json; print(json.dumps(json.load(open("surgery.json"))["plan"]))\' > plan.json',
        f"moe-surgery prune {source} OUT --plan plan.json{dtype}",
    ]
    text = "The same tensors come from the source by the plan in `surgery.json`, byte for byte:\n\n" + fenced(
        "\n".join(commands), "sh"
    )
    seed, kept = facts.plan.provenance.get("seed"), len(facts.plan.layers[0])
    if facts.plan.provenance.get("method") == "random" and type(seed) is int and seed >= 0:
        top_k = "" if facts.plan.top_k is None else f" --top-k {facts.plan.top_k}"
        command = f"moe-surgery plan {source} --random --experts {kept} --seed {seed}{top_k} -o plan.json"
        text += "\n\nand the plan itself by\n\n" + fenced(command, "sh")
    return text
