"""Statistics files and the metrics derived from them, against plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moe_surgery.checkpoint.files import is_safetensors
from moe_surgery.errors import InvalidInputError, OutputError, PlanMismatchError, UsageError
from moe_surgery.selection.metrics import PROFILED_METRICS, order, score, super_experts
from moe_surgery.selection.rank import rank
from moe_surgery.selection.statistics import (
    PROFILED,
    ExpertStatistics,
    Statistics,
    load_statistics,
    merge,
    save_statistics,
)
from tests.support.command import call

EXPERTS, HIDDEN, LAYERS = 5, 6, 4


def routes(seed: int, tokens: int) -> list[tuple[int, float, np.ndarray]]:
    """Random (expert, routing weight, output); expert 4 is never chosen."""
    rng = np.random.default_rng(seed)
    return [
        (int(rng.integers(EXPERTS - 1)), float(rng.random()), rng.normal(size=HIDDEN)) for _ in range(tokens)
    ]


def gathered(chosen: list[tuple[int, float, np.ndarray]]) -> ExpertStatistics:
    result = ExpertStatistics.zeros(EXPERTS, HIDDEN)
    for expert, gate, output in chosen:
        result.count[expert] += 1
        result.gate[expert] += gate
        result.norm[expert] += np.linalg.norm(output)
        result.weighted_norm[expert] += gate * np.linalg.norm(output)
        result.output[expert] += output
        result.peak_abs[expert] = max(result.peak_abs[expert], abs(output).max())
        result.peak[expert] = max(result.peak[expert], output.max())
    return result


def statistics(seed: int, domains: tuple[str, ...] = ("law",), identity: str = "a") -> Statistics:
    data = {
        d: [gathered(routes(seed + 10 * i + n, 40)) for n in range(LAYERS)] for i, d in enumerate(domains)
    }
    texts: dict[str, list[dict[str, object]]] = {d: [{"name": f"{d}.txt", "tokens": 40}] for d in domains}
    return Statistics("gpt_oss", identity, EXPERTS, HIDDEN, 2, dict.fromkeys(domains, 40), texts, data)


def by_hand(metric: str, chosen: list[tuple[int, float, np.ndarray]], expert: int) -> float:
    routed = [(g, f) for e, g, f in chosen if e == expert]
    norms = [float(np.sqrt((f * f).sum())) for _, f in routed]
    if not routed:
        return 0.0
    return {
        "frequency": float(len(routed)),
        "gate": sum(g for g, _ in routed),
        "ean_sum": sum(norms),
        "ean_mean": sum(norms) / len(routed),
        "weighted_ean": sum(g * n for (g, _), n in zip(routed, norms, strict=True)),
        "reap": sum(g * n for (g, _), n in zip(routed, norms, strict=True)) / len(routed),
        "ean_ca": float(np.linalg.norm(sum(f for _, f in routed) / len(routed))),
    }[metric]


@pytest.mark.parametrize("metric", PROFILED_METRICS)
def test_every_metric_is_its_definition(metric: str) -> None:
    chosen = routes(3, 60)
    [scores] = score(metric, [gathered(chosen)])
    expected = [by_hand(metric, chosen, e) for e in range(EXPERTS)]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert scores[EXPERTS - 1] == 0  # nobody chose it
    assert order(scores) == tuple(sorted(range(EXPERTS), key=lambda e: (-expected[e], e)))


def test_an_unknown_metric_is_a_usage_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match="reap"):
        score("best", [gathered(routes(0, 3))])


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    before = statistics(1, ("law", "maths"))
    save_statistics(before, tmp_path / "s")
    after = load_statistics(tmp_path / "s")
    assert (after.tokens, after.texts, after.identity, after.layers) == (
        before.tokens,
        before.texts,
        before.identity,
        LAYERS,
    )
    for domain in before.domains:
        for routed, loaded in zip(before.data[domain], after.data[domain], strict=True):
            np.testing.assert_array_equal(routed.output, loaded.output)
            np.testing.assert_array_equal(routed.count, loaded.count)
    assert load_file(tmp_path / "s")["layer.2.maths.norm"].dtype == np.float64


def test_files_of_version_1_are_read_and_unknown_statistics_are_not(tmp_path: Path) -> None:
    """Version 1 has no list of statistics, and all that `profile` measures."""
    before = statistics(1)
    save_statistics(before, tmp_path / "s")
    tensors, raw = load_file(tmp_path / "s"), (tmp_path / "s").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = json.loads(header["__metadata__"]["moe_surgery"])
    assert (metadata["version"], metadata.pop("statistics")) == (2, list(PROFILED))

    def changed(**values: object) -> Path:
        save_file(tensors, tmp_path / "t", {"moe_surgery": json.dumps({**metadata, **values})})
        return tmp_path / "t"

    after = load_statistics(changed(version=1))
    assert after.known == before.known == PROFILED
    np.testing.assert_array_equal(after.data["law"][2].norm, before.data["law"][2].norm)
    for values in ({}, {"statistics": ["count", "speed"]}, {"statistics": ["gate"]}, {"statistics": "count"}):
        with pytest.raises(InvalidInputError, match="incomplete statistics"):
            load_statistics(changed(version=2, **values))
    few = load_statistics(changed(version=2, statistics=["count", "norm"], hidden=0))
    assert (few.known, few.hidden) == (("count", "norm"), 0)
    for version in (True, 3, "1", None):
        with pytest.raises(InvalidInputError, match="is not supported"):
            load_statistics(changed(version=version))


@given(st.lists(st.integers(0, 99), min_size=2, max_size=60), st.integers(1, 59))
def test_halves_merged_are_the_whole(seeds: list[int], cut: int) -> None:
    cut = min(cut, len(seeds) - 1)
    chosen = [routes(s, 1)[0] for s in seeds]
    whole, parts = gathered(chosen), (gathered(chosen[:cut]), gathered(chosen[cut:]))
    halves = []
    for part in parts:
        half = statistics(0)
        half.data = {"law": [part]}
        halves.append(half)
    merged = merge(halves)
    [total] = merged.data["law"]
    for name in ("count", "gate", "norm", "weighted_norm", "output", "peak_abs", "peak"):
        np.testing.assert_allclose(getattr(total, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert merged.tokens == {"law": 80}


def test_statistics_of_two_checkpoints_do_not_merge() -> None:
    with pytest.raises(PlanMismatchError, match="different checkpoints"):
        merge([statistics(0), statistics(0, identity="b")])


def test_the_same_text_does_not_count_twice() -> None:
    def of(*hashes: str, domain: str = "law") -> Statistics:
        result = statistics(0, (domain,))
        result.texts = {domain: [{"name": f"{h}.txt", "xxh3_128": h, "tokens": 1} for h in hashes]}
        return result

    assert [t["name"] for t in merge([of("a", "b"), of("c")]).texts["law"]] == ["a.txt", "b.txt", "c.txt"]
    for parts in ([of("a", "b"), of("b")], [of("a"), of("b"), of("c", "a")]):
        with pytest.raises(PlanMismatchError, match=r"domain 'law': the text [ab]\.txt is in two"):
            merge(parts)
    assert merge([of("a"), of("a", domain="maths")]).domains == ["law", "maths"]  # said of two domains


def test_merging_leaves_its_parts_alone_and_keeps_settings_that_agree() -> None:
    one, other, third = statistics(0), statistics(1), statistics(2)
    one.settings = other.settings = {"dtype": "float32", "context": 4096}
    third.settings = {"dtype": "float32", "context": 50}
    for part in (one, other, third):
        part.texts = {"law": []}
    before = one.data["law"][0].gate.copy()
    assert merge([one, other]).settings == {"dtype": "float32", "context": 4096}
    assert merge([one, other, third]).settings == {"dtype": "float32"}
    np.testing.assert_array_equal(one.data["law"][0].gate, before)
    assert one.texts == {"law": []}


COMPUTED = {"backend": "native", "device": "cpu", "dtype": "float32"}


def computed(seed: int, **changed: str) -> Statistics:
    result = statistics(seed)
    result.texts = {"law": []}
    result.settings = {**COMPUTED, **changed}
    return result


@pytest.mark.parametrize("other", [{"backend": "triton"}, {"device": "cuda"}, {"dtype": "bfloat16"}])
def test_statistics_computed_differently_do_not_merge(other: dict[str, str]) -> None:
    [(key, value)] = other.items()
    assert merge([computed(0), computed(1)]).settings == COMPUTED
    with pytest.raises(PlanMismatchError) as caught:
        merge([computed(0), computed(1), computed(2, **other)], ["a.stats", "b.stats", "c.stats"])
    assert str(caught.value) == (
        f"statistics computed differently cannot be merged: {key} is {COMPUTED[key]} in a.stats "
        f"and {value} in c.stats; run profile on both with the same `{key}`"
    )
    with pytest.raises(PlanMismatchError, match=r"in part 1 and .* in part 2"):
        merge([computed(0, **other), computed(1)])


def test_a_file_without_its_backend_merges_with_any_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = computed(0)
    old.settings = {"dtype": "float32"}  # as earlier versions wrote it
    for name, part in {"old": old, "a": computed(1), "b": computed(2, backend="reference")}.items():
        save_statistics(part, tmp_path / name)
    before, a, b = (tmp_path / name for name in ("old", "a", "b"))
    result = call(capsys, "stats", "merge", before, a, "-o", tmp_path / "both")
    assert result.code == 0
    assert f"note: {before} does not record its backend and device" in result.err
    assert load_statistics(tmp_path / "both").settings == {"dtype": "float32"}
    assert load_statistics(tmp_path / "both").tokens == {"law": 80}
    refused = call(capsys, "stats", "merge", before, a, b, "-o", tmp_path / "all")
    assert (refused.code, refused.err.count("\n")) == (4, 1)
    assert f"in {a} and reference in {b}; run profile on both with the same `backend`" in refused.err
    assert not (tmp_path / "all").exists()
    assert (
        "computed by backend unknown on device unknown in float32"
        in call(capsys, "stats", "show", before).out
    )


def test_a_domain_means_its_prompts_and_answers() -> None:
    result = statistics(0, ("law:prompt", "law:answer", "law", "lawful", "maths:answer"))
    assert result.named(["law"]) == ["law", "law:answer", "law:prompt"]
    assert result.named(["law:answer", "law"]) == ["law:answer", "law", "law:prompt"]  # each once
    assert result.named(["maths"]) == ["maths:answer"]
    assert result.named() == result.domains
    total = result.over(["law", "law:prompt"])
    expected = sum(result.data[d][2].gate for d in ("law", "law:answer", "law:prompt"))
    np.testing.assert_allclose(total[2].gate, expected)
    for name in ("", "law:", "answer", ":answer", "la"):
        with pytest.raises(InvalidInputError, match="is not in these statistics"):
            result.named([name])
    assert rank(result, "gate", domains=["maths"]).provenance["domains"] == ["maths:answer"]


def test_metadata_that_would_fail_later_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    result = statistics(1, ("law", "maths"))
    save_statistics(result, tmp_path / "s")
    with safe_open(tmp_path / "s", "np") as opened:
        document = json.loads(opened.metadata()["moe_surgery"])
    arrays = load_file(tmp_path / "s")
    refused = 0
    for key in document:
        for odd in ("left out", None, [], {}, -1, "x", {"law": "x", "maths": 3}, {"law": [1], "maths": []}):
            changed = {k: v for k, v in document.items() if k != key}
            if odd != "left out":
                changed[key] = odd
            save_file(arrays, tmp_path / "odd", {"moe_surgery": json.dumps(changed)})
            try:
                after = load_statistics(tmp_path / "odd")
            except InvalidInputError:
                refused += 1
                continue
            assert rank(after, "reap", domains=["law"]).to_json()  # what was changed does no harm
            assert merge([after]).domains == ["law", "maths"]
    assert refused > 50


@pytest.mark.parametrize("case", ["floats for counts", "no number", "another shape", "one missing"])
def test_sums_that_make_no_sense_are_refused(case: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    save_statistics(statistics(1), tmp_path / "s")
    with safe_open(tmp_path / "s", "np") as opened:
        metadata = opened.metadata()
    arrays = load_file(tmp_path / "s")
    name = "layer.1.law.count" if case == "floats for counts" else "layer.1.law.output"
    arrays[name] = {
        "floats for counts": arrays[name].astype(np.float64),
        "no number": arrays[name] * np.nan,
        "another shape": arrays[name][:-1],
        "one missing": arrays[name],
    }[case]
    if case == "one missing":
        del arrays[name]
    save_file(arrays, tmp_path / "s", metadata)
    with pytest.raises(InvalidInputError, match="incomplete statistics"):
        load_statistics(tmp_path / "s")


def test_statistics_are_distinguished_from_rankings_and_published_files(tmp_path: Path) -> None:
    save_statistics(statistics(1), tmp_path / "s")
    assert is_safetensors(tmp_path / "s")
    for content in (b"", b"{}", b'{"layer_0": [0, 1]}', b'{"abcd":{"x": 1}}', b"[       {"):
        (tmp_path / "other").write_bytes(content)
        assert not is_safetensors(tmp_path / "other")
    assert not is_safetensors(tmp_path)
    with pytest.raises(OutputError, match="gone: cannot open"):
        is_safetensors(tmp_path / "gone")


def test_an_unknown_domain_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidInputError, match=r"'cooking'.*law, maths"):
        statistics(0, ("law", "maths")).over(["cooking"])


def test_domains_add_up() -> None:
    both = statistics(0, ("law", "maths"))
    total = both.over()
    expected = both.data["law"][1].gate + both.data["maths"][1].gate
    np.testing.assert_allclose(total[1].gate, expected)


def test_super_experts_are_outliers_of_the_first_three_quarters() -> None:
    layers = [ExpertStatistics.zeros(64, 2) for _ in range(4)]
    for layer in layers:
        layer.peak += 1.0
        layer.count += 1
    layers[1].peak[7] = layers[3].peak[9] = 1000.0
    assert super_experts(layers) == [set(), {7}, set(), set()]
    result = Statistics("gpt_oss", "a", 64, 2, 2, {"x": 1}, {"x": []}, {"x": layers})
    assert rank(result, "frequency", protect_super_experts=True).layers[1][:3] == (7, 0, 1)
    assert rank(result, "frequency").layers[1][0] == 0


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "x")
    with pytest.raises(InvalidInputError, match="is a safetensors file of weights, not a statistics file"):
        load_statistics(tmp_path / "x")
    save_statistics(statistics(0), tmp_path / "cut")
    raw = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(raw[:-8])
    with pytest.raises(InvalidInputError):
        load_statistics(tmp_path / "cut")
