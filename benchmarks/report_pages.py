"""Report pages of models from 24 x 32 to 94 x 512 experts with 1, 8 and 40 domains: size, time to make, and how
quickly Chromium shows them and answers.

    python -m benchmarks.report_pages

The statistics are made up. Each page is opened in headless Chromium (Debian's packages chromium and chromium-driver,
and selenium) in a window of 1280 x 900. A reaction is what the page's main thread does from the input until the next
frame is painted: script, style, layout and paint. Its seconds are the thread's own, so that a busy machine disturbs
them less; the time by the clock is beside them. Each input is given five times with changing values. Results go to
benchmarks/results/.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.publish import begin, heading, publish, table
from moe_surgery.report.figures import subject_of
from moe_surgery.report.page import build_report
from tests.report.browser import MISSING, Browser, browser
from tests.report.inputs import made_up, plan_of

SIZES = ((24, 32), (48, 128), (61, 256), (94, 512))
DOMAINS = (1, 8, 40)
ROUNDS = 5
LIMIT_BYTES, LIMIT_MS = 3_000_000, 100

# Time until the frame after the input is painted. A timer in a frame's callback runs when that frame is done.
REACTION = """
const done = arguments[arguments.length - 1], act = new Function(arguments[0]);
requestAnimationFrame(() => setTimeout(() => {
  const start = performance.now();
  act();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
}, 30));
"""
SET = (
    "const c = document.getElementById({id!r}); if (c) {{ c.value = {value}; "
    "c.dispatchEvent(new Event('input', {{bubbles: true}})); }}"
)
UNPACKED = """
const done = arguments[0], look = () => ("unpacked" in document.body.dataset ? done() : setTimeout(look, 50));
look();
"""
PAINT = """
return [performance.getEntriesByName('first-contentful-paint')[0].startTime,
        performance.getEntriesByType('navigation')[0].loadEventEnd]
"""


def inputs(layers: int, experts: int, domains: int, metrics: int) -> dict[str, list[str]]:
    """Scripts that each do what a user would, several for each kind of input."""

    def choose(name: str, values: Sequence[int]) -> list[str]:
        return [SET.format(id=name, value=v) for v in values]

    def turn(count: int) -> list[int]:
        return [(1 + i) % count for i in range(ROUNDS)]

    half = [max(1, experts // 2 - 3 * i) for i in range(ROUNDS)]
    press = (
        "document.querySelector('#map canvas, #map [tabindex=\"0\"]')"
        ".dispatchEvent(new KeyboardEvent('keydown', {key: %r, bubbles: true}))"
    )
    sort = "document.querySelectorAll('#experts thead button')[%d].click()"
    result = {
        "metric of the map": choose("map-metric", turn(metrics)) if metrics > 1 else [],
        "plan of the map": choose("map-plan", turn(2)),
        "colour scale": choose("map-scale", turn(2)),
        "arrow key": [press % key for key in ("ArrowRight", "ArrowDown", "End", "PageDown", "Home")],
        "experts kept": choose("coverage-n", half),
        "routes or weight": choose("coverage-kind", turn(2)),
        "sort the table": [sort % i for i in (3, 3, 1, 3, 2)],
        "next rows": ["document.getElementById('experts-next').click()"] * ROUNDS,
        "layer of the table": choose("table-layer", [1, 0, layers, 2, 0]),
        "kept experts only": choose("table-kept", [1, 2, 0, 1, 0]),
    }
    if domains > 1:
        result |= {
            "domain of the map": choose("map-view", turn(domains + 1)),
            "best experts": choose("overlap-n", half),
            "metric of the overlap": choose("overlap-metric", turn(metrics)) if metrics > 1 else [],
            "pair of domains": choose("overlap-b", turn(domains)),
            "shared by": choose("shared-least", [2 + i % (domains - 1) for i in range(ROUNDS)]),
            "compare domains": choose("coverage-compare", [1, 0, 1, 0, 1]),
            "domain of the coverage": choose("coverage-view", turn(domains)),
            "domain of the table": choose("table-view", turn(domains)),
        }
    if layers * experts > 5000:
        result["cell size"] = choose("map-zoom", [1, 2, 3, 1, 0])
    return {name: scripts for name, scripts in result.items() if scripts}


def measure(chromium: Browser, page: Path, layers: int, experts: int, domains: int) -> dict[str, Any]:
    """Paint and reaction times of one page, in ms."""
    chromium.command("Performance.enable", timeDomain="threadTicks")
    paints = []
    for _ in range(3):
        chromium.open(page, 1280, 900)
        chromium.driver.execute_async_script("setTimeout(arguments[0], 300)")
        paints.append(chromium.run(PAINT))
    chromium.driver.execute_async_script(UNPACKED)
    metrics = chromium.run("return JSON.parse(document.getElementById('data').textContent).metrics")
    reactions = {
        name: [reaction(chromium, script) for script in scripts]
        for name, scripts in inputs(layers, experts, domains, len(metrics)).items()
    }
    summary = {
        name: {
            "median": statistics.median(own for own, _ in times),
            "longest": max(own for own, _ in times),
            "clock": statistics.median(clock for _, clock in times),
        }
        for name, times in reactions.items()
    }
    slowest = max(summary, key=lambda name: summary[name]["median"])
    return {
        "first_paint_ms": statistics.median(p[0] for p in paints),
        "loaded_ms": statistics.median(p[1] for p in paints),
        "metrics": len(metrics),
        "slowest": slowest,
        "slowest_ms": summary[slowest]["median"],
        "slowest_clock_ms": summary[slowest]["clock"],
        "longest_ms": max(one["longest"] for one in summary.values()),
        "reactions_ms": summary,
    }


def reaction(chromium: Browser, script: str) -> tuple[float, float]:
    """ms of the page's main thread, and by the clock, for one input."""
    before = busy(chromium)
    clock = float(chromium.driver.execute_async_script(REACTION, script))
    return 1e3 * (busy(chromium) - before), clock


def busy(chromium: Browser) -> float:
    """Seconds that the main thread has worked."""
    metrics = chromium.command("Performance.getMetrics")["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))


def page_text(report: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"{p['layers']} x {p['experts']}",
            p["domains"],
            f"{p['bytes'] / 1e6:.2f}",
            f"{p['metrics']} of 7",
            f"{p['seconds']:.1f}",
            f"{p['first_paint_ms']:.0f}",
            f"{p['loaded_ms']:.0f}",
            f"{p['slowest_ms']:.0f} ({p['slowest_clock_ms']:.0f}), {p['slowest']}",
            f"{p['longest_ms']:.0f}",
        )
        for p in report["pages"]
    ]
    columns = (
        *("layers x experts", "domains", "MB", "metrics", "made in s", "first paint, ms", "loaded, ms"),
        *("slowest input, median ms (by the clock)", "longest reaction, ms"),
    )
    most = max(p["bytes"] for p in report["pages"])
    longest = max(p["longest_ms"] for p in report["pages"])
    return [
        *heading("Report pages", report),
        f"- browser: {report['browser']}",
        "",
        "A page with one plan. A reaction is the main thread's work from the input to the end of the next frame. Paint",
        "times are by the clock, as is the making of a page from statistics in memory. Other jobs were running (load",
        f"{report['load']:.1f} at the end), so times by the clock are upper bounds.",
        "",
        *table(columns, rows),
        "",
        f"The largest page has {most / 1e6:.2f} MB (limit {LIMIT_BYTES / 1e6:g} MB); the longest reaction took "
        f"{longest:.0f} ms (limit {LIMIT_MS} ms).",
    ]


@click.command(help=__doc__)
def main() -> None:
    if MISSING:
        raise click.ClickException(MISSING)
    pages = []
    with tempfile.TemporaryDirectory() as folder:
        report = begin("python -m benchmarks.report_pages", Path(folder))
        with browser(Path(folder) / "profile") as chromium:
            report["browser"] = (
                f"Chromium {chromium.driver.capabilities['browserVersion']}, headless, 1280 x 900"
            )
            for layers, experts in SIZES:
                for domains in DOMAINS:
                    made = made_up(layers, experts, [f"domain {i + 1}" for i in range(domains)], top_k=8)
                    plan = plan_of(made, "reap", experts // 4)
                    start = time.perf_counter()
                    text = build_report(subject_of(made), [("a quarter", plan)])
                    seconds = time.perf_counter() - start
                    file = Path(folder) / "page.html"
                    size = file.write_bytes(text.encode())
                    row: dict[str, Any] = {
                        "layers": layers,
                        "experts": experts,
                        "domains": domains,
                        "bytes": size,
                    }
                    row |= {"seconds": seconds, **measure(chromium, file, layers, experts, domains)}
                    pages.append(row)
                    click.echo(str(row), err=True)
        report["pages"] = pages
        report["load"] = os.getloadavg()[0]
    publish("report_pages", report, page_text(report))


if __name__ == "__main__":
    main()
