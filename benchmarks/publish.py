"""How a measurement becomes a page: what was run and where, its figures as JSON, and the text with tables.

The JSON holds what the page shows (medians, ranges, counts) and no single samples.
"""

from __future__ import annotations

import compileall
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import moe_surgery
from benchmarks.machine import describe_machine

__all__ = ["RESULTS", "begin", "heading", "load", "publish", "span", "table"]

RESULTS = Path(__file__).parent / "results"


def begin(how: str, folder: Path = RESULTS) -> dict[str, Any]:
    """A report with the command (`how`), the date and the machine; `folder` lies on the disk measured.

    The package is compiled first, as pip does when it installs one: where PYTHONDONTWRITEBYTECODE is set, every
    command would recompile it.
    """
    compileall.compile_dir(Path(moe_surgery.__file__).parent, quiet=2)
    return {"how": how, "date": time.strftime("%Y-%m-%d"), "machine": describe_machine(folder)}


def heading(title: str, report: Mapping[str, Any]) -> list[str]:
    machine = [f"- {name}: {value}" for name, value in report["machine"].items()]
    return [f"# {title}", "", str(report["how"]), "", *machine]


def table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [_row(columns), "|---" * len(columns) + "|"]
    return [*lines, *map(_row, rows)]


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def span(values: Sequence[float]) -> list[float]:
    """The least and the largest."""
    return [min(values), max(values)]


def publish(name: str, report: Mapping[str, Any], lines: Sequence[str], folder: Path = RESULTS) -> None:
    """Write `name`.json and `name`.md into `folder`, and print the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.json").write_text(_json(report) + "\n")
    (folder / f"{name}.md").write_text(text)
    click.echo(text)


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The report that an earlier run published, or None."""
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def _json(value: object, indent: str = "") -> str:
    """JSON with six significant digits, and one list item per line."""
    deeper = f"{indent} "
    if isinstance(value, Mapping) and any(isinstance(v, (Mapping, list)) for v in value.values()):
        items = [f"{json.dumps(str(key))}: {_json(item, deeper)}" for key, item in value.items()]
        return f"{{\n{deeper}" + f",\n{deeper}".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(v, (Mapping, list)) for v in value):
        items = [json.dumps(_rounded(item)) for item in value]
        return f"[\n{deeper}" + f",\n{deeper}".join(items) + f"\n{indent}]"
    return json.dumps(_rounded(value))


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
