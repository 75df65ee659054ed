"""Train the embedded model (`example:tiny`) from nothing and write it as gpt-oss-20b is stored.

    python -m benchmarks.train_example OUT                 # 51 minutes on one core with AMX
    python -m benchmarks.train_example OUT --steps 200     # a look at the speed

Matrix products are in BF16: a processor with AMX or a fast BF16 unit takes an hour, others several. Run it with
OMP_NUM_THREADS=1 where other work shares the cores. The same command continues an interrupted run.

The text is generated (`moe_surgery/examples/skills.py`): five domains of questions with exact answers. To make
experts specialise, as those of large models do by themselves, the loss contains the mutual information of
domain and expert in every layer (Mod-Squad, arXiv 2212.08066): experts are used equally over all texts, and by
few domains each. From step 400 on, half of the sequences may use only the 8 experts of each layer that their domain
uses most. In the last part of the training the experts' weights are rounded to MXFP4 in the forward pass
(straight-through gradients), so that the stored model is the one that was trained.

Needs the package's `transformers` extra, whose gpt-oss layers are used.
"""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import GptOssForCausalLM

from benchmarks.example_exam import Exam
from benchmarks.example_model import EXPERTS, LAYERS, Mlp, build, config, mxfp4_encode
from benchmarks.example_texts import LENGTH, SEQUENCES, Texts, train_tokenizer
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.examples import skills

STATE = "training.pt"
TOKENS = sum(SEQUENCES.values()) * LENGTH  # of a step
PEAK_LEARNING_RATE, WARM_UP = 2.5e-3, 150
QUANTISED_FROM = 0.7  # of the steps
INFORMATION_WEIGHT = 0.2
OWN_FROM = 400  # steps
OWN, OWN_SHARE = 8, 0.5  # experts a layer, and the share of sequences, for routing within the domain's own


def information(mlps: list[Mlp], domains: Tensor) -> Tensor:
    """Mutual information of domain and expert in nats, mean over layers; at most log(domains)."""
    count = len(skills.DOMAINS)
    member = functional.one_hot(domains, count).float()
    total = torch.zeros(())
    for mlp in mlps:
        usage = mlp.probabilities.mean(1)  # [sequences, experts]
        by_domain = (member.T @ usage) / member.sum(0)[:, None]
        overall = by_domain.mean(0)
        total = total + entropy(overall) - entropy(by_domain).mean()
    return total / len(mlps)


def entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-9).log()).sum(-1)


def count_usage(usage: Tensor, mlps: list[Mlp], domains: Tensor) -> None:
    """Add how often each layer's experts [layers, domains, experts] were chosen, older counts fading."""
    usage *= 0.98
    for number, mlp in enumerate(mlps):
        chosen = functional.one_hot(mlp.chosen.view(len(domains), -1), EXPERTS).sum(1).float()
        usage[number].index_add_(0, domains, chosen)


def restrict(mlps: list[Mlp], usage: Tensor, domains: Tensor, rng: random.Random) -> None:
    """Let some sequences use only the experts of each layer that their domain uses most."""
    free = torch.tensor([rng.random() >= OWN_SHARE for _ in domains])
    for number, mlp in enumerate(mlps):
        own = torch.zeros(len(skills.DOMAINS), EXPERTS, dtype=torch.bool)
        own.scatter_(1, usage[number].topk(OWN).indices, value=True)
        mlp.allowed = own[domains] | free[:, None]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < WARM_UP:
        return PEAK_LEARNING_RATE * (step + 1) / WARM_UP
    part = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * (1 + math.cos(math.pi * part)) / 2)


def train(tokenizer: Tokenizer, steps: int, seed: int, every: int, out: Path) -> GptOssForCausalLM:
    """Train for `steps` steps, printing accuracies every `every` steps.

    Continues after the step of `out`/training.pt, if there is one, with texts of another seed.
    """
    model, mlps = build(seed)
    exam = Exam(tokenizer)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    usage = torch.zeros(LAYERS, len(skills.DOMAINS), EXPERTS)
    first = 0
    if (out / STATE).exists():
        state = torch.load(out / STATE)
        first, usage = state["step"], state["usage"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    texts = Texts(tokenizer, seed + first)
    start = time.perf_counter()
    for step in range(first, steps):
        for mlp in mlps:
            mlp.rounded = step >= int(steps * QUANTISED_FROM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids, counted, domains = texts.batch()
        if step >= OWN_FROM:
            restrict(mlps, usage, domains, texts.rng)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[counted])
        loss = functional.cross_entropy(logits.float(), ids[:, 1:][counted])
        shared = information(mlps, domains)
        (loss - INFORMATION_WEIGHT * shared).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            count_usage(usage, mlps, domains)
        if (step + 1) % every == 0 or step + 1 == steps:
            spent = time.perf_counter() - start
            click.echo(
                f"step {step + 1}/{steps} loss {loss.item():.3f} information {shared.item():.3f} {spent:.0f} s "
                f"{(step + 1 - first) * TOKENS / spent:.0f} tokens/s"
            )
            model.eval()
            for mlp in mlps:
                mlp.allowed = None
            rates = [exam.accuracy(model, d) for d in skills.DOMAINS]
            click.echo(f"  full     {shown(rates)}")
            click.echo(f"  own 8    {shown(exam.own(model, mlps, usage, 8, None))}")
            click.echo(f"  random 8 {shown(exam.own(model, mlps, usage, 8, step))}")
            model.train()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "usage": usage,
                "step": step + 1,
            }
            torch.save(state, out / STATE)
    return model


def shown(rates: list[float]) -> str:
    return "  ".join(f"{d} {rate:4.0%}" for d, rate in zip(skills.DOMAINS, rates, strict=True))


def stored(model: GptOssForCausalLM) -> dict[str, Tensor]:
    """The model's tensors as gpt-oss-20b's files hold them: experts in MXFP4, the rest in BF16."""
    tensors = {}
    for name, value in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = value.to(torch.bfloat16).contiguous()
            continue
        blocks, scales = zip(*(mxfp4_encode(weight) for weight in value), strict=True)
        tensors[f"{name}_blocks"] = torch.from_numpy(np.stack(blocks))
        tensors[f"{name}_scales"] = torch.from_numpy(np.stack(scales))
    return tensors


def write(out: Path, tensors: dict[str, Tensor]) -> None:
    """Two shards with an index, config.json, generation_config.json and chat template beside them."""
    shards: list[dict[str, Tensor]] = [{}, {}]
    for name in sorted(tensors):
        shards[name.startswith(("model.layers.2", "model.layers.3", "model.norm"))][name] = tensors[name]
    files = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, out / file, {"format": "pt"})
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config(), indent=2) + "\n")


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=3100, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--every", default=100, show_default=True, help="Steps between two measurements.")
@click.option(
    "--new-tokenizer", is_flag=True, help="Train a tokenizer too, instead of taking the bundled one."
)
def main(out: Path, steps: int, seed: int, every: int, new_tokenizer: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    bundled = resolve("example:tiny") / "tokenizer.json"
    tokenizer = train_tokenizer() if new_tokenizer else Tokenizer.from_file(str(bundled))
    click.echo(f"{tokenizer.get_vocab_size()} tokens")
    tokenizer.save(str(out / "tokenizer.json"))
    model = train(tokenizer, steps, seed, every, out)
    write(out, stored(model))


if __name__ == "__main__":
    main()
