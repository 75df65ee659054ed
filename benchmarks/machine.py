"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from moe_surgery.doctor import examine

__all__ = ["describe_machine"]


def describe_machine(folder: Path) -> dict[str, str]:
    """Processor, cores, memory, kernel, the file system of `folder`, and versions."""
    result = examine()
    versions = ("moe-surgery", "python", "numpy", "xxhash")
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": result["machine"]["memory"],
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": _file_system(folder),
        "conversion kernels": result["MXFP4 conversion"]["instruction sets"].split(",")[0],
        **{name: result["versions"][name] for name in versions},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _file_system(folder: Path) -> str:
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    real = str(folder.resolve())
    under = [m for m in mounts if real == m[1] or real.startswith(m[1].rstrip("/") + "/")]
    return max(under, key=lambda m: len(m[1]))[2] if under else "unknown"
