"""The GPU benchmarks' own logic, without a GPU: what they hold against what, and what they refuse to say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.gpu import layer, report  # noqa: E402
from benchmarks.gpu.__main__ import NO_DEVICE, main  # noqa: E402
from benchmarks.gpu.checks import FILES  # noqa: E402
from benchmarks.gpu.decode import describe_step  # noqa: E402
from benchmarks.gpu.gate import Verdict, judge, speed_up  # noqa: E402
from benchmarks.gpu.timing import Timed  # noqa: E402
from benchmarks.gpu.weights import fill_cache, gpt_oss_20b, random_model, weight_bytes  # noqa: E402
from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from moe_surgery.runtime.decode_cost import bytes_per_token  # noqa: E402

CPU = torch.device("cpu")
HIDDEN = 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--results", str(tmp_path)]) == NO_DEVICE
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "make gpu: nothing was tested or measured: no CUDA device is available\n"
    assert not any(tmp_path.iterdir())


def test_the_gate() -> None:
    exact = torch.tensor([1.0, -2.0])
    assert judge(exact + 0.01, exact).green
    assert not judge(exact + 0.1, exact).green
    assert not judge(torch.tensor([1.0, float("nan")]), exact).green
    assert not judge(exact[:1], exact).green
    assert speed_up(1.0, 2.5, Verdict(True, 0.0)) == "2.50 x"
    assert (
        speed_up(1.0, 2.5, Verdict(True, 0.0), Verdict(False, 1.0)) == "withheld: the correctness gate is red"
    )
    assert speed_up(1.0, None, Verdict(True, 0.0)) == "nothing to compare with"


class WrongBackend(ReferenceBackend):
    def experts(self, *arguments):
        return super().experts(*arguments) * 1.1


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers on the CPU that take a microsecond each, whatever they take."""

    def once(work, **options) -> Timed:
        work()
        return Timed(2e-6, 2e-6, 2e-6, options["how"])

    monkeypatch.setattr(layer, "HIDDEN", HIDDEN)
    monkeypatch.setattr(layer, "_copies", lambda *_: 2)
    monkeypatch.setattr(layer, "captured", lambda work: work)
    monkeypatch.setattr(layer, "timed", once)


def rows_of(backend, tokens: int) -> dict[str, dict[str, object]]:
    rows = layer.measure_layer(5, backend, 1e12, CPU, (tokens,))
    return {str(row["method"]): row for row in rows}


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_layer_is_held_against_every_implementation(untimed: None, tokens: int) -> None:
    pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")
    rows = rows_of(ReferenceBackend(), tokens)
    assert len(rows) == 6
    last = rows.pop("grouped-nf4-gemm, MXFP4, routing not timed")
    assert str(last["gate"]).startswith(("not run", "failed", "green"))
    for name, row in rows.items():
        assert row["gate"] == "green", (name, row)
        assert row["us"] == pytest.approx(1.0)
    ours = rows["moe_surgery, MXFP4"]
    assert ours["against the fastest of transformers'"] == "1.00 x"
    distinct = ours["distinct experts"]
    assert distinct >= 4
    assert ours["GB/s"] == pytest.approx(layer.bytes_read(distinct, 5, HIDDEN, True) / 1e3, rel=0.02)
    assert ours["share of copy"] == pytest.approx(ours["GB/s"] / 1e3)


def test_no_speed_up_is_reported_for_wrong_numbers(untimed: None) -> None:
    row = rows_of(WrongBackend(), 3)["moe_surgery, BF16"]
    assert row["gate"] == "RED"
    assert row["against the fastest of transformers'"] == "withheld: the correctness gate is red"


def test_bytes_of_a_layer_are_those_of_the_whole_step() -> None:
    config = gpt_oss_20b()
    whole = bytes_per_token(config, 32, 1, 1024)
    assert 24 * layer.bytes_read(4, 0, 2880, True) == pytest.approx(whole.experts)


def test_the_description_of_a_step_has_the_numbers() -> None:
    text = describe_step(gpt_oss_20b(), 1, 1024)
    assert text.startswith(
        "32 experts, batch 1, context 1024: 169 launches a step (7 a layer, 3 of them MoE, and 1)"
    )
    assert "experts 1.271" in text


def test_a_random_model_runs_and_counts_its_bytes() -> None:
    model = random_model(gpt_oss_20b(5, 2, 64, 96), CPU, ReferenceBackend())
    cache = model.new_cache(2, 200)
    fill_cache(cache, 190)
    assert cache.length == 190
    assert sorted(cache.positions[144][0].tolist()) == list(range(46, 190))
    logits = model(torch.zeros(2, 1, dtype=torch.int64), cache)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.05
    layers = 2 * (
        5 * (3 * 64 * 64 * 17 // 32 + 3 * 64 * 2) + 2 * (5 * 65 + 2 * 64 + 64 + 5120 * 65 + 4097 * 64)
    )
    assert weight_bytes(model) == layers + 2 * (2 * 96 * 64 + 64)


def test_pruned_rows_stand_beside_the_full_ones() -> None:
    def row(experts: int, rate: float, gate: str = "green") -> dict[str, object]:
        return {
            "experts": experts,
            "batch": 1,
            "tokens/s": rate,
            "weights GB": experts,
            "peak GB": experts,
            "gate": gate,
        }

    result = report.against_full([row(32, 100.0), row(8, 150.0), row(4, 200.0, "RED")])
    assert [r["against full"] for r in result] == ["1.50 x", "withheld: the correctness gate is red"]
    assert result[0]["full weights GB"] == 32


def test_the_report_says_what_was_not_measured(tmp_path: Path) -> None:
    given = {"how": "so", "date": "today", "machine": {"device": "none"}, "tests": "passed", "decode": []}
    given["one MoE layer"] = [{"experts": 4, "us": 1.23456}, {"experts": 8, "why": "a|b"}]
    data, text = report.write(tmp_path, given)
    assert json.loads(data.read_text()) == given
    assert "## decode\n\nnot measured\n" in text.read_text()
    assert "| 4 | 1.235 |  |\n| 8 |  | a/b |" in text.read_text()


def test_parts_measured_earlier_are_kept_on_the_same_machine_only(tmp_path: Path) -> None:
    machine = {"device": "a card", "torch": "2", "copy GB/s": 1.0}
    assert report.earlier(tmp_path, machine) == {}
    report.write(tmp_path, {"how": "", "machine": machine, "tests": "passed", "decode": None})
    assert report.earlier(tmp_path, {**machine, "copy GB/s": 2.0})["tests"] == "passed"
    assert report.earlier(tmp_path, {**machine, "torch": "3"}) == {}


def test_the_device_tests_are_found() -> None:
    assert {f.name for f in FILES} == {"device_kernels.py", "device_step.py", "gpu_experts.py"}
