"""Devices by name, and whether a model's weights fit one."""

from __future__ import annotations

import torch

from moe_surgery.errors import UsageError
from moe_surgery.families import ModelSpec
from moe_surgery.formats.expert_format import F32

__all__ = [
    "HEADROOM_BYTES",
    "check_memory",
    "checkpoint_bytes",
    "fitting_experts",
    "free_memory",
    "open_device",
]

# For what is in memory besides the weights: KV cache, activations, the driver's context.
HEADROOM_BYTES = 1 << 30


def open_device(name: str | torch.device) -> torch.device:
    """The device called `name`. Raises UsageError where it is not available, with the reason."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"`device` {name}: unknown device; choose cpu, cuda, cuda:N or mps") from None
    if device.type == "cpu":
        return device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"`device` {name}: torch finds no CUDA device here; see moe-surgery doctor")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"`device` {name}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0"
            )
        return device
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError(f"`device` {name}: MPS is not available here; see moe-surgery doctor")
        return device
    raise UsageError(f"`device` {name}: unsupported device; choose cpu, cuda, cuda:N or mps")


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device, None for the CPU (weights are mapped there, not loaded)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def checkpoint_bytes(model: ModelSpec, experts: int) -> int:
    """Bytes of the weights as stored with `experts` kept in every layer."""
    total = 0
    for tensor in model.tensors:
        total += tensor.nbytes // model.experts * experts if tensor.has_experts else tensor.nbytes
    return total


def fitting_experts(model: ModelSpec, free: int) -> int:
    """The largest number of kept experts whose weights fit `free` bytes with headroom; 0 for none."""
    fits = (n for n in range(model.experts, 0, -1) if checkpoint_bytes(model, n) + HEADROOM_BYTES <= free)
    return next(fits, 0)


def check_memory(device: torch.device, model: ModelSpec, free: int | None = None) -> None:
    """Raise UsageError unless the weights fit `device` (`free` bytes; by default what the device reports)."""
    free = free_memory(device) if free is None else free
    if free is None:
        return
    needed = checkpoint_bytes(model, model.experts) + HEADROOM_BYTES
    if needed <= free:
        return
    max_experts = fitting_experts(model, free)
    advice = f"pruned to {max_experts} experts it fits" if max_experts else "no expert count fits"
    if not max_experts and not model.expert_format.packed:
        times = "seven" if model.expert_format == F32 else "four"
        advice += f"; converted to MXFP4, experts are {times} times smaller"
    raise UsageError(
        f"`device` {device}: the model needs {needed / 1e9:.1f} GB with headroom, "
        f"{free / 1e9:.1f} GB are free; {advice}"
    )
