"""Plan files, and plans made without a ranking."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery import Plan, load_plan, plan_keeping, plan_random, prune
from moe_surgery.errors import InvalidInputError, OutputError, PlanMismatchError, UsageError
from tests.support.checkpoints import Shape, write_checkpoint


@dataclass(frozen=True)
class Counts:
    """The properties of a model that a plan needs."""

    experts: int
    layers: int
    model_type: str = "gpt_oss"


FILE = {
    "format": "moe-surgery.plan",
    "version": 1,
    "model_type": "gpt_oss",
    "num_source_experts": 4,
    "num_layers": 2,
    "top_k": None,
    "layers": [[0, 3], [2, 1]],
    "provenance": {"method": "by hand"},
}


def write(folder: Path, content: object) -> Path:
    path = folder / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- files


def test_a_plan_file_is_read(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, FILE))
    assert plan == Plan("gpt_oss", 4, ((0, 3), (2, 1)), None, {"method": "by hand"})
    assert (plan.num_layers, plan.uniform_experts) == (2, 2)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
objects = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), json_values, max_size=4)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    experts = draw(st.integers(1, 12))
    row = st.lists(st.integers(0, experts - 1), min_size=1, max_size=experts, unique=True).map(tuple)
    return Plan(
        draw(st.text(st.characters(codec="utf-8"), max_size=8)),
        experts,
        tuple(draw(st.lists(row, min_size=1, max_size=5))),
        draw(st.none() | st.integers(1, 9)),
        draw(objects),
        {k: v for k, v in draw(objects).items() if k not in FILE},
    )


@given(plans())
def test_a_plan_survives_its_file_unknown_keys_and_all(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan
) -> None:
    path = write(tmp_path_factory.mktemp("p"), plan.to_json())
    again = load_plan(path)
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert json.loads(path.read_text()) == plan.as_dict()


def test_unknown_keys_are_kept_and_written_back(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, FILE | {"note": {"of": ["a", "later"]}, "zeal": 1}))
    assert plan.extra == {"note": {"of": ["a", "later"]}, "zeal": 1}
    assert json.loads(plan.to_json()) == FILE | plan.extra


def test_a_plan_file_has_a_line_a_layer(tmp_path: Path) -> None:
    lines = load_plan(write(tmp_path, FILE)).to_json().splitlines()
    assert [line.strip(" ,") for line in lines if line.startswith("    ")] == ["[0, 3]", "[2, 1]"]


MALFORMED = {
    "empty file": ("", "plan.json"),
    "not JSON": ('{"format": }', "plan.json"),
    "a list": ("[]", "not a plan"),
    "a number": ("1", "not a plan"),
    "no format": ({k: v for k, v in FILE.items() if k != "format"}, "not a plan"),
    "another format": (FILE | {"format": "other"}, "not a plan"),
    "a published ranking": (
        {"layer_0": [0, 1]},
        "is a ranking, not a plan; make a plan of it with moe-surgery plan RANKING",
    ),
    "a ranking by number": (
        {"0": [0, 1]},
        "is a ranking, not a plan; make a plan of it with moe-surgery plan RANKING",
    ),
    "a ranking in lines": (
        '{"0": [0, 1]}\n{"1": [1, 0]}\n',
        "is a ranking, not a plan; make a plan of it with moe-surgery plan RANKING",
    ),
    "a mapping of experts": ({"0": {"3": 0}}, "not a plan"),
    "our ranking": ({"format": "moe-surgery.ranking", "version": 1}, "is a ranking, not a plan"),
    "a key twice": ('{"format": "moe-surgery.plan", "version": 1, "version": 1}', "plan.json"),
    "a later version": (FILE | {"version": 2}, "plan version 2 is not supported (this reads version 1)"),
    "version 0": (FILE | {"version": 0}, "plan version 0 is not supported"),
    "a version in quotes": (FILE | {"version": "1"}, "plan version the string '1' is not supported"),
    "a version that is true": (FILE | {"version": True}, "plan version true is not supported"),
    "a fractional version": (FILE | {"version": 1.0}, "plan version 1.0 is not supported"),
    "no version": ({k: v for k, v in FILE.items() if k != "version"}, "version null is not supported"),
    "no expert count": ({k: v for k, v in FILE.items() if k != "num_source_experts"}, "num_source_experts"),
    "zero experts": (FILE | {"num_source_experts": 0}, "num_source_experts is 0, not a positive"),
    "experts that are true": (FILE | {"num_source_experts": True}, "num_source_experts is true"),
    "no layers": (FILE | {"layers": [], "num_layers": 0}, "layers: expected a list"),
    "layers by name": (FILE | {"layers": {"0": [0]}}, "layers: expected a list"),
    "a layer that is not a list": (FILE | {"layers": [[0], "1"]}, "layer 1 is not a list"),
    "a layer that keeps none": (FILE | {"layers": [[0], []]}, "layer 1 is not a list of 1 to"),
    "more layers than num_layers": (FILE | {"layers": [[0]] * 3}, "num_layers is 2, but layers has 3"),
    "a layer count that is true": (
        FILE | {"layers": [[0]], "num_layers": True},
        "num_layers is true, but layers has 1",
    ),
    "no layer count": ({k: v for k, v in FILE.items() if k != "num_layers"}, "num_layers is null"),
    "an expert twice": (FILE | {"layers": [[0, 1], [2, 3, 2]]}, "layer 1 keeps expert 2 twice"),
    "an expert out of range": (
        FILE | {"layers": [[0, 4], [0, 1]]},
        "layer 0 keeps expert 4, but experts are 0 to 3",
    ),
    "more than there are": (FILE | {"layers": [[0, 1, 2, 3, 4]] * 2}, "layer 0 keeps expert 4"),
    "a negative expert": (FILE | {"layers": [[0, -1]] * 2}, "layer 0 holds something that is not"),
    "a fraction": (FILE | {"layers": [[0, 1.0]] * 2}, "layer 0 holds something that is not"),
    "a truth value": (FILE | {"layers": [[False, True]] * 2}, "layer 0 holds something that is not"),
    "an expert in quotes": (FILE | {"layers": [["0", "1"]] * 2}, "layer 0 holds something that is not"),
    "a huge number": (FILE | {"layers": [[0, 10**18]] * 2}, f"layer 0 keeps expert {10**18}"),
    "top-k 0": (FILE | {"top_k": 0}, "top_k is 0, not a positive integer"),
    "top-k true": (FILE | {"top_k": True}, "top_k is true, not a positive integer"),
    "top-k in quotes": (FILE | {"top_k": "4"}, "top_k is the string '4', not a positive integer"),
    "no model type": ({k: v for k, v in FILE.items() if k != "model_type"}, "model_type is missing"),
    "a model type that is not text": (FILE | {"model_type": 4}, "model_type is 4, not a string"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_plan_is_refused_in_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    content, expected = MALFORMED[case]
    path = write(tmp_path, content)
    with pytest.raises(InvalidInputError) as caught:
        load_plan(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert message.isprintable()
    assert caught.value.exit_code == 3


def test_a_missing_plan_is_an_input_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nothing\.json: cannot open") as caught:
        load_plan(tmp_path / "nothing.json")
    assert caught.value.exit_code == 5


# --- plans and models


def test_plan_with_different_counts_loads_but_cannot_be_pruned_with(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, FILE | {"layers": [[0, 3], [1]]}))
    assert plan.uniform_experts is None
    with pytest.raises(PlanMismatchError, match="between 1 and 2 experts per layer") as caught:
        prune(write_checkpoint(tmp_path / "in"), tmp_path / "out", plan)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [{"model_type": "mixtral"}, {"num_source_experts": 5}, {"layers": ((0, 1),)}],
    ids=["model type", "experts", "layers"],
)
def test_a_plan_for_another_model_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    plan = replace(Plan("gpt_oss", 4, ((0, 3), (2, 1))), **change)  # type: ignore[arg-type]
    source = write_checkpoint(tmp_path / "in")
    with pytest.raises(PlanMismatchError, match="the plan is for") as caught:
        prune(source, tmp_path / "out", plan)
    assert f"{source} is gpt_oss with 2 layers of 4" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("top_k", "got"), [(None, 2), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_top_k_is_the_plans_or_the_models_and_never_more_than_is_kept(
    top_k: int | None, got: int, tmp_path: Path
) -> None:
    plan = Plan("gpt_oss", 4, ((0, 3, 1), (2, 1, 0)), top_k)
    source = write_checkpoint(tmp_path / "in", Shape(top_k=2))
    prune(source, tmp_path / "out", plan)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_experts_per_tok"], config["experts_per_token"]) == (got, got)


# --- --keep


def test_keeping_a_list_keeps_it_in_its_order_in_every_layer() -> None:
    plan = plan_keeping([5, 0, 3], Counts(experts=6, layers=3))
    assert plan.layers == ((5, 0, 3),) * 3
    assert (plan.model_type, plan.num_source_experts, plan.top_k) == ("gpt_oss", 6, None)


def test_keeping_none_in_particular_keeps_all() -> None:
    assert plan_keeping(None, Counts(experts=6, layers=2)).layers == ((0, 1, 2, 3, 4, 5),) * 2


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([], "`kept` keeps no expert"),
        ([0, 6], "`kept` keeps expert 6, but experts are 0 to 5"),
        ([1, 2, 1], "`kept` keeps expert 1 twice"),
    ],
)
def test_a_list_that_cannot_be_kept_is_refused(kept: list[int], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        plan_keeping(kept, Counts(experts=6, layers=2))


# --- --random


@given(st.integers(0, 2**70), st.integers(1, 40), st.integers(1, 6), st.data())
def test_random_plans_are_numpys_draws_and_each_layer_stands_alone(
    seed: int, experts: int, layers: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, experts))
    plan = plan_random(count, seed, Counts(experts, layers))
    assert plan.num_layers == layers
    for layer, kept in enumerate(plan.layers):
        drawn = np.random.Generator(np.random.PCG64([seed, layer])).choice(experts, count, replace=False)
        assert list(kept) == sorted(drawn.tolist())
        assert len(set(kept)) == count
        assert all(0 <= e < experts for e in kept)
        assert all(type(e) is int for e in kept)
    # More layers change none of those before them.
    assert plan_random(count, seed, Counts(experts, layers + 2)).layers[:layers] == plan.layers


def test_random_plans_differ_by_seed_and_by_layer() -> None:
    one, two = (plan_random(8, seed, Counts(32, 24)).layers for seed in (0, 1))
    assert len({*one, *two}) == 48


@pytest.mark.parametrize("count", [0, -3, 33])
def test_a_random_count_that_the_model_cannot_keep_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=rf"`experts` {count}: the model has 32 experts"):
        plan_random(count, 0, Counts(32, 2))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match="`seed` -1: must not be negative"):
        plan_random(1, -1, Counts(32, 2))
