"""LoRA on attention and experts of a pruned checkpoint trains through our experts, and goes back into it."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")

from moe_surgery import load_model, merge_adapter, plan_random, prune  # noqa: E402
from moe_surgery.integrations.transformers import register, replace_experts  # noqa: E402
from tests.support import oracle  # noqa: E402

pytestmark = pytest.mark.xdist_group("integrations")

TOKENS = torch.randint(0, 2048, (2, 12), generator=torch.Generator().manual_seed(0))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def train(model, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_trains_reloads_and_merges(packed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    prune("example:tiny", folder, lambda model: plan_random(4, 0, model), store="keep" if packed else "bf16")
    register()

    def base():
        model = oracle.load_model(folder)
        if packed:
            return replace_experts(model, folder)
        model.set_experts_implementation("moe_surgery")
        return model

    torch.manual_seed(0)
    targets = {} if packed else {"target_parameters": EXPERTS}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **targets)
    model = peft.get_peft_model(base(), config)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.01
    moved = [
        n for n, p in model.named_parameters() if ".experts." in n and "lora_B" in n and p.abs().max() > 0
    ]
    assert len(moved) == (0 if packed else 2 * 4)
    model.save_pretrained(tmp_path / "lora")
    trained = oracle.logits_of(model.eval(), TOKENS)

    again = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(oracle.logits_of(again, TOKENS), trained, rtol=0, atol=1e-5)
    merge_adapter(tmp_path / "lora", folder, tmp_path / "merged", store="keep" if packed else "f32")
    ours = load_model(tmp_path / "merged", dtype=torch.float32)
    difference = (ours(TOKENS) - trained).abs().max()
    assert difference < 0.02 * trained.abs().max()
