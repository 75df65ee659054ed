"""Write a synthetic tokenizer of gpt-oss's kind and size beside a checkpoint.

Byte-level BPE over the o200k splitting pattern: the 256 bytes, tokens that are random concatenations of
earlier ones with every way to merge them, gpt-oss's control tokens, and a chat template. It says
nothing sensible, but is as large to read and convert as the real one (28 MB of JSON):

    python -m benchmarks.make_tokenizer CHECKPOINT              # 201088 tokens
    python -m benchmarks.make_tokenizer CHECKPOINT --vocabulary 4096
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import click

from moe_surgery.export.tokenizer import O200K_PATTERN

CONTROL_TOKENS = {
    0: "<|startoftext|>",
    1: "<|endoftext|>",
    4: "<|return|>",
    5: "<|constrain|>",
    7: "<|channel|>",
    8: "<|start|>",
    9: "<|end|>",
    10: "<|message|>",
    14: "<|call|>",
}
CONTROL_LISTED, CONTROL_RANGE = 21, 1090
"""Control tokens begin 1090 numbers before the end, and most of those numbers stay unused."""
LONGEST = 7
TEMPLATE = """{%- for message in messages -%}
<|start|>{{ message["role"] }}<|message|>{{ message["content"] }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's encoder)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def vocabulary_and_merges(size: int, seed: int) -> tuple[list[str], list[tuple[str, str]]]:
    """`size` distinct tokens, the bytes first, and every pair of them that makes another, in order."""
    rng = random.Random(seed)
    tokens = byte_characters()
    frequent = [*"etaoi", tokens[ord(" ")]]
    known = set(tokens)
    merges: list[tuple[str, str]] = []
    while len(tokens) < size:
        left = rng.choice(frequent) if rng.random() < 0.9 else rng.choice(tokens)
        token = left + rng.choice(frequent if rng.random() < 0.9 else tokens)
        if token in known or len(token) > LONGEST:
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges.extend(s for s in splits if s[0] in known and s[1] in known)
        known.add(token)
        tokens.append(token)
    return tokens, merges


def make_tokenizer(folder: Path, vocabulary: int, seed: int = 0) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    first = vocabulary - CONTROL_RANGE
    if first < 256:
        raise click.UsageError(f"--vocabulary {vocabulary}: at least {256 + CONTROL_RANGE} tokens")
    tokens, merges = vocabulary_and_merges(first, seed)
    names = [CONTROL_TOKENS.get(n, f"<|reserved_{first + n}|>") for n in range(CONTROL_LISTED)]
    added = {first + number: content for number, content in enumerate(names)}
    pieces = [
        {
            "type": "Split",
            "pattern": {"Regex": O200K_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": content, **flags} for number, content in added.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CONTROL_TOKENS[0],
        "eos_token": CONTROL_TOKENS[4],
        "pad_token": CONTROL_TOKENS[1],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--vocabulary", default=201088, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, vocabulary: int, seed: int) -> None:
    make_tokenizer(folder, vocabulary, seed)
    click.echo(f"{folder / 'tokenizer.json'}: {(folder / 'tokenizer.json').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
