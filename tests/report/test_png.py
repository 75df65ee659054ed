"""Pictures for papers: one for each figure, at 300 dpi, and a clear word where matplotlib is missing."""

from __future__ import annotations

import itertools
import struct
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from moe_surgery.errors import OutputError, PlanMismatchError, UsageError
from moe_surgery.report.png import write_pictures
from moe_surgery.selection.metrics import metrics_from
from moe_surgery.selection.statistics import PROFILED
from tests.report.inputs import evaluation_of, made_up, plan_of


def header(path: Path) -> tuple[int, int, float]:
    """Width, height and dots per inch of a PNG file."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    at = raw.index(b"pHYs")
    [per_metre] = struct.unpack(">I", raw[at + 4 : at + 8])
    return width, height, per_metre * 0.0254


# Heat maps and overlaps of all metrics are drawn by the same code.
@pytest.mark.parametrize(
    "known", [("count", "gate"), pytest.param(PROFILED, marks=pytest.mark.slow)], ids=["two metrics", "all"]
)
def test_every_figure_is_a_picture_for_print(tmp_path: Path, known: tuple[str, ...]) -> None:
    """Two domains without a plain letter get the same file name: one is numbered."""
    statistics = made_up(3, 8, ["../$x^2$", "ä", "ö"])
    for layer in itertools.chain.from_iterable(statistics.data.values()):
        for name in {*PROFILED} - {*known}:
            setattr(layer, name, None)
    metrics = metrics_from(known)
    evaluation = evaluation_of(statistics)
    paths = list(
        write_pictures(
            tmp_path / "new" / "folder",
            statistics,
            [("p.json", plan_of(statistics, metrics[-1], 2))],
            [("e.json", evaluation)],
        )
    )
    assert sorted(p.name for p in paths) == sorted(
        [
            *(f"heatmap-{m}.png" for m in metrics),
            *(f"overlap-{m}.png" for m in metrics),
            *(f"coverage{d}.png" for d in ("-all-domains", "-x-2", "", "-2")),
            *(f"evaluation-{m}.png" for m in ("kl", "cross_entropy", "agreement", "rerouted")),
        ]
    )
    assert {p.name for p in paths} == {p.name for p in (tmp_path / "new" / "folder").iterdir()}
    for path in paths:
        width, height, dpi = header(path)
        assert dpi == pytest.approx(300, abs=0.1)
        assert width == 2160
        assert height > 400


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UsageError, match=r"figures need the matplotlib package: pip install 'moe-surgery\[report\]'"
    ):
        next(write_pictures(tmp_path / "x", made_up(1, 4, ["a"])))
    assert not (tmp_path / "x").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    statistics, other = made_up(2, 8, ["x"]), made_up(2, 8, ["x"])
    other.identity = "0" * 32
    with pytest.raises(PlanMismatchError):
        next(write_pictures(tmp_path / "x", statistics, (), [("e", evaluation_of(other))]))
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot create"):
        next(write_pictures(tmp_path / "file", statistics))
