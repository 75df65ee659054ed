"""What was measured, as JSON and as text; a table that was not run says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.gate import Verdict, speed_up

__all__ = ["NOT_MEASURED", "against_full", "as_markdown", "earlier", "write"]

NOT_MEASURED = "not measured"
Rows = Sequence[dict[str, object]]


def against_full(rows: Rows) -> list[dict[str, object]]:
    """Every pruned row beside the full model's of the same batch: tokens a second and memory."""
    most = max((int(str(row["experts"])) for row in rows), default=0)
    full = {row["batch"]: row for row in rows if row["experts"] == most}
    result = []
    for row in rows:
        if row["experts"] == most or row["batch"] not in full:
            continue
        whole = full[row["batch"]]
        verdicts = [Verdict(r["gate"] == "green", 0.0) for r in (row, whole)]
        result.append(
            {
                "experts": row["experts"],
                "batch": row["batch"],
                "against full": speed_up(
                    1 / float(str(row["tokens/s"])), 1 / float(str(whole["tokens/s"])), *verdicts
                ),
                "weights GB": row["weights GB"],
                "full weights GB": whole["weights GB"],
                "peak GB": row["peak GB"],
                "full peak GB": whole["peak GB"],
            }
        )
    return result


def as_markdown(report: dict[str, object]) -> str:
    """The whole report; keys that hold lists of rows become tables."""
    lines = ["# On a GPU", "", str(report["how"]), ""]
    machine = report["machine"]
    assert isinstance(machine, dict)
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    for title, rows in report.items():
        if title in ("how", "machine", "date"):
            continue
        lines += ["", f"## {title}", ""]
        if isinstance(rows, list) and rows:
            lines += _table(rows)
        else:
            lines.append(str(rows) if rows else NOT_MEASURED)
    return "\n".join(lines) + "\n"


def _table(rows: Rows) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return head + ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def earlier(folder: Path, machine: dict[str, object]) -> dict[str, object]:
    """What an earlier run left in `folder`, if it was on the same device with the same versions; else nothing.

    The copy rate may differ from run to run: it does not identify the machine.
    """
    file = folder / "gpu.json"
    if not file.exists():
        return {}
    result: dict[str, object] = json.loads(file.read_text())

    def same(values: object) -> dict[str, object]:
        assert isinstance(values, dict)
        return {name: value for name, value in values.items() if not name.startswith("copy")}

    return result if same(result["machine"]) == same(machine) else {}


def write(folder: Path, report: dict[str, object]) -> list[Path]:
    """gpu.json and gpu.md in `folder`."""
    data, text = folder / "gpu.json", folder / "gpu.md"
    data.write_text(json.dumps(report, indent=1) + "\n")
    text.write_text(as_markdown(report))
    return [data, text]
