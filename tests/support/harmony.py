"""The embedded model's tokenizer with a chat template in the harmony format, and rows for it."""

from __future__ import annotations

import json
from pathlib import Path

from moe_surgery.checkpoint.locate import locate

__all__ = ["TEMPLATE", "write_harmony"]

TEMPLATE = Path(__file__).with_name("harmony.jinja").read_text()
_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_MORE = ("<|constrain|>", "<|call|>")


def write_harmony(folder: Path, template: str = TEMPLATE) -> Path:
    """The files of a tokenizer that has all tokens of the format; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        (folder / name).write_bytes((locate("example:tiny") / name).read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = max(*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"]))
    for number, token in enumerate(_MORE, last + 1):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": number, "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(template)
    return folder
