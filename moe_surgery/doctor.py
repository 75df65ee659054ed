"""What works on this machine with this installation, and why the rest does not."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from importlib.util import find_spec

from moe_surgery.formats import mxfp4
from moe_surgery.formats.native import native_status
from moe_surgery.version import __version__

__all__ = ["examine"]

LIBRARIES = (
    "numpy",
    "click",
    "rich",
    "safetensors",
    "xxhash",
    "torch",
    "triton",
    "transformers",
    "huggingface_hub",
)


def examine() -> dict[str, dict[str, str]]:
    """Sections of name -> state: versions, machine, conversion kernels, devices."""
    return {
        "versions": {
            "moe-surgery": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in LIBRARIES},
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
            "cores": str(os.cpu_count()),
            "memory": _memory(),
        },
        "MXFP4 conversion": {
            "native extension": native_status(),
            "instruction sets": ", ".join(mxfp4.instruction_sets()) or "none: numpy is used, slower",
        },
        "devices": _devices(),
        "backends": _backends(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return "unknown"
    return f"{total / 1e9:.1f} GB"


def _devices() -> dict[str, str]:
    if find_spec("torch") is None:
        return {
            "cpu": "yes",
            "cuda, mps": "unknown: torch is not installed (pip install 'moe-surgery[torch]')",
        }
    import torch

    cuda = "yes" if torch.cuda.is_available() else f"no: {_why_no_cuda(torch.version.cuda)}"
    if torch.cuda.is_available():
        cuda += f": {', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))}"
    if torch.backends.mps.is_available():
        mps = "yes"
    else:
        mps = "no: not macOS" if sys.platform != "darwin" else "no: this torch or macOS lacks it"
    return {"cpu": "yes", "cuda": cuda, "mps": mps}


def _backends() -> dict[str, str]:
    if find_spec("torch") is None:
        return {"reference, triton": "no: torch is not installed (pip install 'moe-surgery[torch]')"}
    from moe_surgery.kernels import backend_states

    return backend_states()


def _why_no_cuda(cuda_version: str | None) -> str:
    return (
        "this torch is a build without CUDA"
        if cuda_version is None
        else "torch does not find a CUDA device or driver"
    )
