"""How many held-out questions the embedded model answers right while it is trained."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GptOssForCausalLM

from benchmarks.example_model import EXPERTS, Mlp
from benchmarks.example_texts import EOS, SPECIAL, chat_prompt
from moe_surgery.examples import skills

__all__ = ["Exam"]

BOS, RETURN = SPECIAL[0], SPECIAL[2]
ASKED = 100  # held-out questions of a domain


class Exam:
    """Held-out questions as padded batches: an answer is right if every token of it is the likeliest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.sets: dict[str, tuple[Tensor, Tensor]] = {}
        for domain in skills.DOMAINS:
            rows = []
            for n, question in enumerate(skills.draw_questions(domain, ASKED, 1, held_out=True)):
                if n % 2:
                    prompt, answer = chat_prompt(question), question.answer + RETURN
                else:
                    prompt, answer = BOS + question.prompt, f" {question.answer}\n"
                rows.append([tokenizer.encode(t, add_special_tokens=False).ids for t in (prompt, answer)])
            longest = max(len(p) + len(a) for p, a in rows)
            ids = torch.full((len(rows), longest), EOS)
            answers = torch.zeros(len(rows), longest, dtype=torch.bool)
            for row, (asked, right) in enumerate(rows):
                end = len(asked) + len(right)
                ids[row, :end] = torch.tensor(asked + right)
                answers[row, len(asked) : end] = True
            self.sets[domain] = ids, answers

    @torch.no_grad()
    def accuracy(self, model: GptOssForCausalLM, domain: str) -> float:
        """Share of the domain's questions answered right."""
        ids, answers = self.sets[domain]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        right = (predicted == ids[:, 1:]) | ~answers[:, 1:]
        return right.all(1).float().mean().item()

    def own(
        self, model: GptOssForCausalLM, mlps: list[Mlp], usage: Tensor, kept: int, seed: int | None
    ) -> list[float]:
        """Accuracy of every domain with `kept` experts a layer: its most used ones, or drawn with `seed`."""
        rates = []
        for d, domain in enumerate(skills.DOMAINS):
            for number, mlp in enumerate(mlps):
                order = usage[number, d].argsort(descending=True)
                if seed is not None:
                    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(seed + number))
                allowed = torch.zeros(EXPERTS, dtype=torch.bool)
                allowed[order[:kept]] = True
                mlp.allowed = allowed.expand(ASKED, -1)
            rates.append(self.accuracy(model, domain))
        for mlp in mlps:
            mlp.allowed = None
        return rates
