"""The whole job on the embedded model: what changes and what does not, resuming, and when nothing helps."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from moe_surgery import Plan, evaluate, export_gguf, load_model, make_card, prune, repair, verify  # noqa: E402
from moe_surgery.checkpoint.checkpoint import Checkpoint  # noqa: E402
from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.examples.skills import documents  # noqa: E402
from moe_surgery.progress import Progress  # noqa: E402
from moe_surgery.repairing import RepairResult  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from tests.support import per_expert  # noqa: E402
from tests.support.checkpoints import kept_tensors, load_tensors  # noqa: E402
from tests.support.command import call  # noqa: E402
from tests.support.manifests import rewrite  # noqa: E402

TINY = "example:tiny"
PLAN = Plan("gpt_oss", 32, tuple(tuple(range(i, 32, 4)) for i in range(4)), provenance={"method": "keep"})
STEPS = 4
SMALL = ("mlp.router.weight", "mlp.router.bias", "mlp.experts.down_proj_bias")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """facts.jsonl and other.jsonl (spelling)."""
    folder = tmp_path_factory.mktemp("texts")
    result = {}
    for name, domain in (("facts", "facts"), ("other", "spelling")):
        rows = [json.dumps({"text": t}) for t in documents(domain, 12, 7, questions=1)]
        result[name] = folder / f"{name}.jsonl"
        result[name].write_text("\n".join(rows) + "\n")
    return result


def run(files: dict[str, Path], out: Path, **options: Any) -> RepairResult:
    given = {"plan": PLAN, "steps": STEPS, "batch_tokens": 64, "max_tokens": 300, "held_out": 0.5, **options}
    return repair(TINY, files["facts"], out, **given)


@pytest.fixture(scope="module")
def repaired(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RepairResult:
    return run(files, tmp_path_factory.mktemp("repaired") / "out", measure=files["other"], norms=True)


def bits(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_tensors(folder).items()}


def test_only_routers_biases_and_norms_change(repaired: RepairResult) -> None:
    before = kept_tensors(load_tensors(resolve(TINY)), PLAN.layers)
    after = load_tensors(repaired.out)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    changed = {n for n in after if after[n].tobytes() != before[n].tobytes()}
    assert changed
    assert changed <= set(repaired.tensors)
    assert all(name.endswith((*SMALL, "norm.weight")) for name in repaired.tensors)
    assert {name for name in after if name.endswith(SMALL)} <= changed


def test_the_gain_is_the_one_that_evaluate_measures(
    repaired: RepairResult, files: dict[str, Path], tmp_path: Path
) -> None:
    evaluation = evaluate(TINY, files["other"], plans=[("plan", PLAN)], pruned=[repaired.out], max_tokens=300)
    _, plan, checkpoint = evaluation.models
    gain = repaired.measured["other"]
    assert gain.tokens == plan.overall.tokens
    assert gain.before == pytest.approx(plan.overall.kl, rel=0.01)
    assert gain.after == pytest.approx(checkpoint.overall.kl, rel=0.01)
    own = evaluate(TINY, files["facts"], plans=[("plan", PLAN)], pruned=[repaired.out], max_tokens=300)
    assert own.models[2].overall.kl < own.models[1].overall.kl
    held_out = repaired.held_out["facts"]
    assert held_out.after < held_out.before


def test_the_manifest_and_the_card_say_what_was_repaired(repaired: RepairResult) -> None:
    manifest = json.loads((repaired.out / "surgery.json").read_text())
    record = manifest["repair"]
    assert record["tensors"] == sorted(repaired.tensors)
    assert [t["name"] for t in record["texts"]["facts"]] == ["facts.jsonl"]
    gain = repaired.held_out["facts"]
    assert record["held_out"]["facts"]["kl_before"] == pytest.approx(gain.before, rel=1e-5)
    assert record["measured"]["other"]["kl_after"] == pytest.approx(
        repaired.measured["other"].after, rel=1e-5
    )
    card = (repaired.out / "README.md").read_text()
    assert f"{len(repaired.tensors)} small tensors (routers, biases of the experts and norm weights;" in card
    assert f"| `facts` | held out | {gain.tokens} | {gain.before:.4g} | {gain.after:.4g} |" in card
    assert "Nothing was retrained" not in card
    assert make_card(repaired.out) == card


def test_an_evaluation_of_the_unrepaired_plan_is_not_one_of_the_repaired_checkpoint(
    repaired: RepairResult, files: dict[str, Path]
) -> None:
    plain = evaluate(TINY, files["other"], plans=[("plan", PLAN)], max_tokens=100)
    with pytest.raises(PlanMismatchError, match="the evaluation has no model"):
        make_card(repaired.out, evaluation=plain)
    both = evaluate(TINY, files["other"], plans=[("plan", PLAN)], pruned=[repaired.out], max_tokens=100)
    assert f"{both.models[2].overall.kl:.4f}" in make_card(repaired.out, evaluation=both)


def test_verify_compares_all_but_the_repaired_tensors_with_the_source(repaired: RepairResult) -> None:
    result = verify(repaired.out, source=TINY)
    assert result.ok
    assert result.repaired == tuple(sorted(repaired.tensors))
    assert any(f"{len(repaired.tensors)} repaired tensors" in note for note in result.notes)


@pytest.mark.parametrize("suffix", ["layers.1.mlp.router.weight", "layers.2.mlp.experts.down_proj_blocks"])
def test_verify_finds_a_flipped_byte_in_repaired_tensors_and_in_others(
    repaired: RepairResult, tmp_path: Path, suffix: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repaired.out, copy)
    with Checkpoint.open(copy) as opened:
        name, ref = next((n, r) for n, r in opened.tensors.items() if n.endswith(suffix))
    with open(copy / ref.shard, "r+b") as file:
        file.seek(ref.offset + ref.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    problems = verify(copy, source=TINY).problems
    assert [name in problem for problem in problems] == [True]


def test_a_manifest_cannot_excuse_the_weight_of_an_expert(repaired: RepairResult, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repaired.out, copy)
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(copy, lambda d: d["repair"]["tensors"].append(name))
    problems = verify(copy, source=TINY).problems
    assert [f"lists tensor '{name}' as repaired" in p for p in problems] == [True]


def test_an_interrupted_run_resumes_to_the_same_bytes(files: dict[str, Path], tmp_path: Path) -> None:
    stages: list[tuple[str, int]] = []

    def stop(progress: Progress) -> None:
        stages.append((progress.stage, progress.done))
        if stages[-1] == ("repair", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "a", progress=stop)
    assert not (tmp_path / "a").exists()
    stages.clear()
    run(files, tmp_path / "a", progress=lambda p: stages.append((p.stage, p.done)))
    first = next(done for stage, done in stages if stage == "repair")
    assert 0 < first <= 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    run(files, tmp_path / "b")
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    assert (tmp_path / "a" / "surgery.json").read_bytes() == (tmp_path / "b" / "surgery.json").read_bytes()


def test_a_repair_that_does_not_help_leaves_what_prune_writes(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Plan("gpt_oss", 32, (tuple(range(32)),) * 4)
    with caplog.at_level(logging.WARNING, "moe_surgery"):
        result = run(files, tmp_path / "tried", plan=whole, steps=1, dtype=torch.float32, backend="reference")
    assert not result.repaired
    assert "nothing to repair" in caplog.text
    prune(TINY, tmp_path / "pruned", whole)
    for file in (tmp_path / "pruned").iterdir():
        assert (tmp_path / "tried" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_repair_that_is_tried_in_vain_says_so(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where texts are too few for the gain to show."""
    monkeypatch.setattr("moe_surgery.quality.repair.distill.LEAST_GAIN", 1.0)
    with caplog.at_level(logging.WARNING, "moe_surgery"):
        result = run(files, tmp_path / "tried", steps=1)
    assert not result.repaired
    assert result.kl[-1] < result.kl[0]
    assert "does not lower the divergence on held-out texts" in caplog.text
    assert "repair" not in json.loads((tmp_path / "tried" / "surgery.json").read_text())


def test_a_pruned_checkpoint_is_repaired_by_its_source(
    files: dict[str, Path], repaired: RepairResult, tmp_path: Path
) -> None:
    options = {"steps": STEPS, "batch_tokens": 64, "max_tokens": 300, "held_out": 0.5, "norms": True}
    prune(TINY, tmp_path / "pruned", PLAN)
    again = repair(
        tmp_path / "pruned",
        files["facts"],
        tmp_path / "out",
        source=TINY,
        measure=files["other"],
        **options,  # type: ignore[arg-type]
    )
    assert bits(again.out) == bits(repaired.out)
    with pytest.raises(PlanMismatchError, match="does not say which experts of example:tiny it has"):
        repair(TINY, files["facts"], tmp_path / "no", source=TINY)


def test_of_several_plans_the_best_is_repaired(files: dict[str, Path], tmp_path: Path) -> None:
    good = Plan("gpt_oss", 32, (tuple(range(31)),) * 4)
    result = run(files, tmp_path / "out", plan=[PLAN, good], steps=0)
    assert result.plan == good
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["plan"] == good.as_dict()


def test_the_runtime_computes_with_the_repaired_tensors(repaired: RepairResult) -> None:
    pytest.importorskip("transformers")
    from tests.support import oracle

    tokens = torch.tensor([Text(TINY).encode(documents("facts", 1, 9)[0])[:60]])
    theirs = oracle.logits_of(oracle.load_model(repaired.out), tokens)
    ours = load_model(repaired.out, dtype=torch.float32, backend="reference")(tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    unrepaired = load_model(TINY, dtype=torch.float32, plan=PLAN, backend="reference")(tokens)
    assert float((ours - unrepaired).abs().max()) > 0.01 * float(theirs.abs().max())


def test_an_export_has_the_repaired_values(repaired: RepairResult, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    export_gguf(repaired.out, tmp_path / "model.gguf")
    exported = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    tensors = load_tensors(repaired.out)
    for theirs, ours in (
        ("ffn_gate_inp.weight", "mlp.router.weight"),
        ("ffn_gate_inp.bias", "mlp.router.bias"),
        ("ffn_down_exps.bias", "mlp.experts.down_proj_bias"),
        ("attn_norm.weight", "input_layernorm.weight"),
    ):
        bits = tensors[f"model.layers.2.{ours}"].astype(np.uint32) << 16
        assert (exported[f"blk.2.{theirs}"] == bits.view(np.float32)).all(), ours


def test_llama_cpp_computes_with_the_repaired_tensors(repaired: RepairResult, tmp_path: Path) -> None:
    """Within its rounding: activations to 8 bits in front of MXFP4 weights."""
    llama_cpp = pytest.importorskip("llama_cpp")
    export_gguf(repaired.out, tmp_path / "model.gguf")
    tokens = Text(TINY).encode(documents("facts", 1, 9)[0])[:60]
    llama = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=512, n_batch=512, n_threads=1, logits_all=True, verbose=False
    )
    llama.eval(tokens)
    theirs = torch.from_numpy(llama.scores[: len(tokens)].copy())
    ours = load_model(repaired.out, dtype=torch.float32)(torch.tensor([tokens]))[0]
    errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert float(errors.median()) < 5e-2


def test_what_cannot_be_repaired_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    for options, message in (
        ({"plan": None}, "pass a `plan`, or the `source`"),
        ({"source": TINY}, "pass a `plan`, or the `source`"),
        ({"held_out": 1.0}, "`held_out` 1.0: must be above 0 and below 1"),
        ({"steps": -1}, "`steps` -1: must be at least 0"),
        ({"learning_rate": 2.0}, "`learning_rate` 2.0: must be above 0 and below 1"),
    ):
        with pytest.raises(UsageError, match=message):
            run(files, tmp_path / "out", **options)
    with pytest.raises(PlanMismatchError, match="the plan is for gpt_oss with 4 layers of 8"):
        run(files, tmp_path / "out", plan=Plan("gpt_oss", 8, ((0,),) * 4))
    assert list(tmp_path.iterdir()) == []


def test_other_families_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = per_expert.write(tmp_path / "other", per_expert.deepseek(), per_expert.config())
    with pytest.raises(
        InvalidInputError, match="repair, trace, generate, export and conversions support gpt-oss only"
    ):
        repair(other, files["facts"], tmp_path / "out", plan=PLAN)


def test_the_command_prints_figures_and_json(files: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(PLAN.to_json())
    arguments = [
        "repair",
        TINY,
        "--plan",
        plan,
        "--texts",
        files["facts"],
        "--train-steps",
        2,
        "--max-tokens",
        200,
    ]
    ended = call(capsys, *arguments, "--measure", files["other"], "-o", tmp_path / "a")
    assert ended.code == 0, ended.err
    assert "held out" in ended.out
    assert "measured" in ended.out
    result = call(capsys, *arguments, "--json", "-o", tmp_path / "b").json()
    assert result["repaired"] == bool(result["tensors"])
    assert result["held_out"]["facts"]["before"] == result["kl"][0]
    assert call(capsys, "verify", tmp_path / "a", "--source", TINY).code == 0
