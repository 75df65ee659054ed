"""A decode step by experts kept (views of one model) and sequences decoded together."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from moe_surgery.bench.decode import Decoding, decode_figures
from moe_surgery.runtime.model import CausalLM

CONTEXT, STEPS = 32, 16


@pytest.mark.parametrize("batch", [1, 8], ids="batch {}".format)
@pytest.mark.parametrize("experts", [4, 16, None], ids=["4 experts", "16 experts", "all experts"])
def test_step(benchmark, shown: CausalLM, bandwidth: float, batch: int) -> None:
    benchmark.group = f"decode step, batch {batch}"
    decoding = Decoding(shown, "model", batch, CONTEXT, STEPS)
    benchmark.pedantic(decoding.step, rounds=STEPS)
    figures = decode_figures([decoding.run(bandwidth)], {"model": shown})[0]
    benchmark.extra_info.update(figures.as_dict())
