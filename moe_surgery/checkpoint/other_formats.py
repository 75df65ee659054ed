"""What a folder contains if not a safetensors checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from moe_surgery.checkpoint.text import printable

__all__ = ["other_format_hint"]

_SUFFIXES: Final = (
    ((".gguf",), "a GGUF file; pass that to inspect, plan, prune or verify"),
    (
        (".bin", ".pt", ".pth", ".ckpt"),
        "PyTorch files (pickle); convert them: load with transformers, save with save_pretrained",
    ),
    ((".distcp",), "a distributed training checkpoint; consolidate it and save it as safetensors"),
    ((".h5", ".msgpack", ".onnx", ".npz", ".ot"), "weights in another format; safetensors are needed"),
)
_ADAPTER: Final = "adapter_config.json"


def other_format_hint(folder: Path) -> str:
    """`; it holds ...` for an error message, or "" where nothing is recognised. Never raises."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return ""
    names = [entry.name for entry in entries]
    if _ADAPTER in names:
        return (
            "; it holds a PEFT adapter, not a whole model: merge it with moe-surgery merge ADAPTER CKPT OUT"
        )
    for suffixes, meaning in _SUFFIXES:
        if name := next((n for n in names if n.endswith(suffixes) and n != "training_args.bin"), None):
            return f"; it holds {printable(name)}: {meaning}"
    folders = [entry.name for entry in entries if entry.is_dir()]
    if "snapshots" in folders and "refs" in folders:
        return "; it is a folder of the hub cache: pass the model as owner/name, or a folder under snapshots/"
    inside = [name for name in folders if _holds_checkpoint(folder / name)]
    if inside:
        return f"; {printable(inside[-1])}/ inside it is a checkpoint: pass that"
    return ""


def _holds_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
