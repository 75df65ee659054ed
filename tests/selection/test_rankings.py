"""Ranking files: ours and the published format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery import Ranking, load_plan, load_ranking, plan_from_ranking
from moe_surgery.errors import InvalidInputError, OutputError, PlanMismatchError, UsageError

PUBLISHED = {
    "layer_0": [4, 2, 0, 5, 1, 3],
    "layer_1": [0, 1, 2, 3, 4, 5],
    "layer_2": [5, 0, 4, 1, 3, 2],
}
OURS = {
    "format": "moe-surgery.ranking",
    "version": 1,
    "model_type": "gpt_oss",
    "num_experts": 3,
    "layers": [[2, 0, 1], [0, 1, 2]],
    "scores": [[0.25, -1, 7.5], [3, 2, 1e-30]],
    "provenance": {"metric": "mass", "domains": ["law"]},
}


def write(folder: Path, content: object) -> Path:
    path = folder / "ranking.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_published_ranking_is_read_as_it_is(tmp_path: Path) -> None:
    ranking = load_ranking(write(tmp_path, PUBLISHED))
    assert ranking == Ranking(
        6, tuple(map(tuple, PUBLISHED.values())), provenance={"ranking": "ranking.json"}
    )


def test_layers_of_a_published_ranking_are_ordered_by_number_not_by_place(tmp_path: Path) -> None:
    many = {f"layer_{i}": [(i + j) % 12 for j in range(12)] for i in range(12)}
    ranking = load_ranking(write(tmp_path, dict(sorted(many.items()))))  # layer_10 before layer_2
    assert [order[0] for order in ranking.layers] == list(range(12))


def lines(*objects: object) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


BY_NUMBER = {str(i): order for i, order in enumerate(PUBLISHED.values())}
FORMS = {
    "an object by number": json.dumps(BY_NUMBER),
    "an object over several lines": json.dumps(BY_NUMBER, indent=1),
    "an object by number, last first": json.dumps(dict(reversed(BY_NUMBER.items()))),
    "a line a layer": lines(*({key: order} for key, order in BY_NUMBER.items())),
    "a line a layer, last first": lines(*({key: order} for key, order in reversed(BY_NUMBER.items()))),
    "no newline at the end": lines(*({key: order} for key, order in BY_NUMBER.items())).rstrip("\n"),
    "lines that end as on Windows, with empty ones between": lines(
        *({key: order} for key, order in BY_NUMBER.items())
    ).replace("\n", "\r\n\r\n"),
    "two layers in a line": lines({"0": BY_NUMBER["0"], "2": BY_NUMBER["2"]}, {"1": BY_NUMBER["1"]}),
    "a line a layer by name": lines(*({key: order} for key, order in PUBLISHED.items())),
}


@pytest.mark.parametrize("form", FORMS)
def test_layers_by_number_are_read_from_one_object_or_one_a_line(form: str, tmp_path: Path) -> None:
    ranking = load_ranking(write(tmp_path, FORMS[form]))
    assert ranking.layers == tuple(map(tuple, PUBLISHED.values()))
    assert (ranking.num_experts, ranking.model_type) == (6, None)
    assert ranking.provenance == {"ranking": "ranking.json"}


def test_layers_of_jsonl_are_ordered_by_number(tmp_path: Path) -> None:
    rows = {str(i): [(i + j) % 12 for j in range(12)] for i in range(12)}
    text = lines(*({key: rows[key]} for key in sorted(rows)))  # 10 before 2
    ranking = load_ranking(write(tmp_path, text))
    assert [order[0] for order in ranking.layers] == list(range(12))


def test_our_own_ranking_is_read(tmp_path: Path) -> None:
    ranking = load_ranking(write(tmp_path, OURS | {"unknown": {"of": "a later release"}}))
    assert (ranking.num_experts, ranking.layers) == (3, ((2, 0, 1), (0, 1, 2)))
    assert ranking.scores == ((0.25, -1.0, 7.5), (3.0, 2.0, 1e-30))
    assert (ranking.model_type, ranking.provenance) == ("gpt_oss", OURS["provenance"])


orders = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.permutations(range(n)).map(tuple), min_size=1, max_size=4).map(tuple)
)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(orders, st.none() | st.text(st.characters(codec="utf-8"), max_size=9), st.booleans(), st.data())
def test_a_ranking_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory,
    layers: tuple[tuple[int, ...], ...],
    model_type: str | None,
    scored: bool,
    data: st.DataObject,
) -> None:
    experts = len(layers[0])
    layers = tuple(order for order in layers if len(order) == experts)
    row = st.lists(numbers, min_size=experts, max_size=experts).map(tuple)
    scores = tuple(data.draw(row) for _ in layers) if scored else None
    ranking = Ranking(experts, layers, model_type, scores, {"metric": "mass"})
    assert load_ranking(write(tmp_path_factory.mktemp("r"), ranking.to_json())) == ranking


MALFORMED = {
    "empty file": ("", "ranking.json"),
    "not JSON": ("{layer_0: [0]}", "ranking.json"),
    "a list": ("[[0, 1]]", "not a ranking"),
    "no layers": ("{}", "not a ranking"),
    "another key": (PUBLISHED | {"note": "x"}, "key 'note' is not a layer"),
    "a number that is not plain": ({"layer_0": [0], "layer_01": [0]}, "key 'layer_01' is not a layer"),
    "digits of another script": ({"layer_\u0660": [0]}, "is not a layer"),
    "a negative layer": ({"layer_-1": [0]}, "key 'layer_-1' is not a layer"),
    "a layer missing": ({"layer_0": [0], "layer_2": [0]}, "layer 1 is missing among 2 layers"),
    "a layer twice": ('{"layer_0": [0, 1], "layer_0": [1, 0]}', "ranking.json"),
    "a layer twice, by name and number": ({"layer_0": [0, 1], "0": [1, 0]}, "layer 0 is listed twice"),
    "a layer twice in lines": (lines({"0": [0]}, {"1": [0]}, {"0": [0]}), "line 3: layer 0 is listed twice"),
    "a layer missing in lines": (lines({"0": [0]}, {"2": [0]}), "layer 1 is missing among 2 layers"),
    "a line that is not an order": (
        lines({"0": [0, 1]}, {"1": [0, 0]}),
        "layer 1 is not an order of experts 0..1",
    ),
    "a line that ranks some only": (
        lines({"0": [0, 1]}, {"1": [1]}),
        "layer 1 ranks 1 experts, expected all 2",
    ),
    "a line that is not JSON": ('{"0": [0]}\n{"1": [0}\n', "line 2: not valid JSON"),
    "a line that is a list": ('{"0": [0]}\n[0]\n', "line 2: not a ranking: expected a JSON object"),
    "an empty object in a line": ('{"0": [0]}\n{}\n', "line 2: not a ranking"),
    "a line with another key": (lines({"0": [0]}, {"reap": [0]}), "line 2: key 'reap' is not a layer"),
    "our ranking and a line more": (
        lines(OURS, {"0": [0]}),
        "line 1: a moe-surgery ranking must be the only JSON object",
    ),
    "far too many lines": ('{"0": [0]}\n' * 10_001, "has 10001 lines, expected one a layer"),
    "a layer that is not a list": ({"layer_0": {"0": 1}}, "layer 0 is not a list"),
    "an empty layer": ({"layer_0": []}, "layer 0 is not a list of 1 to"),
    "an expert twice": ({"layer_0": [0, 1, 1]}, "layer 0 is not an order of experts 0..2"),
    "an expert out of range": ({"layer_0": [0, 1], "layer_1": [2, 0]}, "layer 1 is not an order"),
    "a negative expert": ({"layer_0": [0, -1]}, "layer 0 holds something that is not an expert number"),
    "a fraction": ({"layer_0": [0, 1.0]}, "layer 0 holds something that is not an expert number"),
    "a truth value": ({"layer_0": [False, True]}, "layer 0 holds something that is not an expert number"),
    "a string": ({"layer_0": ["0", "1"]}, "layer 0 holds something that is not an expert number"),
    "layers of other lengths": ({"layer_0": [0, 1], "layer_1": [0]}, "layer 1 ranks 1 experts"),
    "another format": (
        OURS | {"format": "moe-surgery.plan"},
        "is a plan, not a ranking; pass it to --plan of prune",
    ),
    "a later version": (OURS | {"version": 2}, "ranking version 2 is not supported"),
    "a version that is true": (OURS | {"version": True}, "ranking version true is not supported"),
    "a version over two lines": (OURS | {"version": "1\n2"}, r"version the string '1\n2' is not"),
    "no version": ({k: v for k, v in OURS.items() if k != "version"}, "version null is not supported"),
    "no expert count": (OURS | {"num_experts": None}, "num_experts is null, not a positive integer"),
    "another expert count": (OURS | {"num_experts": 4}, "layer 0 ranks 3 experts, expected all 4"),
    "layers by name": (OURS | {"layers": {"0": [0]}}, "layers: expected a list"),
    "a score that is not a number": (OURS | {"scores": [[1, 2, "3"], [1, 2, 3]]}, "scores: layer 0 holds"),
    "a score that is not finite": (json.dumps(OURS).replace("7.5", "1e999"), "ranking.json"),
    "scores of too few layers": (OURS | {"scores": [[1, 2, 3]]}, "scores: expected 2 layers of 3"),
    "scores of too few experts": (OURS | {"scores": [[1, 2], [1, 2, 3]]}, "scores: expected 2 layers of 3"),
    "a model type that is not text": (OURS | {"model_type": 3}, "model_type is 3, not a string"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_ranking_is_refused_in_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    content, expected = MALFORMED[case]
    path = write(tmp_path, content)
    with pytest.raises(InvalidInputError) as caught:
        load_ranking(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert message.isprintable()
    assert caught.value.exit_code == 3


def test_a_missing_ranking_is_an_input_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nothing\.json: cannot open"):
        load_ranking(tmp_path / "nothing.json")


# --- plans of rankings


def ranked(model_type: str | None = None) -> Ranking:
    return Ranking(6, tuple(map(tuple, PUBLISHED.values())), model_type)


@pytest.mark.parametrize("experts", range(1, 7))
def test_a_plan_keeps_the_first_of_every_layer(experts: int) -> None:
    firsts = [order[:experts] for order in PUBLISHED.values()]
    ascending = plan_from_ranking(ranked(), experts, model_type="gpt_oss")
    assert [list(kept) for kept in ascending.layers] == [sorted(kept) for kept in firsts]
    by_rank = plan_from_ranking(ranked(), experts, model_type="gpt_oss", order="ranking")
    assert [list(kept) for kept in by_rank.layers] == firsts
    assert (by_rank.num_source_experts, by_rank.num_layers, by_rank.top_k) == (6, 3, None)


@pytest.mark.parametrize("experts", [0, -1, 7, 10**9])
def test_a_count_that_the_model_cannot_keep_is_refused(experts: int) -> None:
    with pytest.raises(UsageError, match=rf"`experts` {experts}: the model has 6 experts; choose 1 to 6"):
        plan_from_ranking(ranked(), experts, model_type="gpt_oss")


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(UsageError, match="`order` best: choose one of ascending, ranking"):
        plan_from_ranking(ranked(), 2, model_type="gpt_oss", order="best")


def test_the_model_type_comes_from_the_ranking_or_the_caller_and_they_must_agree() -> None:
    assert plan_from_ranking(ranked("gpt_oss"), 2).model_type == "gpt_oss"
    assert plan_from_ranking(ranked(), 2, model_type="gpt_oss").model_type == "gpt_oss"
    with pytest.raises(UsageError, match="does not say which model it is for"):
        plan_from_ranking(ranked(), 2)
    with pytest.raises(PlanMismatchError, match="the ranking is for mixtral, not for gpt_oss"):
        plan_from_ranking(ranked("mixtral"), 2, model_type="gpt_oss")


def test_layers_that_do_not_begin_at_0_keep_their_numbers(tmp_path: Path) -> None:
    ranking = load_ranking(write(tmp_path, {"layer_5": [1, 0], "layer_3": [0, 1]}))
    assert (ranking.layer_numbers, ranking.layers) == ((3, 5), ((0, 1), (1, 0)))
    plan = plan_from_ranking(ranking, 1, model_type="deepseek_v3")
    assert (plan.layer_numbers, plan.numbers, plan.layers) == ((3, 5), (3, 5), ((0,), (1,)))
    again = tmp_path / "plan.json"
    again.write_text(plan.to_json())
    assert load_plan(again) == plan
    native = tmp_path / "native.json"
    native.write_text(ranking.to_json())
    assert load_ranking(native).layer_numbers == (3, 5)
