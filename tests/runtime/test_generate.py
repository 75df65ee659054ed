"""Generation is the model's own next tokens, one prompt or many, all at once or as a stream."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moe_surgery import load_model  # noqa: E402
from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.runtime.generate import Step, generate, pad_left, stream  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.sampling import Sampling  # noqa: E402
from tests.runtime.conftest import SMALL  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8], list(range(20))]
DRAWN = Sampling(1.0, top_k=20, seed=7)


def by_hand(model: CausalLM, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, each from a fresh run over everything before it."""
    tokens, log_probabilities = list(prompt), []
    for _ in range(steps):
        row = model(torch.tensor([tokens]))[0, -1].double().log_softmax(-1)
        tokens.append(int(row.argmax()))
        log_probabilities.append(float(row.max()))
    return tokens[len(prompt) :], log_probabilities


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_the_likeliest_of_a_fresh_run_each(
    small_model: CausalLM, prompt: list[int]
) -> None:
    tokens, log_probabilities = by_hand(small_model, prompt, 25)
    result = generate(small_model, [prompt], max_new_tokens=25, stop_tokens=())
    assert result.tokens == [tokens]
    # Fresh runs of 32 tokens and more are long steps, which the native backend rounds otherwise.
    tolerance = 1e-4 if small_model.backend.name == "reference" else 1e-3
    assert result.log_probabilities[0] == pytest.approx(log_probabilities, abs=tolerance)


def test_a_batch_gives_what_each_prompt_gives_alone(small_model: CausalLM) -> None:
    together = generate(small_model, PROMPTS, max_new_tokens=25, stop_tokens=())
    assert together.tokens == [by_hand(small_model, prompt, 25)[0] for prompt in PROMPTS]


def test_a_padded_tensor_means_the_same_as_a_list_of_prompts(small_model: CausalLM) -> None:
    ids, mask = pad_left(PROMPTS)
    assert ids.shape == mask.shape == (4, 20)
    assert [row[m == 1].tolist() for row, m in zip(ids, mask, strict=True)] == PROMPTS
    as_tensor = generate(small_model, ids, attention_mask=mask, max_new_tokens=9, stop_tokens=())
    assert as_tensor == generate(small_model, PROMPTS, max_new_tokens=9, stop_tokens=())


def test_the_same_seed_gives_the_same_tokens(small_model: CausalLM) -> None:
    def run(seed: int | None) -> list[list[int]]:
        sampling = Sampling(1.0, seed=seed)
        return generate(small_model, PROMPTS, max_new_tokens=12, sampling=sampling, stop_tokens=()).tokens

    assert run(5) == run(5)
    assert run(5) != run(6)


@pytest.mark.parametrize("sampling", [None, DRAWN])
def test_a_stream_gives_the_tokens_of_generate(small_model: CausalLM, sampling: Sampling | None) -> None:
    received: list[Step] = []
    options: dict[str, Any] = {"max_new_tokens": 15, "sampling": sampling, "stop_tokens": ()}
    result = generate(small_model, PROMPTS, callback=received.append, **options)
    steps = list(stream(small_model, PROMPTS, **options))
    for got in (received, steps):
        assert torch.stack([s.tokens for s in got], 1).tolist() == result.tokens
        assert torch.stack([s.log_probabilities for s in got], 1).tolist() == result.log_probabilities


def test_each_sequence_ends_with_its_own_stop_token(small_model: CausalLM) -> None:
    free = generate(small_model, PROMPTS, max_new_tokens=30, sampling=DRAWN, stop_tokens=()).tokens
    stops = (free[0][2], free[2][7])
    result = generate(small_model, PROMPTS, max_new_tokens=30, sampling=DRAWN, stop_tokens=stops)
    for tokens, log_probabilities, unstopped in zip(
        result.tokens, result.log_probabilities, free, strict=True
    ):
        ends = [i for i, token in enumerate(unstopped) if token in stops][:1]
        assert tokens == unstopped[: ends[0] + 1 if ends else None]
        assert len(log_probabilities) == len(tokens)


def test_a_stream_ends_when_every_sequence_has(small_model: CausalLM) -> None:
    first, second = (by_hand(small_model, prompt, 6)[0] for prompt in PROMPTS[:2])
    stops = (first[0], second[3])
    steps = list(stream(small_model, PROMPTS[:2], max_new_tokens=30, stop_tokens=stops))
    rows = torch.stack([s.tokens for s in steps], 1).tolist()
    lengths = [next(i for i, t in enumerate(row) if t in stops) + 1 for row in (first, second)]
    assert len(steps) == max(lengths)
    assert rows == [r[:n] + [-1] * (len(steps) - n) for r, n in zip((first, second), lengths, strict=True)]


def test_the_checkpoints_stop_tokens_are_taken_unless_others_are_given(small_model: CausalLM) -> None:
    assert small_model.config.eos_token_ids == (2,)
    likely = copy(small_model)
    likely.unembedding = small_model.unembedding.clone()
    likely.unembedding[2] = 0
    final = likely(torch.tensor([PROMPTS[0]]))[0, -1]
    likely.unembedding[2] = likely.unembedding[int(final.argmax())] * 2  # now 2 is the next token
    assert generate(likely, [PROMPTS[0]], max_new_tokens=5).tokens == [[2]]
    assert len(generate(likely, [PROMPTS[0]], max_new_tokens=5, stop_tokens=()).tokens[0]) == 5


class Counting(CausalLM):
    calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        self.calls += 1
        return super().__call__(*arguments, **options)


@pytest.mark.parametrize("new", [1, 2, 10])
def test_the_model_runs_once_for_each_new_token(small_model: CausalLM, new: int) -> None:
    counting = copy(small_model)
    counting.__class__ = Counting
    result = generate(counting, [[1, 2, 3]], max_new_tokens=new, stop_tokens=())
    assert len(result.tokens[0]) == counting.calls == new


@pytest.mark.parametrize(("context", "new"), [(9, 1), (10, 2), (30, 22), (200, 50)])
def test_prompt_and_answer_together_fit_the_context(small_model: CausalLM, context: int, new: int) -> None:
    result = generate(small_model, [PROMPTS[0]], max_new_tokens=50, stop_tokens=(), context=context)
    assert len(result.tokens[0]) == new


def test_the_models_whole_context_can_be_used(tmp_path: Path, backend: str) -> None:
    folder = write_lively(
        tmp_path / "short", SMALL, edit_config=lambda c: c.update(max_position_embeddings=48)
    )
    model = load_model(folder, dtype=torch.float32, backend=backend)
    prompt = torch.ones(1, 46, dtype=torch.int64)
    assert len(generate(model, prompt, max_new_tokens=9, stop_tokens=()).tokens[0]) == 2


REFUSED: dict[str, tuple[object, dict[str, Any], str]] = {
    "no prompts": ([], {}, "the prompt is empty"),
    "an empty prompt": ([[1], []], {}, "the prompt is empty"),
    "a prompt as long as the context": ([[1, 2]], {"context": 2}, "2 tokens, but the context is 2; shorten"),
    "no context": ([[1]], {"context": 0}, "`context` 0: this model supports 1 to 4096 tokens"),
    "more context than the model has": ([[1]], {"context": 4097}, "`context` 4097: this model supports 1 to"),
    "no new tokens": ([[1]], {"max_new_tokens": 0}, "`max_new_tokens` 0: must be at least 1"),
    "a foreign token": ([[1, SMALL.vocabulary]], {}, f"token {SMALL.vocabulary} is not one of the model's"),
}


@pytest.mark.parametrize(("prompts", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_generated_is_refused(
    small_model: CausalLM, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generate(small_model, prompts, **options)
