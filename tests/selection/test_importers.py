"""Counts from other programs: every form gives the same statistics, everything else one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.selection.imatrix.models import open_weights
from moe_surgery.selection.importers.importing import import_statistics
from moe_surgery.selection.metrics import metrics_from
from moe_surgery.selection.rank import rank
from moe_surgery.selection.statistics import Statistics, load_statistics, merge, save_statistics
from tests.support.tiny_ggufs import write_tiny_gguf

LAYERS, EXPERTS, TOP_K, TOKENS = 4, 32, 4, 500


def table(seed: int = 0, layers: int = LAYERS, experts: int = EXPERTS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    chosen = rng.permuted(np.tile(np.arange(experts), (layers * TOKENS, 1)), axis=1)[:, :TOP_K]
    chosen = np.minimum(chosen, experts - 2).reshape(layers, -1)  # the last expert is never chosen
    return np.stack([np.bincount(row, minlength=experts) for row in chosen])


def write(folder: Path, form: str, counts: np.ndarray) -> Path:
    rows = [[int(n) for n in row] for row in counts]
    by_expert = {str(i): {str(e): n for e, n in enumerate(row) if n} for i, row in enumerate(rows)}
    texts: dict[str, tuple[str, str]] = {
        "nested": ("c.json", json.dumps(rows)),
        "named": ("c.json", json.dumps({f"layer_{i}": row for i, row in enumerate(rows)})),
        "mindspeed": ("c.json", json.dumps(by_expert)),
        "lines": ("c.jsonl", "\n".join(json.dumps({str(i): row}) for i, row in enumerate(rows))),
        "records": ("c.jsonl", "\n".join(json.dumps({"layer": i, "counts": r}) for i, r in enumerate(rows))),
        "lists": ("c.jsonl", "\n".join(json.dumps(row) for row in rows)),
        "csv": ("c.csv", "\n".join(",".join(map(str, row)) for row in rows)),
        "headed": (
            "c.csv",
            ",".join(f"expert_{e}" for e in range(len(rows[0]))) + "\n"
            + "\n".join(",".join(map(str, r)) for r in rows),
        ),
        "wide": (
            "c.csv",
            "layer;" + ";".join(map(str, range(len(rows[0])))) + "\n"
            + "\n".join(";".join(map(str, [i, *r])) for i, r in enumerate(rows)),
        ),
        "long": (
            "c.tsv",
            "expert\tlayer\ttokens\n"
            + "\n".join(f"{e}\t{i}\t{n}.0" for i, r in enumerate(rows) for e, n in enumerate(r)),
        ),
    }  # fmt: skip
    if form in texts:
        name, text = texts[form]
        (folder / name).write_text(text)
        return folder / name
    if form == "npy":
        np.save(folder / "c.npy", counts.astype(np.float32))
        return folder / "c.npy"
    torch = pytest.importorskip("torch")
    passes = np.stack([counts // 3, counts - counts // 3])
    content = {"rank": 0, "logical_count": torch.tensor(passes, dtype=torch.int32)}
    torch.save(content, folder / "expert_distribution_recorder_1.pt")
    return folder / "expert_distribution_recorder_1.pt"


FORMS = [
    "nested",
    "named",
    "mindspeed",
    "lines",
    "records",
    "lists",
    "csv",
    "headed",
    "wide",
    "long",
    "npy",
    "sglang",
]


def counts_of(statistics: Statistics) -> np.ndarray:
    return np.stack([layer.count for layer in statistics.over()])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_counts(form: str, tmp_path: Path) -> None:
    counts = table()
    file = write(tmp_path, form, counts)
    result = import_statistics(file, model="example:tiny", domains=["code"])
    np.testing.assert_array_equal(counts_of(result), counts)
    assert (result.model_type, result.top_k, result.tokens) == ("gpt_oss", TOP_K, {"code": TOKENS})
    assert metrics_from(result.known) == ("frequency",)
    save_statistics(result, tmp_path / "s")
    loaded = load_statistics(tmp_path / "s")
    orders = rank(loaded, "frequency").layers
    assert orders == tuple(tuple(sorted(range(EXPERTS), key=lambda e: (-row[e], e))) for row in counts)
    alone = import_statistics(file, model_top_k=TOP_K)
    width = EXPERTS - 1 if form == "mindspeed" else EXPERTS  # which does not list those with 0
    np.testing.assert_array_equal(counts_of(alone), counts[:, :width])
    assert (alone.model_type, alone.identity) == (None, None)


def test_files_add_up_and_the_same_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    first, second = write(tmp_path, "csv", table(0)), write(tmp_path / "b", "csv", table(1))
    both = import_statistics([first, second], model="example:tiny", domains=["x"])
    assert (both.domains, both.settings["files"]) == (["x"], ["c.csv", "c.csv"])
    np.testing.assert_array_equal(counts_of(both), table(0) + table(1))
    with pytest.raises(InvalidInputError, match="is given twice"):
        import_statistics([first, first], model="example:tiny")
    with pytest.raises(UsageError, match="is csv, another file npy"):
        import_statistics([first, write(tmp_path, "npy", table(0))], model="example:tiny")
    apart = import_statistics([first, second], model="example:tiny", domains=["a", "b"])
    for domain, seed in (("a", 0), ("b", 1)):
        np.testing.assert_array_equal([layer.count for layer in apart.over([domain])], table(seed))
    with pytest.raises(UsageError, match="`domains`: 3 names for 2 files"):
        import_statistics([first, second], model="example:tiny", domains=["a", "b", "c"])
    parts = [import_statistics(f, model="example:tiny", domains=["x"]) for f in (first, second)]
    np.testing.assert_array_equal(counts_of(merge(parts)), table(0) + table(1))


def test_layers_are_the_models_where_the_first_ones_are_dense(tmp_path: Path) -> None:
    """Rows of all layers, with zeros for dense ones, as SGLang has them; rows of those with experts; and numbers."""
    model, experts, top_k = write_tiny_gguf(tmp_path / "model.gguf", "glm4moe"), 8, 2
    with open_weights(model) as (weights, _):
        numbers = weights.spec.layer_numbers
    assert numbers[0] > 0
    layers = numbers[-1] + 1
    counts = table(2, len(numbers), experts)
    every = np.zeros((layers, experts), np.int64)
    every[list(numbers)] = counts
    for rows in (counts, every):
        np.save(tmp_path / "c.npy", rows)
        result = import_statistics(tmp_path / "c.npy", model=model)
        np.testing.assert_array_equal(counts_of(result), counts)
        assert result.layer_numbers == numbers
        assert rank(result, "frequency").layer_numbers == numbers
    named = {f"model.layers.{n}": row.tolist() for n, row in zip(numbers, counts, strict=True)}
    (tmp_path / "c.json").write_text(json.dumps(named))
    np.testing.assert_array_equal(counts_of(import_statistics(tmp_path / "c.json", model=model)), counts)
    alone = import_statistics(tmp_path / "c.npy", model_top_k=top_k)
    assert alone.layer_numbers == numbers
    every[0, 0] = 1
    np.save(tmp_path / "c.npy", every)
    with pytest.raises(PlanMismatchError, match=r"counts tokens in layer 0, where .* has no experts"):
        import_statistics(tmp_path / "c.npy", model=model)


def test_layers_without_tokens_are_refused_unless_allowed(tmp_path: Path) -> None:
    counts = table()
    counts[1] = 0
    file = write(tmp_path, "mindspeed", counts)
    with pytest.raises(InvalidInputError, match="has no tokens in layer 1; pass `allow_missing=True`"):
        import_statistics(file, model="example:tiny")
    result = import_statistics(file, model="example:tiny", allow_missing=True)
    assert not counts_of(result)[1].any()


BAD: list[tuple[str, str, str]] = [
    ("c.json", "[[1, 2], [3]]", "layer 1 has 1 experts, the first has 2"),
    ("c.json", '{"0": [31, 1.5]}', "layer 0: expert 1 is 1.5, not a number of tokens"),
    ("c.json", '{"0": [-1, 2]}', "layer 0: expert 0 is -1, not a number of tokens"),
    ("c.json", '{"0": {"1": true}}', "layer 0: expert 1 is true, not a number"),
    (
        "c.json",
        '{"0": [2, 0, 1], "1": [0, 1, 2]}',
        "is a ranking, not counts of routed tokens; make a plan",
    ),
    (
        "c.json",
        '{"0": {"7": 0, "3": 1}, "1": {"2": 1, "4": 0}}',
        "is the expert mapping of a pruned checkpoint, not",
    ),
    ("c.json", '{"0": {"a": 1}}', "'a' is not an expert number"),
    ("c.json", '{"first": [1]}', "'first' is not a layer"),
    ("c.json", '{"layer_0": [1], "0": [1]}', "layer 0 is listed twice"),
    ("c.json", "{}", "expected counts by layer"),
    ("c.json", "[", "not valid JSON"),
    ("c.json", "[[]]", "layer 0 is not a list of counts"),
    ("c.json", '{"0": "x"}', "layer 0 is neither a list of counts nor"),
    (
        "c.jsonl",
        '{"layer": 0, "counts": [4, 2]}\n{"layer": 0, "counts": [5, 2]}',
        "line 2: layer 0 is listed twice",
    ),
    ("c.jsonl", '[1, 2]\n{"1": [1, 2]}', "lines with and without a layer's number"),
    ("c.csv", "1,2\n3", "layer 1 has 1 experts"),
    ("c.csv", "1,2\n3,x", "line 2: 'x' is not a number"),
    ("c.csv", "layer,expert\n0,1", "has no column count"),
    ("c.csv", "layer,expert,count\n0,1,2\n0,1,2", "line 3: layer 0, expert 1 is listed twice"),
    ("c.csv", "layer,expert,count\n0,1", "line 2: has 2 columns, the heading 3"),
    ("c.csv", "", "is empty"),
    ("c.npy", "no array", "not an NPY file"),
]


@pytest.mark.parametrize(("name", "text", "match"), BAD)
def test_what_is_malformed_is_one_line(name: str, text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInputError) as caught:
        import_statistics(tmp_path / name, model_top_k=1)
    assert match in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.full((2, 3), 0.5), "not whole"),
        (np.full((2, 3), -1), "below 0"),
        (np.full((2, 3), np.inf), "not whole"),
        (np.zeros((2, 3, 4), int), r"holds \[2, 3, 4\], expected one array of layers x experts"),
        (np.full((2, 3), "x"), "not numbers"),
        (np.zeros((0, 3), int), "has 0 layers"),
    ],
)
def test_arrays_that_are_not_counts(array: np.ndarray, match: str, tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", array)
    with pytest.raises(InvalidInputError, match=match):
        import_statistics(tmp_path / "c.npy", model_top_k=1)


def test_recordings_that_are_something_else(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / "x.pt"

    def refused(content: Any) -> str:
        torch.save(content, file)
        with pytest.raises(InvalidInputError) as caught:
            import_statistics(file, model_top_k=4)
        return str(caught.value)

    assert "mode stat" in refused({"records": [], "last_physical_to_logical_map": torch.zeros(2)})
    assert "has no logical_count" in refused({"logical_count": torch.zeros(2, 3, 4)})
    assert "is not a recording" in refused([1])
    assert "without running code" in refused({"logical_count": Path("x")})  # a class that could run code
    file.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InvalidInputError, match=r"not a \.pt file"):
        import_statistics(file, model_top_k=4)


def test_counts_of_another_model_and_arguments_that_are_missing(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", table(0, 4, 16))
    with pytest.raises(PlanMismatchError, match=r"counts 16 experts a layer, but .* has 32"):
        import_statistics(tmp_path / "c.npy", model="example:tiny")
    np.save(tmp_path / "c.npy", table(0, 3))
    with pytest.raises(PlanMismatchError, match=r"has 3 layers, but .* has 4 with experts"):
        import_statistics(tmp_path / "c.npy", model="example:tiny")
    with pytest.raises(UsageError, match="pass `model` or `model_top_k`"):
        import_statistics(tmp_path / "c.npy")
    with pytest.raises(UsageError, match="`model_top_k` 2: the model chooses 4"):
        import_statistics(tmp_path / "c.npy", model="example:tiny", model_top_k=2)
    (tmp_path / "c.bin").write_bytes(b"1,2")
    with pytest.raises(UsageError, match="pass `file_format`: imatrix, json"):
        import_statistics(tmp_path / "c.bin", model_top_k=1)
    with pytest.raises(UsageError, match="`file_format` xml: choose one of imatrix, json"):
        import_statistics(tmp_path / "c.npy", model_top_k=1, file_format="xml")
