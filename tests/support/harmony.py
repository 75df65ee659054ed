"""The embedded model's tokenizer with a chat template in the harmony format, and rows for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

from moe_surgery.checkpoint.resolve import resolve
from tests.runtime.models import write_lively
from tests.support.checkpoints import Shape, Tensors

__all__ = ["TEMPLATE", "write_harmony", "write_scripted"]

TEMPLATE = Path(__file__).with_name("harmony.jinja").read_text()
_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_MORE = ("<|constrain|>", "<|call|>")
SCRIPTED = Shape(layers=1, experts=2, top_k=1)


def write_harmony(folder: Path, template: str = TEMPLATE, names: Sequence[str] = ()) -> Path:
    """The files of a tokenizer that has all tokens of the format, and `names` as tokens; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        (folder / name).write_bytes((resolve("example:tiny") / name).read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = max(*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"]))
    for number, token in enumerate((*_MORE, *names), last + 1):
        about = {"id": number, "content": token, "special": token in _MORE}
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], **about})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def write_scripted(folder: Path, template: str, reply: str) -> Path:
    """A model that answers `reply` to any prompt, as long as its last token stays the
    same: a token's successor depends on that token alone, so each token of `reply` may occur once.

    Role and channel names are single tokens. `template` ends with the prompt's last token.
    """
    names = ("assistant", "final", "analysis", "commentary")
    tokens = write_harmony(folder.with_name(f"{folder.name}-tokens"), names=names) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokens))
    chain = tokenizer.encode(template + reply, add_special_tokens=False).ids
    chain = chain[-1 - len(tokenizer.encode(reply, add_special_tokens=False).ids) :]
    assert len(set(chain)) == len(chain) <= SCRIPTED.hidden, tokenizer.encode(reply).tokens
    one = 0x3F80  # 1.0 in BF16

    def script(tensors: Tensors) -> None:
        for name, value in tensors.items():
            if "o_proj" in name or "down_proj" in name:
                value[:] = 0  # layers add nothing
        embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
        embedding[:], head[:], tensors["model.norm.weight"][:] = 0, 0, one
        for position, (token, following) in enumerate(pairwise(chain)):
            embedding[token, position] = head[following, position] = one

    shape = replace(SCRIPTED, vocabulary=tokenizer.get_vocab_size())
    write_lively(folder, shape, edit_tensors=script)
    return write_harmony(folder, template, names=names)
