"""Card sections on how to run a pruned checkpoint, and its limits."""

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

_TUNED = (
    "**Repaired on few texts.** Small tensors were tuned to compensate on the texts named above; elsewhere that may "
    "help or harm."
)
_NOT_TUNED = (
    "**Nothing was retrained.** The removed experts' router rows are gone and the others are unchanged; no weight was "
    "tuned to compensate."
)
_TESTED = "(moe-surgery's tests run this code on the CPU only.)"


def usage_section(facts: Facts) -> str:
    """transformers, vLLM and this tool."""
    option = "--chat" if facts.has_template else "--prompt"
    python = _LOAD + (_CHAT if facts.has_template else _PROMPT) + _GENERATE
    generate = f'moe-surgery generate {PATH} {option} "What is 7 + 5?" --device cpu  # or cuda, mps'
    parts = [
        "With transformers 5 and accelerate (moe-surgery is not needed):",
        fenced(python, "python"),
        _memory(facts),
        *_tokenizer(facts),
        "With vLLM, on a GPU (not tested by moe-surgery):",
        fenced(f"vllm serve {PATH}", "sh"),
        *_notes(facts),
    ]
    if facts.gpt_oss:
        parts += ["With moe-surgery (tested on the CPU):", fenced(generate, "sh")]
    return "\n\n".join(parts)


def _memory(facts: Facts) -> str:
    if not facts.gpt_oss:
        return f"The weights take {size(facts.tensor_bytes)}; programs that unpack quantised ones need more memory."
    if not facts.expert_format.packed:
        return f"The weights take {size(facts.tensor_bytes)} of memory on any device. {_TESTED}"
    return (
        f"On CPU and MPS transformers unpacks the MXFP4 weights to BF16, which takes {size(facts.bf16_bytes)} of "
        f"memory. On a GPU they stay packed ({size(facts.this.nbytes)}) if the packages `triton` (3.4 or later) and "
        "`kernels` are installed, otherwise they are unpacked there too. moe-surgery always keeps them packed. "
        + _TESTED
    )


def _tokenizer(facts: Facts) -> list[str]:
    if facts.has_tokenizer:
        return []
    return ["The source has no tokenizer files: take them from the model it is based on."]


def _notes(facts: Facts) -> list[str]:
    this, source = facts.this, facts.source
    assert this.top_k is not None
    source_top_k = this.top_k if source.top_k is None else source.top_k
    notes = serving_notes(
        facts.kept,
        this.top_k,
        source_top_k,
        facts.plan.top_k,
        expert_format=facts.expert_format,
        gpt_oss=facts.gpt_oss,
        model_type=facts.model_type,
    )
    if not notes:
        return []
    return ["Known problems with serving engines:\n\n" + "\n".join(f"- {n}" for n in notes)]


def _top_k_changed(facts: Facts) -> str:
    """A sentence on a changed top-k; empty if it is the source's, or the source's is not recorded."""
    now, before = facts.this.top_k, facts.source.top_k
    if now is None or before is None or now == before:
        return ""
    reads = "less than the model was trained with" if now < before else "more than the model was trained with"
    return f"**Top-k changed.** A token uses {now} experts per layer instead of {before}: it reads {reads}."


def limits_section(facts: Facts, evaluated: bool) -> str:
    """What pruning does not do, and what was not measured."""
    this = facts.this
    changed = _top_k_changed(facts)
    if facts.whole:
        rounding = (
            "`conversion` in `surgery.json` counts the blocks that are not exact in MXFP4"
            if facts.converted and facts.expert_format.packed
            else ""
        )
        if not changed:
            first = "No expert was removed, so what is known about the source applies here"
            return first + (f", except for rounding: {rounding}." if rounding else ".")
        return "\n".join(
            f"- {line}"
            for line in (
                changed,
                f"**No expert was removed**, and nothing was trained{f'; {rounding}' if rounding else ''}.",
            )
        )
    lines = [
        f"**Not faster one token at a time.** A token still uses {this.top_k} experts per layer, however many are "
        "kept: decoding a single sequence is about as fast as before. What shrinks is the memory, and "
        "with it the time if the source did not fit, or if a batch uses fewer different experts.",
        "**Worse outside its domain.** Tokens that needed a removed expert go to another one. Expect a small loss at "
        "best on texts like those the experts were chosen on, and a large one elsewhere; removing a few more experts "
        "can make quality collapse.",
        _TUNED if facts.repair else _NOT_TUNED,
        "**Safety not evaluated.** Refusals and other trained behaviour may depend on removed experts. Safety results "
        "of the source do not apply to this model.",
    ]
    if changed:
        lines[0] = changed
    if evaluated:
        lines.append(
            "**Likelihoods, not benchmarks.** The figures above compare probabilities on texts; no tasks were scored."
        )
    return "\n".join(f"- {line}" for line in lines)
