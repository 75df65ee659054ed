"""Malformed checkpoints that store each expert separately: one line that names the tensor or key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_surgery import inspect
from moe_surgery.errors import InvalidInputError
from tests.support.per_expert import EXPERTS, HIDDEN, Tensors, config, deepseek, write

LAYER = "model.layers.2.mlp."
EXPERT = LAYER + "experts.3."

Edit = Callable[[Tensors], object]


def drop(*names: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(names)]:
            del tensors[name]

    return edit


def put(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> Edit:
    return lambda t: t.update({name: (dtype, shape, bytes(nbytes))})


TENSORS: dict[str, tuple[Edit, str]] = {
    "a gap in the numbers": (
        drop(EXPERT),
        f"tensor '{EXPERT}down_proj.weight' is missing (expert 3 has none",
    ),
    "a missing leaf": (
        drop(EXPERT + "up_proj"),
        f"tensor '{EXPERT}up_proj.weight' is missing (expert 3 has other tensors",
    ),
    "an expert of another dtype": (
        put(EXPERT + "up_proj.weight", "F16", (32, HIDDEN), 64 * HIDDEN),
        f"tensor '{EXPERT}up_proj.weight': F16 [32, 64], but expert 0 of the layer has BF16 [32, 64]",
    ),
    "an expert of another shape": (
        put(EXPERT + "up_proj.weight", "BF16", (16, HIDDEN), 32 * HIDDEN),
        f"tensor '{EXPERT}up_proj.weight': BF16 [16, 64], but expert 0",
    ),
    "an expert too many": (
        put(LAYER + "experts.6.up_proj.weight", "BF16", (32, HIDDEN), 64 * HIDDEN),
        f"tensor '{LAYER}experts.6.up_proj.weight': expert 6 is beyond the 6 that config.json counts",
    ),
    "a router with a row too few": (
        put(LAYER + "gate.weight", "F32", (EXPERTS - 1, HIDDEN), 4 * (EXPERTS - 1) * HIDDEN),
        f"tensor '{LAYER}gate.weight': shape [5, 64], expected 6 rows",
    ),
    "a bias with an entry too few": (
        put(LAYER + "gate.e_score_correction_bias", "F32", (EXPERTS - 1,), 4 * (EXPERTS - 1)),
        f"tensor '{LAYER}gate.e_score_correction_bias': shape [5], expected 6 entries",
    ),
    "no bias in one layer": (
        drop(LAYER + "gate.e_score"),
        f"tensor '{LAYER}gate.e_score_correction_bias' is missing, which other MoE layers have",
    ),
    "experts without a router": (
        drop(LAYER + "gate."),
        f"tensor '{LAYER}experts.0.gate_proj.weight': is an expert of a layer without a router ({LAYER}gate.weight)",
    ),
    "a router without experts": (
        drop(LAYER + "experts."),
        f"tensor '{LAYER}gate.weight': is the router of a layer without experts",
    ),
    "no routers": (
        lambda t: [t.pop(n) for n in list(t) if ".gate." in n or ".experts." in n],
        "no layer has a router (mlp.gate.weight)",
    ),
    "a layer without tensors": (drop("model.layers.2."), "layer 2 has no tensors, but config.json counts 4"),
    "an unknown part of the router": (
        put(LAYER + "gate.temperature", "F32", (EXPERTS,), 4 * EXPERTS),
        f"tensor '{LAYER}gate.temperature': is part of the router, but not known",
    ),
    "a name like an expert's": (
        put("model.layers.2.mlp.expert_scales", "F32", (EXPERTS,), 4 * EXPERTS),
        "tensor 'model.layers.2.mlp.expert_scales': is named like an expert",
    ),
    "a name like an expert's outside layers": (
        put("model.experts_norm", "F32", (EXPERTS,), 4 * EXPERTS),
        "tensor 'model.experts_norm': is named like an expert",
    ),
    "numbers last": (
        put(LAYER + "experts.up_proj.0.qweight", "I32", (2,), 8),
        f"tensor '{LAYER}experts.up_proj.0.qweight': numbers experts after the projection",
    ),
    "leading zeros": (
        put(LAYER + "experts.03.up_proj.weight", "BF16", (32, HIDDEN), 64 * HIDDEN),
        f"tensor '{LAYER}experts.03.up_proj.weight': expert number 03 has leading zeros",
    ),
    "a stacked tensor of other experts": (
        put(LAYER + "experts.up_proj_bias", "F32", (EXPERTS + 1,), 4 * (EXPERTS + 1)),
        f"tensor '{LAYER}experts.up_proj_bias': shape [7], expected 6 experts on axis 0",
    ),
}

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another count": (
        {"n_routed_experts": 8},
        "n_routed_experts is 8, but ",
    ),
    "a stale alias": ({"num_local_experts": 8}, "num_local_experts is 8, but n_routed_experts is 6"),
    "a stale copy": (
        {"text_config": {"n_routed_experts": 8}},
        "n_routed_experts is 6, but text_config.n_routed_experts is 8",
    ),
    "no count": ({"n_routed_experts": None}, "n_routed_experts or moe_num_experts is missing; add the one"),
    "no top-k": ({"num_experts_per_tok": None}, "num_experts_per_tok or "),
    "a count that is text": (
        {"n_routed_experts": "six"},
        "is the string 'six', not a positive integer",
    ),
    "an uneven list": ({"n_routed_experts": [6, 5]}, "not a positive integer"),
    "a top-k above the experts": (
        {"num_experts_per_tok": 7},
        "num_experts_per_tok 7 is more than the 6 experts",
    ),
    "groups that do not divide": ({"n_group": 4}, "6 experts cannot be routed in 4 groups (n_group)"),
    "groups without how many": (
        {"n_group": 3, "topk_group": None},
        "n_group is 3, but topk_group is missing",
    ),
    "fewer layers": (
        {"num_hidden_layers": 3},
        "is in layer 3, but config.json counts 3 layers and 0 for multi-token prediction",
    ),
    "no number of layers": ({"num_hidden_layers": None}, "num_hidden_layers is missing; add it"),
    "more layers": ({"num_hidden_layers": 6}, "layer 4 has no tensors"),
    "an untested model type": ({"model_type": "ernie4_5_vl_moe"}, "is not supported yet: it has two pools"),
}


def refused(folder: Path) -> str:
    with pytest.raises(InvalidInputError) as caught:
        inspect(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_make_a_model_are_refused(case: str, tmp_path: Path) -> None:
    edit, expected = TENSORS[case]
    tensors = deepseek()
    edit(tensors)
    assert expected in refused(write(tmp_path / "in", tensors, config()))


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_that_disagree_are_refused(case: str, tmp_path: Path) -> None:
    settings, expected = CONFIGS[case]
    assert expected in refused(write(tmp_path / "in", deepseek(), config() | settings))


def test_a_wrong_count_names_the_router_that_disagrees(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "in", deepseek(), config(n_routed_experts=8)))
    assert "tensor 'model.layers.1.mlp.gate.weight' has 6 rows, as in every layer; correct the key" in message
