"""Charts of benchmarks: panels of lines, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.writer import write_file
from moe_surgery.errors import UsageError

__all__ = ["Panel", "check_plot", "draw_panels"]

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: points (x, y) of every line by its label."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def check_plot(file: Path | None) -> None:
    """Raise UsageError if `file` cannot be a chart, before anything is measured."""
    if file is None:
        return
    if file.suffix not in FORMATS:
        raise UsageError(f"{file}: must end in {', '.join(FORMATS)}")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UsageError(f"{file}: is a folder, or its folder does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("a plot needs the matplotlib package: pip install 'moe-surgery[report]'") from None


def draw_panels(file: Path, panels: Sequence[Panel]) -> None:
    """Write `panels` side by side to `file`, whole or not at all. Raises as `check_plot` and `write_file`."""
    check_plot(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for label, points in panel.lines.items():
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if len(panel.lines) > 1:
            axis.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix[1:], dpi=150)
    write_file(file, picture.getvalue(), FileOps())
