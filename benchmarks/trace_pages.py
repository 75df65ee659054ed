"""The trace page at the sizes of large models: its size, and how long Chromium takes to show a choice.

    python -m benchmarks.trace_pages [--output DIR]

Needs chromium, chromedriver and selenium. A reaction is from the event to the frame after it: the time that has
passed, and the processor time of the page's main thread until the browser has told it, which may take in work that
the page does after that frame.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.made_up_trace import made_up_trace
from benchmarks.publish import RESULTS, begin, heading, publish, table
from moe_surgery.report.trace_page import build_trace_page

# Layers, experts, top-k, tokens, experts of the plan (None: no plan).
SIZES = (
    (24, 32, 4, 3000, 8),
    (48, 128, 8, 2000, 64),
    (61, 256, 8, 3000, None),
    (94, 512, 8, 2000, None),
    (94, 512, 8, 1000, 128),
)
ROUNDS = 5
COLOUR_BY_EXPERT = """
const mode = document.getElementById("mode");
mode.value = 0;
mode.dispatchEvent(new Event("input", { bubbles: true }));
"""
READY = """
const done = arguments[0], text = document.getElementById("text");
const idle = () => text.dataset.ready && !document.querySelector("[aria-busy]");
const look = () => (idle() ? done(performance.now()) : setTimeout(look, 5));
look();
"""
REACT = """
const [act, done] = arguments;
const get = (id) => document.getElementById(id);
const set = (id, v) => {
  if (get(id).type === "checkbox") get(id).checked = v; else get(id).value = v;
  get(id).dispatchEvent(new Event("input", { bubbles: true }));
};
const acts = {
  layer: () => set("layer", get("layer").value === "1" ? 2 : 1),
  expert: () => set("expert", get("expert").options[get("expert").selectedIndex === 2 ? 3 : 2].value),
  token: () => get("text").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true })),
  KL: () => set("mode", 1),
  "weight lost": () => set("mode", 2),
  agreement: () => set("mode", 3),
  numbers: () => set("numbers", !get("numbers").checked),
};
const start = performance.now();
acts[act]();
requestAnimationFrame(() => {
  const channel = new MessageChannel();
  channel.port1.onmessage = () => done(performance.now() - start);
  channel.port2.postMessage(0);
});
"""


@contextmanager
def chromium() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    for switch in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(switch)
    options.add_argument("--window-size=1600,900")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    try:
        yield driver
    finally:
        driver.quit()


def measure(driver: Any, page: Path, plan: bool) -> dict[str, Any]:
    """Milliseconds until the page is ready, and of each reaction."""
    driver.get(page.as_uri())
    ready = driver.execute_async_script(READY)
    choices = ["layer", "expert", "token", "numbers"]
    if plan:
        driver.execute_script(COLOUR_BY_EXPERT)
        choices += ["KL", "weight lost", "agreement"]
    passed: dict[str, list[float]] = {choice: [] for choice in choices}
    worked: dict[str, list[float]] = {choice: [] for choice in choices}
    for choice in choices:
        for _ in range(ROUNDS):
            driver.execute_async_script(READY)
            before = main_thread_ms(driver)
            passed[choice].append(driver.execute_async_script(REACT, choice))
            worked[choice].append(main_thread_ms(driver) - before)
            if choice in ("KL", "weight lost", "agreement"):  # from another colouring each time
                driver.execute_async_script(READY)
                driver.execute_script(COLOUR_BY_EXPERT)
    return {
        "ready_ms": ready,
        "main_thread_ms": {choice: statistics.median(times) for choice, times in worked.items()},
        "passed_ms": {choice: statistics.median(times) for choice, times in passed.items()},
    }


def main_thread_ms(driver: Any) -> float:
    """Processor time of the page's main thread so far."""
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    [seconds] = [m["value"] for m in metrics if m["name"] == "TaskDuration"]
    return 1000 * float(seconds)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(output: Path) -> None:
    """Build pages of made-up traces at the sizes of large models, open them in headless Chromium, and measure how
    long it takes to show a picked layer, expert, token and colouring. Writes trace_pages.json and .md."""
    report = begin(
        "`python -m benchmarks.trace_pages`: pages of made-up traces in headless Chromium, 1600 x 900"
    )
    pages = []
    with tempfile.TemporaryDirectory() as folder, chromium() as driver:
        for layers, experts, top_k, tokens, kept in SIZES:
            trace = made_up_trace(layers, experts, tokens, top_k, [] if kept is None else [("plan", kept)])
            page = build_trace_page(trace)
            file = Path(folder) / "trace.html"
            file.write_text(page)
            size = {"layers": layers, "experts": experts, "top_k": top_k, "tokens": tokens, "plan": kept}
            shown = {"bytes": len(page.encode()), "tokens_shown": page.count('role="option"')}
            pages.append({**size, **shown, **measure(driver, file, kept is not None)})
    report |= {"pages": pages, "load_average": os.getloadavg()[0]}
    kinds = list(dict.fromkeys(choice for p in pages for choice in p["main_thread_ms"]))
    lines = heading("The trace page at the sizes of large models", report)
    lines += [
        "",
        f"Milliseconds from the event to the frame after it, median of {ROUNDS}; in brackets processor time of the "
        "main thread, which may take in work that is done after that frame, such as the table of a token's path. "
        f"Load average of the machine meanwhile: {report['load_average']:.1f}.",
        "",
    ]
    lines += table(
        ["layers x experts, top-k", "plan", "tokens shown", "MB", "ready", *kinds],
        [
            [
                f"{p['layers']} x {p['experts']}, {p['top_k']}",
                p["plan"] or "-",
                f"{p['tokens_shown']:,} of {p['tokens']:,}",
                f"{p['bytes'] / 1e6:.2f}",
                f"{p['ready_ms']:.0f}",
                *(
                    f"{p['passed_ms'][k]:.0f} ({p['main_thread_ms'][k]:.0f})" if k in p["passed_ms"] else "-"
                    for k in kinds
                ),
            ]
            for p in pages
        ],
    )
    publish("trace_pages", report, lines, output)


if __name__ == "__main__":
    main()
