"""How to run a pruned checkpoint, and what not to expect of it."""

from __future__ import annotations

from moe_surgery.card.facts import Facts
from moe_surgery.card.text import fenced, size
from moe_surgery.surgery.serving import serving_notes

__all__ = ["limits_section", "usage_section"]

PATH = "path/to/this/folder"
_LOAD = f'''\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{PATH}"  # or its id on the hub
device = "cpu"  # "cuda" for a GPU, "mps" for Apple silicon
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=device)
'''
_CHAT = """\
messages = [{"role": "user", "content": "What is 7 + 5?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(device)
"""
_PROMPT = """\
inputs = tokenizer("What is 7 + 5?", return_tensors="pt").to(device)
"""
_GENERATE = """\
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))"""

_TRIED = "(moe-surgery's own tests run these lines on the CPU only.)"


def usage_section(facts: Facts) -> str:
    """transformers, vLLM and this tool."""
    asked = "--chat" if facts.has_template else "--prompt"
    python = _LOAD + (_CHAT if facts.has_template else _PROMPT) + _GENERATE
    generate = f'moe-surgery generate {PATH} {asked} "What is 7 + 5?" --device cpu  # or cuda, mps'
    parts = [
        "With transformers 5 and accelerate, nothing of moe-surgery installed:",
        fenced(python, "python"),
        _memory(facts),
        *_tokenizer(facts),
        "With vLLM, on a GPU:",
        fenced(f"vllm serve {PATH}", "sh"),
        *_notes(facts),
        "With moe-surgery, on CPU, MPS or GPU:",
        fenced(generate, "sh"),
    ]
    return "\n\n".join(parts)


def _memory(facts: Facts) -> str:
    if not facts.expert_format.packed:
        return f"The weights take {size(facts.tensor_bytes)} of memory on any device. {_TRIED}"
    return (
        f"On CPU and MPS transformers unpacks the MXFP4 weights to BF16, which takes {size(facts.bf16_bytes)} of "
        f"memory. On a GPU they stay packed ({size(facts.this.nbytes)}) where the packages `triton` (3.4 or later) "
        "and `kernels` are installed, else they are unpacked there too. moe-surgery keeps them packed everywhere. "
        + _TRIED
    )


def _tokenizer(facts: Facts) -> list[str]:
    if facts.has_tokenizer:
        return []
    return ["The source came without tokenizer files: take them from the model it descends from."]


def _notes(facts: Facts) -> list[str]:
    this, source = facts.this, facts.source
    assert this.top_k is not None
    known = this.top_k if source.top_k is None else source.top_k
    notes = serving_notes(facts.kept, this.top_k, known, facts.plan.top_k, expert_format=facts.expert_format)
    if not notes:
        return []
    return ["What is known to stand in the way of serving engines:\n\n" + "\n".join(f"- {n}" for n in notes)]


def _top_k_changed(facts: Facts) -> str:
    """A sentence on a top-k that is not the source's; empty where it is, or nothing records the source's."""
    mine, before = facts.this.top_k, facts.source.top_k
    if mine is None or before is None or mine == before:
        return ""
    reads = "less, and was trained with more" if mine < before else "more, and was trained with fewer"
    passes = f"A token passes through {mine} experts of each layer instead of {before}"
    return f"**Top-k differs.** {passes}: it reads {reads}."


def limits_section(facts: Facts, evaluated: bool) -> str:
    """What the cut does not do, and what nobody has looked at."""
    this = facts.this
    changed = _top_k_changed(facts)
    if facts.whole:
        rounding = (
            "`conversion` in `surgery.json` counts the blocks that MXFP4 could not hold exactly"
            if facts.converted and facts.expert_format.packed
            else ""
        )
        if not changed:
            first = "No expert was removed, so what is known of the source holds here"
            return first + (f", but for rounding: {rounding}." if rounding else ".")
        return "\n".join(
            f"- {line}"
            for line in (
                changed,
                f"**No expert was removed**, and no weight was trained{f'; {rounding}' if rounding else ''}.",
            )
        )
    lines = [
        "**No faster one token at a time.** A token still passes through "
        f"{this.top_k} experts of each layer, whatever the number to choose from: decoding a single sequence is about "
        "as fast as before. What shrinks is the memory, and with it the time where the source did not fit, or "
        "where a batch touches fewer different experts.",
        "**Worse off its domain.** Tokens that needed a removed expert go to another one. Expect the loss to be small "
        "at best on texts like those the choice was made on, and large elsewhere; a few experts less can be a cliff.",
        "**Nothing was retrained.** The router's rows of the removed experts are gone and the others are as they were; "
        "no weight was tuned to make up for the cut.",
        "**Safety not looked at.** Refusals and other trained-in behaviour may rest on removed experts. What was "
        "measured of the source in this respect says nothing about this model.",
    ]
    if changed:
        lines[0] = changed
    if evaluated:
        lines.append(
            "**Likelihoods, not benchmarks.** The figures above compare probabilities on texts; answers to tasks were "
            "not scored."
        )
    return "\n".join(f"- {line}" for line in lines)
