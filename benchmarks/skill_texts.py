"""The embedded model's domains as texts: a .jsonl file of {"text": ...} lines for each, 40 generated documents of
questions with their answers and running text. `quality` and `speculation` use the same where no texts are given.

python -m benchmarks.skill_texts FOLDER
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from moe_surgery.examples.skills import DOMAINS, documents

__all__ = ["write_texts"]

DOCUMENTS, SEED = 40, 2


def write_texts(folder: Path) -> Path:
    """Write 40 generated documents of each domain into `folder`, made if need be; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        lines = [json.dumps({"text": text}) + "\n" for text in documents(domain, DOCUMENTS, SEED)]
        (folder / f"{domain}.jsonl").write_text("".join(lines))
    return folder


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    write_texts(folder)


if __name__ == "__main__":
    main()
