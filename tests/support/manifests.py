"""Edited manifests with a valid digest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

Document = dict[str, Any]


def rewrite(out: Path, change: Callable[[Document], object]) -> Path:
    """Change the manifest in place and update its digest."""
    path = out / "surgery.json"
    document = json.loads(path.read_bytes())
    change(document)
    document["digest"] = "0" * 32
    blank = json.dumps(document).encode()
    path.write_bytes(blank.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(blank).encode(), 1))
    return path
