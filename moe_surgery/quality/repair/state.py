"""The state of an unfinished repair, in one file that is replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.writer import write_file

__all__ = ["RepairState", "load_state", "save_state"]


@dataclass(slots=True)
class RepairState:
    """After `step` steps: values by group ("value", "mean", "square", "best") and tensor name.

    `chosen` is the plan that is repaired. `kl` is the divergence on held-out texts at each measurement, from that
    before the repair on, `best_kl` the least of them, `waited` the measurements since. `done`: no step is left.
    """

    step: int = 0
    chosen: int = 0
    kl: list[float] = field(default_factory=list)
    best_kl: float = float("inf")
    waited: int = 0
    done: bool = False
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def save_state(state: RepairState, file: Path, job: str) -> None:
    """Write `state` of the job with digest `job` to `file`."""
    from safetensors.torch import save

    flat = {
        f"{group}.{name}": tensor.detach().to("cpu", copy=True).contiguous()  # groups may share tensors
        for group, tensors in state.tensors.items()
        for name, tensor in tensors.items()
    }
    numbers = {name: value for name, value in _fields(state).items() if name != "tensors"}
    write_file(file, save(flat, {"moe_surgery": json.dumps({"job": job, **numbers})}), FileOps())


def _fields(state: RepairState) -> Mapping[str, object]:
    return {f: getattr(state, f) for f in ("step", "chosen", "kl", "best_kl", "waited", "done")}


def load_state(file: Path, job: str) -> RepairState | None:
    """The state that a run of this job left in `file`, or None."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            numbers = json.loads((opened.metadata() or {})["moe_surgery"])
            if numbers.pop("job") != job:
                return None
            state = RepairState(**numbers)
            for key in opened.keys():  # noqa: SIM118 (a method, no dictionary)
                group, _, name = key.partition(".")
                state.tensors.setdefault(group, {})[name] = opened.get_tensor(key)
            return state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
