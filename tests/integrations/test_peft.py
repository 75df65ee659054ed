"""PEFT puts LoRA adapters on a pruned model, trains and merges them; what transformers then saves loads here."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from moe_surgery import load_model, plan_random, prune  # noqa: E402
from tests.support import oracle  # noqa: E402

TOKENS = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("store", ["keep", "bf16"])
def test_an_adapter_on_attention_trains_and_merges(store: str, tmp_path: Path) -> None:
    prune("example:tiny", tmp_path / "out", lambda model: plan_random(8, 0, model), store=store)
    base = oracle.load_model(tmp_path / "out")
    before = oracle.logits_of(base, TOKENS)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * len(base.model.layers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    adapted = oracle.logits_of(model, TOKENS)
    assert (adapted - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")

    again = peft.PeftModel.from_pretrained(oracle.load_model(tmp_path / "out"), tmp_path / "adapter")
    torch.testing.assert_close(oracle.logits_of(again, TOKENS), adapted, rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(oracle.logits_of(merged, TOKENS), adapted, rtol=0, atol=2e-3)
    merged.save_pretrained(tmp_path / "merged")
    ours = load_model(tmp_path / "merged", dtype=torch.float32, backend="reference")
    torch.testing.assert_close(ours(TOKENS), adapted, rtol=0, atol=2e-3)
