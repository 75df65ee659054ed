"""A headless Chromium without network, through selenium. Debian's packages chromium and chromium-driver."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MISSING = next(
    (
        f"{what} is not installed"
        for what, result in (
            ("chromium", shutil.which("chromium")),
            ("chromedriver (chromium-driver)", shutil.which("chromedriver")),
            ("selenium", find_spec("selenium")),
        )
        if not result
    ),
    None,
)

KEYS = {
    "right": "\ue014",
    "left": "\ue012",
    "down": "\ue015",
    "up": "\ue013",
    "home": "\ue011",
    "end": "\ue010",
}
TAB, ENTER, SPACE = "\ue004", "\ue007", "\ue00d"
HOSTILE = "</script><img src=x onerror=document.title=1>"

# Text that a person must read: its colour against the first background behind it that is not clear.
CONTRAST = """
const rgb = (c) => {
  const m = c.match(/[\\d.]+/g).map(Number);
  return m.length > 3 && m[3] === 0 ? null : m.slice(0, 3);
};
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const lum = (c) => 0.2126 * linear(c[0] / 255) + 0.7152 * linear(c[1] / 255) + 0.0722 * linear(c[2] / 255);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c) return c;
  }
  return [255, 255, 255];
};
const poor = [];
const words = "h1, h2, h3, p, dt, dd, th, td, a, summary, label > span, button, select, li, figcaption, caption, " +
  "svg text, .unit";
for (const e of document.querySelectorAll(words)) {
  if (!e.textContent.trim() || !e.getClientRects().length) continue;
  const style = getComputedStyle(e), ink = rgb(e instanceof SVGElement ? style.fill : style.color);
  const [low, high] = [lum(ink), lum(behind(e))].sort((a, b) => a - b);
  const contrast = (high + 0.05) / (low + 0.05);
  if (contrast < 4.5) poor.push([e.tagName, e.textContent.slice(0, 30), style.color, contrast]);
}
return poor;
"""
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
FOCUS = (
    "const e = document.activeElement; return [e.dataset.at || null, e.getAttribute('aria-label'), e.tagName]"
)
CELL = (
    "return [...document.querySelectorAll('#map [role=gridcell]')].map((c) => c.getAttribute(arguments[0]))"
)


class Browser:
    """A window of a given size; `run` is JavaScript, `command` the DevTools protocol."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, width: int, height: int, *, dark: bool = False) -> Browser:
        self.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.driver.get(page.as_uri())
        return self

    def size(self, width: int, height: int) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def command(self, name: str, **arguments: object) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def choose(self, control: str, value: object) -> None:
        """Set a select, slider or box as a user's input would."""
        self.run(
            "const c = document.getElementById(arguments[0]);"
            "if (c.type === 'checkbox') c.checked = arguments[1]; else c.value = arguments[1];"
            "c.dispatchEvent(new Event('input', {bubbles: true}));",
            control,
            value,
        )

    def complaints(self) -> list[str]:
        """What the console holds: errors, warnings, blocked loads."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def picture(self, path: Path, *, whole: bool = True) -> None:
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        printed = self.command("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        return base64.b64decode(printed["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    for switch in (
        "--headless=new",
        "--no-sandbox",  # which containers, and root, cannot have
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def column(browser: Browser, table: str, name: str) -> list[str]:
    return browser.run(
        "const t = document.getElementById(arguments[0]);"
        "const i = [...t.tHead.rows[0].cells].findIndex((c) => c.textContent === arguments[1]);"
        "return [...t.tBodies[0].rows].map((r) => r.cells[i].textContent)",
        table,
        name,
    )


def sort_state(browser: Browser, table: str) -> dict[str, str]:
    return browser.run(
        "return Object.fromEntries([...document.querySelectorAll('#' + arguments[0] + ' thead th')]"
        ".map((c) => [c.textContent, c.getAttribute('aria-sort')]))",
        table,
    )


def focus_heading(browser: Browser, table: str, name: str) -> None:
    browser.run(
        "[...document.querySelectorAll('#' + arguments[0] + ' thead button')]"
        ".find((b) => b.textContent === arguments[1]).focus()",
        table,
        name,
    )


def ready(browser: Browser) -> None:
    """Wait until the page has unpacked its data."""
    browser.driver.execute_async_script(
        "const done = arguments[0];"
        "(function look() { 'unpacked' in document.body.dataset ? done() : setTimeout(look, 20); })()"
    )
