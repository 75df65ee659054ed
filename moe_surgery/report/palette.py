"""Colours of the figures: a sequential palette with even lightness steps, and colours for lines.

Everything also reads without colour: the palette is monotone in lightness, so grey prints and every
kind of colour blindness keep its order, and lines differ in marker and dash as well.
"""

from __future__ import annotations

import math

__all__ = ["DARK", "DASHES", "LIGHT", "MARKERS", "SERIES_DARK", "SERIES_LIGHT", "STEPS", "luminance", "step"]

STEPS = 24

# Background of the page and of empty figures.
LIGHT = "#ffffff"
DARK = "#14171c"

# Lines: at least 3:1 against their background (WCAG 1.4.11).
SERIES_LIGHT = ("#0b5fa5", "#b8470f", "#00785a", "#8a3ea0", "#806000", "#c01f5e", "#4a5663", "#0d7f95")
SERIES_DARK = ("#6cb3f5", "#f59a63", "#4fcfa5", "#d695ec", "#d9b945", "#ff85ad", "#aab8c7", "#5ccfe6")

# 7 markers and 8 colours have no common factor: (colour, marker) is unique for 56 lines.
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus", "down")
DASHES = ("", "7 3", "2 2.5", "9 3 2 3")


def step(share: float) -> int:
    """The palette's step for a share of the scale's largest value (clipped to 0..1)."""
    return round(min(max(share, 0.0), 1.0) * (STEPS - 1))


def sequential(dark: bool) -> list[str]:
    """`STEPS` colours "#rrggbb", least first: light to dark on paper, dark to light on a dark page.

    Even steps of lightness in OKLab (B. Ottosson, 2020), the hue going from yellow by green to blue.
    """
    first, last = (0.25, 0.93) if dark else (0.975, 0.27)
    colours = []
    for i in range(STEPS):
        lightness = first + (last - first) * i / (STEPS - 1)
        # By lightness, so that it has the same hue on both pages.
        warm = min(max((lightness - 0.25) / 0.725, 0.0), 1.0)
        hue = math.radians(278 - 168 * warm)
        chroma = 0.125 * math.sin(math.pi * (0.1 + 0.83 * warm)) + 0.004
        colours.append(_hex(_in_gamut(lightness, chroma, hue)))
    return colours


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb", 0 to 1 (WCAG 2)."""
    r, g, b = (_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def ink_on(colour: str) -> str:
    """Black or white, whichever contrasts more with `colour` (never less than 4.5:1)."""
    return "#000000" if luminance(colour) > 0.179 else "#ffffff"


def _linear(x: float) -> float:
    return x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4


def _encoded(x: float) -> float:
    return 12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055


def _in_gamut(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """Linear sRGB of an OKLCH colour, with less chroma if it is outside sRGB."""
    while True:
        a, b = chroma * math.cos(hue), chroma * math.sin(hue)
        long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
        middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
        short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
        rgb = (
            4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
        )
        if all(-1e-6 <= c <= 1 + 1e-6 for c in rgb) or chroma < 1e-4:
            return rgb
        chroma *= 0.95


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * _encoded(min(max(c, 0.0), 1.0))):02x}" for c in rgb)
