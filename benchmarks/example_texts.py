"""What the embedded model is trained on and examined with, as tokens."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moe_surgery.examples import skills

__all__ = [
    "BOS",
    "EOS",
    "LENGTH",
    "RETURN",
    "SEQUENCES",
    "VOCABULARY",
    "Texts",
    "chat_prompt",
    "train_tokenizer",
]

SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>",
    "<|reserved|>",
)  # fmt: skip
BOS, EOS, RETURN = 0, 1, 2
VOCABULARY = 2048
SEQUENCES = {"arithmetic": 10, "spelling": 3, "python": 6, "numbers": 3, "facts": 3}  # of a step
LENGTH = 128
QUESTION_WEIGHT, PROSE_WEIGHT = 0.1, 0.5  # share of tokens that count in the loss; an answer's all do
CHAT, PROSE = 0.35, 0.2  # share of the pieces of text


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over the domains' texts; digits and capital letters stay tokens of one character."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    single = pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for domain in skills.DOMAINS for text in skills.documents(domain, 2000, seed=0)]
    everyday = [Path(__file__).parent.parent / name for name in ("README.md", "CONTRIBUTING.md")]
    tokenizer.train_from_iterator(texts + [path.read_text() for path in everyday], trainer)
    tokenizer.pre_tokenizer = words
    return tokenizer


class Texts:
    """Training sequences: token ids and the weights of their losses."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids [S, LENGTH + 1], which predicted tokens count (bool [S, LENGTH]) and domains [S]."""
        domains = [n for n, domain in enumerate(skills.DOMAINS) for _ in range(SEQUENCES[domain])]
        sequences = len(domains)
        pieces = [self._pieces(skills.DOMAINS[d]) for d in domains]
        parts = [part for sequence in pieces for piece in sequence for part in piece]
        encoded = iter(
            self.tokenizer.encode_batch_fast([text for text, _ in parts], add_special_tokens=False)
        )
        ids = torch.zeros(sequences, LENGTH + 1, dtype=torch.long)
        weights = torch.zeros(sequences, LENGTH + 1)
        for row, sequence in enumerate(pieces):
            tokens: list[int] = []
            shares: list[float] = []
            for piece in sequence:
                for _, weight in piece:
                    new = next(encoded).ids
                    tokens += new
                    shares += [weight] * len(new)
            # The first text of a sequence is whole; some begin in the middle, as texts do in a context.
            ids[row] = torch.tensor(tokens[: LENGTH + 1])
            weights[row] = torch.tensor(shares[: LENGTH + 1])
        counted = torch.tensor([self.rng.random() for _ in range(sequences * LENGTH)]).view(sequences, LENGTH)
        return ids, counted < weights[:, 1:], torch.tensor(domains)

    def _pieces(self, domain: str) -> list[list[tuple[str, float]]]:
        rng, characters = self.rng, 0
        pieces: list[list[tuple[str, float]]] = []
        chat = rng.random() < CHAT
        if not chat and rng.random() < 0.8:
            pieces.append([(SPECIAL[BOS], 0.0)])
        while characters < 7 * LENGTH:
            piece = self._piece(domain, chat)
            pieces.append(piece)
            characters += sum(len(text) for text, _ in piece)
        return pieces

    def _piece(self, domain: str, chat: bool) -> list[tuple[str, float]]:
        rng = self.rng
        if not chat and rng.random() < PROSE:
            return [(skills.draw_prose(domain, rng) + "\n", PROSE_WEIGHT)]
        question = skills.draw_trained(domain, rng)
        if chat:
            return [(chat_prompt(question), QUESTION_WEIGHT), (question.answer + SPECIAL[RETURN], 1.0)]
        return [(question.prompt, QUESTION_WEIGHT), (f" {question.answer}\n", 1.0)]


def chat_prompt(question: skills.Question) -> str:
    """The question as the chat template writes it, up to where the answer begins."""
    return f"{SPECIAL[BOS]}<|start|>user<|message|>{question.text}<|end|><|start|>assistant<|message|>"
