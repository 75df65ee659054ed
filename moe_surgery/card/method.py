"""Card sections on which experts are kept, how they were chosen, and how to reproduce it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moe_surgery.card.facts import Facts
from moe_surgery.card.text import code, counted, fenced, ranges, table
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.shipped import is_shipped

__all__ = ["METHODS", "SOURCE", "method_section", "plan_section", "reproduce", "text_rows"]

METHODS: Mapping[str, str] = {
    "frequency": "how often the router chose it",
    "gate": "the sum of its routing weights",
    "ean_sum": "the sum of the norms of its outputs",
    "ean_mean": "the mean norm of its outputs over the tokens that chose it",
    "weighted_ean": "the sum of its output norms, each times its routing weight",
    "reap": "the mean of its output norms, each times its routing weight, over the tokens that chose it (REAP)",
    "ean_ca": "the norm of its mean output over the tokens that chose it",
    "rms_count": "how often the router chose it, times the root mean square of its down projection's input",
    "energy": "the squared norm of its output summed over tokens, as an importance matrix and the weights give it",
}
IMPORTED: Mapping[str, str] = {
    "imatrix": "importance matrices of llama.cpp",
    "counts": "counts that another program recorded",
}
SOURCE = "path/to/the/source"
MAX_ROWS = 60
MAX_LISTED_EXPERTS = 4096
_COVERED_KEYS = frozenset(
    {"method", "experts", "order", "seed", "generator", "ranking", "statistics", "domains", "tokens"}
    | {"texts", "checkpoint", "interleaved_with", "protect_super_experts"}
)


def method_section(facts: Facts) -> str:
    """Paragraphs on the choice, as far as the plan's provenance records it."""
    if facts.whole:
        return "All experts of the source are kept."
    provenance = facts.plan.provenance
    parts = [_method(facts.plan, provenance), *_data(provenance)]
    if provenance.get("protect_super_experts") is True:
        parts.append("Experts with outlier activations (REAP's rule) were kept regardless of their score.")
    if provenance.get("order") == "ranking":
        parts.append("They are numbered best first instead of in the source's order.")
    if facts.plan.mtp_layers is not None:
        parts.append(
            "Layers for multi-token prediction have as many experts (`mtp_layers` in the plan): unless they were "
            "given, those with the largest router rows, as nothing is measured on these layers."
            if facts.plan.mtp_layers
            else "Layers for multi-token prediction were left out."
        )
    rest = [
        f"- {code(key)}: {code(value)}"
        for key, value in list(provenance.items())[:MAX_ROWS]
        if key not in _COVERED_KEYS and isinstance(value, (str, int, float))
    ]
    if rest:
        parts.append("The plan also records:\n\n" + "\n".join(rest))
    return "\n\n".join(parts)


def _method(plan: Plan, provenance: Mapping[str, object]) -> str:
    kept = counted(len(plan.layers[0]), "expert")
    method = provenance.get("method")
    if method == "keep":
        return f"The {kept} of every layer were given explicitly (`--keep`), the same in each."
    if method == "random":
        return (
            f"The {kept} of every layer were chosen at random (seed {code(provenance.get('seed'))}), as a baseline to "
            "compare with."
        )
    if _from_published(provenance):
        return (
            f"The best {kept} of every layer in {code(provenance['ranking'])}, one of the rankings by routing "
            "frequency that were published for gpt-oss-20b (the GPT-OSS MoE ExpertFingerprinting project, Apache-2.0)."
        )
    if method == "ranking":
        return (
            f"The best {kept} of every layer in the ranking file {code(provenance.get('ranking'))}. How that ranking "
            "was made is not recorded."
        )
    if isinstance(method, str) and method in METHODS:
        return f"Each layer keeps the {kept} with the highest {code(method)}: {METHODS[method]}."
    if method == "reconstruction":
        return (
            f"Each layer keeps {kept} that together reproduce its output best: the others were removed one at a time, "
            "always the one whose loss changed the output least."
        )
    if method is None:
        return "How the experts were chosen is not recorded in the plan."
    return f"Method recorded in the plan: {code(method)}."


def _from_published(provenance: Mapping[str, object]) -> bool:
    """Whether the experts come from a ranking published:NAME."""
    named = provenance.get("ranking")
    return provenance.get("method") == "ranking" and isinstance(named, str) and is_shipped(named)


def _data(provenance: Mapping[str, object]) -> Iterator[str]:
    """The data behind the choice."""
    files, texts = provenance.get("statistics"), provenance.get("texts")
    if isinstance(files, list) and files:
        shown = ", ".join(code(name) for name in files[:3])
        more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
        yield (
            f"Based on {counted(len(files), 'file')} of published statistics: {shown}{more} (all are listed in "
            "`surgery.json`)."
        )
    settings = provenance.get("settings")
    if isinstance(settings, Mapping) and settings.get("source") in IMPORTED:
        imported = settings.get("files")
        shown = ", ".join(code(name) for name in imported[:3]) if isinstance(imported, list) else "files"
        yield f"Scores come from {IMPORTED[str(settings['source'])]}: {shown}."
    other = provenance.get("interleaved_with")
    if isinstance(other, Mapping):
        name = other.get("ranking") or other.get("method")
        yield f"That ranking is interleaved with a second one ({code(name)}), position by position."
    if isinstance(texts, Mapping) and texts:
        yield (
            "Measured on these texts:\n\n" + table(["domain", "texts", "tokens", "names"], text_rows(texts))
        )
    elif isinstance(provenance.get("domains"), list):
        shown = ", ".join(code(d) for d in provenance["domains"][:MAX_ROWS])  # type: ignore[index]
        yield f"Domains: {shown}."
    tokens_seen = provenance.get("tokens")
    if type(tokens_seen) is int:
        yield f"Tokens: {tokens_seen:,}."
    if (
        not isinstance(texts, Mapping)
        and "tokens" not in provenance
        and provenance.get("method") not in ("keep", "random")
        and not _from_published(provenance)
    ):
        yield "The texts behind the choice are not recorded."


def text_rows(texts: Mapping[str, object]) -> list[list[str]]:
    """Domain, number of texts, tokens and names, for files recorded by domain."""
    rows = []
    for domain, entries in list(texts.items())[:MAX_ROWS]:
        valid = [e for e in entries if isinstance(e, Mapping)] if isinstance(entries, list) else []
        tokens = [e["tokens"] for e in valid if isinstance(e.get("tokens"), int)]
        names = ", ".join(code(e.get("name")) for e in valid[:3]) + (", ..." if len(valid) > 3 else "")
        rows.append([code(domain), str(len(valid)), f"{sum(tokens):,}" if tokens else "", names])
    return rows


def plan_section(plan: Plan) -> str:
    """The kept experts of each layer, by their numbers in the source."""
    files = "`expert_mapping.json` maps old expert numbers to new ones; `surgery.json` has the whole plan."
    if sum(map(len, plan.layers)) > MAX_LISTED_EXPERTS:
        return files
    if len(set(plan.layers)) == 1:
        return f"Every layer keeps the source's experts {ranges(plan.layers[0])}. {files}"
    rows = [[str(layer), ranges(kept)] for layer, kept in zip(plan.numbers, plan.layers, strict=True)]
    body = table(["layer", "source experts"], rows, left=2)
    return f"<details>\n<summary>Kept experts of each layer</summary>\n\n{body}\n\n</details>\n\n{files}"


def reproduce(facts: Facts) -> str:
    """Commands that make the same tensors again."""
    source = facts.source_id or SOURCE
    dtype = (
        f" --store {facts.expert_format.name}"
        if facts.converted or facts.source.expert_format is None
        else ""
    )
    if facts.adapter is not None:
        names = " ".join(
            f"--{option} {facts.adapter[key]}"
            for option, key in (("numbering", "numbering"), ("rank-order", "rank_order"))
            if facts.adapter.get(key) in ("source", "expert")
        )
        merge = f"moe-surgery merge ADAPTER {source} OUT{dtype} {names}".rstrip()
        return "With the adapter the source gives the same tensors, byte for byte:\n\n" + fenced(merge, "sh")
    commands = [
        'python3 -c \'import json; print(json.dumps(json.load(open("surgery.json"))["plan"]))\' > plan.json',
        f"moe-surgery prune {source} OUT --plan plan.json{dtype}",
    ]
    same = "the same tensors but for the repaired ones" if facts.repair else "the same tensors"
    text = f"With the plan in `surgery.json` the source gives {same}, byte for byte:\n\n" + fenced(
        "\n".join(commands), "sh"
    )
    seed, kept = facts.plan.provenance.get("seed"), len(facts.plan.layers[0])
    if facts.plan.provenance.get("method") == "random" and type(seed) is int and seed >= 0:
        top_k = "" if facts.plan.top_k is None else f" --top-k {facts.plan.top_k}"
        command = f"moe-surgery plan {source} --random --experts {kept} --seed {seed}{top_k} -o plan.json"
        text += "\n\nThe plan itself comes from\n\n" + fenced(command, "sh")
    return text
