"""Make README's pictures again: accuracy by experts kept (from its results), and the report page of the demo.

    python -m benchmarks.pictures

Needs Debian's chromium for the page.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import click

from benchmarks import accuracy
from benchmarks.publish import RESULTS, load
from moe_surgery.demo import run_demo

PAGE = RESULTS / "report_page.png"
WIDTH, HEIGHT = 1200, 860


def screenshot(page: Path, picture: Path) -> None:
    """The top of an HTML page as a PNG of WIDTH x HEIGHT pixels."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise click.ClickException("chromium is not installed")
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={picture}",
        ]
        subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True, timeout=120)


@click.command(help=__doc__)
def main() -> None:
    report = load(accuracy.NAME)
    if report is None:
        raise click.ClickException(
            f"{RESULTS}: holds no {accuracy.NAME}.json; run python -m benchmarks.accuracy"
        )
    accuracy.draw(report, RESULTS / f"{accuracy.NAME}.png")
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(Path(folder) / "demo", click.echo)
        assert result.report is not None
        screenshot(result.report, PAGE)


if __name__ == "__main__":
    main()
