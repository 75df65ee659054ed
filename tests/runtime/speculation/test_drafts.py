"""A view as a draft holds the model's own weights; what cannot be drafted is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from moe_surgery import Plan, inspect, load_model, plan_random  # noqa: E402
from moe_surgery.errors import PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.runtime.generate import generate  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.speculation.speculate import speculate  # noqa: E402
from moe_surgery.runtime.step_bytes import weight_bytes  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from tests.runtime.conftest import SMALL  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support.checkpoints import Shape  # noqa: E402

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8], list(range(20))]


def storages(model: CausalLM) -> set[int]:
    experts = [layer.experts for layer in model.layers]
    parts = [p for e in experts for w in (e.gate_up, e.down) for p in (w.blocks, w.scales)]  # type: ignore[union-attr]
    parts += [b for e in experts for b in (e.gate_up_bias, e.down_bias)]
    parts += [p.weight for layer in model.layers for p in (layer.q, layer.k, layer.v, layer.o)]
    parts += [model.embedding, model.unembedding, model.norm]
    return {p.data_ptr() for p in parts}


@pytest.mark.parametrize("kept", [1, 4, 31])
def test_a_view_holds_the_models_own_tensors_and_a_router(
    tiny: Path, tiny_model: CausalLM, kept: int
) -> None:
    draft = view(tiny_model, plan_random(kept, 0, inspect(tiny)))
    assert storages(draft) == storages(tiny_model)
    rows = tiny_model.config.num_hidden_layers * kept
    router = rows * (tiny_model.config.hidden_size + 1) * 2  # BF16
    assert weight_bytes(draft, shared_with=tiny_model) == router + rows * 8  # and an index
    assert weight_bytes(view(tiny_model, None, 1), shared_with=tiny_model) == 0
    assert weight_bytes(tiny_model) == sum(
        t.stored.nbytes + (t.scales.nbytes if t.scales else 0) for t in described(tiny)
    )


def described(path: Path) -> tuple[Any, ...]:
    from moe_surgery import Checkpoint, identify_model

    with Checkpoint.open(path) as checkpoint:
        return tuple(identify_model(checkpoint).tensors)


def test_views_leave_the_model_as_it_was(small: Path, small_model: CausalLM) -> None:
    ids = torch.arange(20)[None]
    before = small_model(ids)
    one = view(small_model, None, 1)
    plan = Plan("gpt_oss", SMALL.experts, ((4, 1), (0, 2), (3, 1)))
    two = view(small_model, plan)
    assert torch.equal(small_model(ids), before)
    backend = small_model.backend.name
    fresh = load_model(small, dtype=torch.float32, plan=plan, backend=backend)
    assert torch.equal(two(ids), fresh(ids))
    assert not torch.equal(one(ids), before)


def test_a_view_of_a_view_is_one_of_the_model(small_model: CausalLM) -> None:
    def plan(*layers: tuple[int, ...]) -> Plan:
        return Plan("gpt_oss", SMALL.experts, layers)

    wide, narrow = plan((4, 1, 2), (0, 2, 3), (3, 1, 0)), plan((2, 4), (0,), (1, 3))
    ids = torch.arange(20)[None]
    assert torch.equal(view(view(small_model, wide), narrow)(ids), view(small_model, narrow)(ids))
    assert torch.equal(view(view(small_model, wide))(ids), view(small_model, wide)(ids))
    with pytest.raises(PlanMismatchError, match="layer 1: the plan keeps expert 1, which the model's own"):
        view(view(small_model, wide), plan((2,), (1,), (1,)))


def test_a_plan_of_another_model_or_no_top_k_is_refused(small_model: CausalLM) -> None:
    with pytest.raises(PlanMismatchError, match="but here is gpt_oss with 3 layers of 5"):
        view(small_model, Plan("gpt_oss", 9, ((0,),) * 3), name="here")
    with pytest.raises(UsageError, match="top-k 0: must be at least 1"):
        view(small_model, None, 0)


# --- what cannot be


def test_a_draft_of_another_vocabulary_is_refused(small_model: CausalLM, tmp_path: Path) -> None:
    other = load_model(write_lively(tmp_path / "other", Shape(vocabulary=24)), dtype=torch.float32)
    with pytest.raises(UsageError, match="the draft has a vocabulary of 24, the target one of 40"):
        speculate(small_model, other, PROMPTS)


def test_a_draft_with_a_shorter_context_is_refused(small_model: CausalLM, tmp_path: Path) -> None:
    folder = write_lively(
        tmp_path / "short", SMALL, edit_config=lambda c: c.update(max_position_embeddings=30)
    )
    short = load_model(folder, dtype=torch.float32)
    with pytest.raises(
        UsageError, match=r"the draft takes 30 tokens, but .* may reach 40; pass `context` 30"
    ):
        speculate(small_model, short, PROMPTS, max_new_tokens=20)
    result = speculate(small_model, short, PROMPTS, max_new_tokens=20, context=30, stop_tokens=())
    assert result.tokens == generate(small_model, PROMPTS, max_new_tokens=10, stop_tokens=()).tokens


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no prompts": ([], {}, "the prompt is empty"),
    "an empty prompt": ([[1], []], {}, "the prompt is empty"),
    "no length": ([[1]], {"draft_length": 0}, "`draft_length` 0: must be 1 to 64, or auto"),
    "no new tokens": ([[1]], {"max_new_tokens": 0}, "`max_new_tokens` 0: must be at least 1"),
    "a prompt as long as the context": ([[1, 2]], {"context": 2}, "2 tokens, but the context is 2; shorten"),
    "a foreign token": ([[1, SMALL.vocabulary]], {}, f"token {SMALL.vocabulary} is not one of the model's"),
}


@pytest.mark.parametrize(("prompts", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_generated_is_refused(
    small_model: CausalLM, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        speculate(small_model, small_model, prompts, **options)
