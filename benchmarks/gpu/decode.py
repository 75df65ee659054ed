"""Decoding with full-size random weights: tokens a second, share of the bound, and memory, by kept experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.gate import Verdict
from benchmarks.gpu.timing import timed
from benchmarks.gpu.weights import fill_cache, random_model, weight_bytes
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.kernels.interface import Backend
from moe_surgery.kernels.reference import ReferenceBackend
from moe_surgery.kernels.triton.decode.launches import launch_count
from moe_surgery.kernels.triton.decode.step import DecodeStep
from moe_surgery.runtime.cache import Cache
from moe_surgery.runtime.decode_cost import bytes_per_token
from moe_surgery.runtime.model import CausalLM

__all__ = ["BATCHES", "CONTEXT", "KEPT", "describe_step", "kept", "measure_decode"]

KEPT = (32, 16, 8, 4)
BATCHES = (1, 8, 32)
CONTEXT = 1024
STEPS = 64
REPLAYS = 20
# Errors of BF16 against float32 vary between orders of summation, the more where routing flips; a wrong
# kernel is off by hundreds of times.
NO_WORSE = 2.0


@dataclass(frozen=True, slots=True)
class Errors:
    """Distance of BF16 logits from those in float32, relative: the captured step's and plain PyTorch's."""

    step: float
    plain: float

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.step <= NO_WORSE * self.plain + 1e-3, self.step)


def measure_decode(
    config: ModelConfig,
    backend: Backend,
    bandwidth: float,
    device: torch.device,
    batches: tuple[int, ...] = BATCHES,
    context: int = CONTEXT,
) -> list[dict[str, object]]:
    """A row per batch for the experts of `config`; `bandwidth` is the measured copy's, in bytes a second."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    model = random_model(config, device, backend)
    rows = []
    for batch in batches:
        errors = _errors(model, backend, batch, context)
        rows.append(_row(model, batch, context, bandwidth, errors))
    return rows


def _row(model: CausalLM, batch: int, context: int, bandwidth: float, errors: Errors) -> dict[str, object]:
    config, device = model.config, model.device
    torch.cuda.reset_peak_memory_stats(device)
    cache = model.new_cache(batch, context + 2 * STEPS + REPLAYS + 8)
    fill_cache(cache, context)
    step = captured_step(model, cache)
    tokens = torch.randint(0, config.vocab_size, (batch,), device=device)
    step(tokens)

    def decode() -> None:
        """STEPS tokens, each the likeliest after the one before; nothing waits for the device."""
        for _ in range(STEPS):
            step(step.logits.argmax(-1))

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    decode()
    torch.cuda.synchronize()
    start.record()
    decode()
    stop.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(stop) / 1e3 / STEPS
    replay = timed(lambda: step(tokens), repeats=REPLAYS).seconds
    read = bytes_per_token(config, config.num_local_experts, batch, context + STEPS * 3 // 2)
    launches = launch_count(
        config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok, batch
    )
    return {
        "experts": config.num_local_experts,
        "batch": batch,
        "context": context,
        "tokens/s": batch / seconds,
        "ms a step": seconds * 1e3,
        "ms without argmax": replay * 1e3,
        "bound tokens/s": batch / (read.step / bandwidth),
        "share of the bound": read.step / bandwidth / seconds,
        "GB a step": read.step / 1e9,
        "launches": step.launches,
        "launches counted": launches.step,
        "weights GB": weight_bytes(model) / 1e9,
        "peak GB": torch.cuda.max_memory_allocated(device) / 1e9,
        "gate": "green" if errors.verdict.green else "RED",
        "error": errors.step,
        "plain error": errors.plain,
    }


@torch.inference_mode()
def _errors(model: CausalLM, backend: Backend, batch: int, context: int) -> Errors:
    """One step three ways from the same cache: captured, plain PyTorch in BF16, and in float32."""
    tokens = torch.randint(0, model.config.vocab_size, (batch,), device=model.device)
    result: list[Tensor] = []
    for dtype in (torch.bfloat16, torch.float32):
        plain = CausalLM(
            model.config,
            model.embedding,
            model.layers,
            model.norm,
            model.unembedding,
            dtype,
            ReferenceBackend(),
        )
        cache = plain.new_cache(batch, context + 1)
        fill_cache(cache, context)
        result.append(plain(tokens[:, None], cache)[:, 0])
    cache = model.new_cache(batch, context + 1)
    fill_cache(cache, context)
    step = captured_step(model, cache)(tokens)
    rounded, exact = result
    size = exact.norm()
    return Errors(float((step - exact).norm() / size), float((rounded - exact).norm() / size))


def captured_step(model: CausalLM, cache: Cache) -> DecodeStep:
    """The Triton backend's step. Raises TypeError where the model has another or none."""
    step = model.decode_step(cache)
    if not isinstance(step, DecodeStep):
        raise TypeError(f"the {model.backend.name} backend gave no captured decode step")
    return step


def describe_step(config: ModelConfig, batch: int, context: int) -> str:
    """Launches and bytes of a step with MXFP4 experts in a few lines of text."""
    launches = launch_count(
        config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok, batch
    )
    read = bytes_per_token(config, config.num_local_experts, batch, context)
    parts = ("experts", "attention", "router_and_norms", "cache", "vocabulary")
    shares = ", ".join(f"{part.replace('_', ' ')} {getattr(read, part) / 1e9:.3f}" for part in parts)
    return (
        f"{config.num_local_experts} experts, batch {batch}, context {context}: {launches.step} launches a step "
        f"({launches.layer} a layer, {launches.moe} of them MoE, and {launches.outside}); "
        f"{read.step / 1e9:.3f} GB a step, {read.token / 1e9:.3f} GB a token\n"
        f"  GB: {shares}"
    )


def kept(config: ModelConfig, experts: int) -> ModelConfig:
    """`config` with that many experts."""
    return replace(
        config, num_local_experts=experts, num_experts_per_tok=min(config.num_experts_per_tok, experts)
    )
