"""--top-k: how many experts the router chooses for a token, in every command that takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from moe_surgery import inspect, load_plan, verify
from moe_surgery.quality.corpus import open_corpus, text_files
from moe_surgery.runtime.text import Text
from moe_surgery.selection.plan import Plan
from tests.export.reading import read
from tests.support import oracle
from tests.support.checkpoints import Shape, load_config, write_checkpoint
from tests.support.command import Ended, call, contents
from tests.support.routed import Routed

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
PROMPT = "Question: What is 7 + 5?\nAnswer:"
KEPT = [1, 5, 9, 20, 30, 31]


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


def refused(ended: Ended, code: int = 2) -> str:
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert ended.error.isprintable()
    return ended.error.removeprefix("moe-surgery: ")


def planned(capsys: Capture, path: Path, *options: str) -> Path:
    keep = ",".join(map(str, KEPT))
    done(call(capsys, "plan", "--keep", keep, TINY, *options, "-o", path))
    return path


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_a_plan_stores_it_and_prune_follows(top_k: int, capsys: Capture, tmp_path: Path) -> None:
    plain = planned(capsys, tmp_path / "plain.json")
    plan = planned(capsys, tmp_path / "plan.json", "--top-k", str(top_k))
    stored = json.loads(plan.read_text())
    assert stored == json.loads(plain.read_text()) | {"top_k": top_k}
    made = done(call(capsys, "prune", TINY, tmp_path / "one", "--plan", plan))
    assert f"6 of 32 experts, top-{top_k}," in made.out
    done(call(capsys, "prune", TINY, tmp_path / "two", "--plan", plain, "--top-k", str(top_k)))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    config = load_config(tmp_path / "one")
    assert (config["num_experts_per_tok"], config["experts_per_token"]) == (top_k, top_k)
    assert oracle.load_model(tmp_path / "one").model.layers[0].mlp.router.top_k == top_k
    result = verify(tmp_path / "one", source=TINY)
    assert (result.problems, result.notes) == ((), ())
    assert inspect(tmp_path / "one").top_k == top_k


def test_the_option_replaces_what_the_plan_says(capsys: Capture, tmp_path: Path) -> None:
    plan = planned(capsys, tmp_path / "plan.json", "--top-k", "1")
    done(call(capsys, "prune", TINY, tmp_path / "out", "--plan", plan, "--top-k", "5"))
    assert load_config(tmp_path / "out")["num_experts_per_tok"] == 5
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert manifest["plan"]["top_k"] == 5
    assert load_plan(plan).top_k == 1


def test_plans_of_every_kind_take_it(capsys: Capture, tmp_path: Path) -> None:
    ranking = tmp_path / "ranking.json"
    ranking.write_text(json.dumps({f"layer_{i}": list(range(32)) for i in range(4)}))
    for options in (
        (str(ranking), "--experts", "8", "--model-type", "gpt_oss"),
        ("--random", "--experts", "8", TINY),
        ("--keep", "0-7", TINY),
    ):
        output = done(call(capsys, "plan", *options, "--top-k", "7"))
        assert json.loads(output.out)["top_k"] == 7
        assert refused(call(capsys, "plan", *options, "--top-k", "9")) == (
            "--top-k 9: the plan keeps 8 experts in a layer; choose 1 to 8"
        )


@pytest.mark.parametrize("with_plan", [False, True])
def test_export_writes_it(with_plan: bool, capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    plan = planned(capsys, tmp_path / "plan.json", "--top-k", "2")
    options = ["--plan", plan] if with_plan else []
    kept = 6 if with_plan else 32
    usual = {"with": 2, "without": 4}["with" if with_plan else "without"]
    for number, (top_k, more) in enumerate(((usual, []), (6, ["--top-k", "6"]))):
        out = tmp_path / f"{number}.gguf"
        done(call(capsys, "export", TINY, out, *options, *more, "--no-tokenizer"))
        metadata = read(out).metadata
        assert metadata["gpt-oss.expert_used_count"] == top_k
        assert metadata["gpt-oss.expert_count"] == kept
    one, two = read(tmp_path / "0.gguf"), read(tmp_path / "1.gguf")
    assert one.tensors == two.tensors
    who = "the plan keeps" if with_plan else "example:tiny has"
    output = refused(call(capsys, "export", TINY, tmp_path / "no.gguf", *options, "--top-k", str(kept + 1)))
    assert output == f"--top-k {kept + 1}: {who} {kept} experts in a layer; choose 1 to {kept}"
    assert not (tmp_path / "no.gguf").exists()


@pytest.mark.parametrize("top_k", [1, 9])
def test_generate_routes_by_it_and_samples_by_the_other(top_k: int, capsys: Capture) -> None:
    options = ("generate", TINY, "--prompt", PROMPT, "--max-new-tokens", "6", "--dtype", "f32", "--json")
    options += ("--backend", "reference", "--top-k", str(top_k))
    ended = done(call(capsys, *options))
    reference = oracle.load_model(inspect(TINY).path, num_experts_per_tok=top_k)
    prompt = torch.tensor([Text(TINY).encode(PROMPT)])
    expected = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
    )
    assert ended.json()["tokens"] == expected[0, prompt.shape[1] :].tolist()
    assert ended.error == (
        f"note: the router chooses {top_k} experts per token instead of 4; to limit the tokens to sample from "
        "use --sampling-top-k"
    )
    drawn = ("--temperature", "5", "--seed", "3", "--sampling-top-k", "1")
    assert done(call(capsys, *options, *drawn)).json()["tokens"] == ended.json()["tokens"]


def test_generate_as_usual_says_nothing_of_it(capsys: Capture) -> None:
    options = ("generate", TINY, "--prompt", PROMPT, "--max-new-tokens", "2", "--json")
    usual = done(call(capsys, *options))
    assert usual.err == ""
    assert done(call(capsys, *options, "--top-k", "4")).err == ""


def test_help_says_which_top_k_is_which(capsys: Capture) -> None:
    for command in ("plan", "prune", "export", "generate", "evaluate"):
        output = " ".join(done(call(capsys, command, "--help")).out.split())
        assert "--top-k N Experts per token" in output
        assert ("--sampling-top-k N Sample from the N most likely tokens" in output) == (
            command == "generate"
        )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "notes.txt"
    file.write_text("Question: What is 7 + 5?\nAnswer: 12\nQuestion: What is 20 + 5?\nAnswer: 25\n")
    return file


def loss(routed: Routed, texts: Path, kept: list[int], top_k: int) -> float:
    """transformers' mean cross-entropy with the experts `kept` and that top-k."""
    corpus = open_corpus(text_files([texts], (), None), Text(TINY), context=4096, max_tokens=None)
    total, count = 0.0, 0
    with routed.only([kept] * 4, top_k):
        for passage in corpus:
            logits = torch.from_numpy(routed.see(passage.tokens).logits)
            targets = torch.tensor(passage.tokens[1:])
            total += float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
            count += len(targets)
    return total / count


def test_evaluate_tries_it(capsys: Capture, tmp_path: Path, texts: Path) -> None:
    plan, pruned = planned(capsys, tmp_path / "plan.json"), tmp_path / "pruned"
    done(call(capsys, "prune", TINY, pruned, "--plan", plan))
    common = ("evaluate", TINY, "--texts", texts, "--dtype", "f32", "--backend", "reference", "--json")
    routed = Routed(inspect(TINY).path)
    alone = done(call(capsys, *common, "--top-k", "2")).json()["models"]
    assert [(m["name"], m["top_k"], set(m["experts"])) for m in alone] == [
        ("full", 4, {32}),
        ("top-k 2", 2, {32}),
    ]
    everyone = list(range(32))
    for model, top_k in zip(alone, (4, 2), strict=True):
        quality = model["domains"]["notes"]
        assert quality["cross_entropy"] == pytest.approx(loss(routed, texts, everyone, top_k), rel=1e-4)
    several = done(call(capsys, *common, "--top-k", "6", pruned, "--plan", plan)).json()["models"]
    assert [(m["kind"], m["top_k"], set(m["experts"])) for m in several] == [
        ("full", 4, {32}),
        ("plan", 6, {6}),
        ("checkpoint", 6, {6}),
    ]
    for model in several[1:]:
        quality = model["domains"]["notes"]
        assert quality["cross_entropy"] == pytest.approx(loss(routed, texts, KEPT, 6), rel=1e-4)
        assert quality["redirected"] == several[1]["domains"]["notes"]["redirected"]
    assert refused(call(capsys, *common, "--top-k", "7", "--plan", plan)) == (
        f"--top-k 7: {plan} keeps 6 experts in a layer; choose 1 to 6"
    )
    assert refused(call(capsys, *common, "--top-k", "7", pruned)).startswith(
        f"--top-k 7: {pruned} has 6 experts"
    )
    assert refused(call(capsys, *common, "--top-k", "33")).startswith(
        "--top-k 33: example:tiny has 32 experts"
    )


def test_a_draft_may_not_choose_more_than_it_has(capsys: Capture, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(Plan("gpt_oss", 32, ((0, 1),) * 4).to_json())
    options = ("generate", TINY, "--prompt", PROMPT, "--max-new-tokens", "2", "--draft-plan", plan)
    assert refused(call(capsys, *options, "--draft-top-k", "3")) == (
        f"--draft-top-k 3: {plan} keeps 2 experts in a layer; choose 1 to 2"
    )
    output = refused(call(capsys, *options[:-2], "--top-k", "2", "--draft-top-k", "3"))
    assert output.startswith("--draft-top-k 3: example:tiny itself uses 2")


# --- a checkpoint whose config.json says it in two ways


def test_a_config_that_a_user_changed_is_noted_once_by_every_command(
    capsys: Capture, tmp_path: Path, texts: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for file in Path(inspect(TINY).path).iterdir():
        (source / file.name).symlink_to(file)
    (source / "config.json").unlink()
    config = load_config(Path(inspect(TINY).path)) | {"num_experts_per_tok": 2}
    (source / "config.json").write_text(json.dumps(config))
    note = (
        f"note: {source}/config.json: num_experts_per_tok is 2 but experts_per_token is 4; transformers and "
        "moe-surgery use num_experts_per_tok"
    )
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    output = {}
    for name, arguments in {
        "inspect": ("inspect", source, "--json"),
        "plan": ("plan", "--random", "-n", "8", source, "-o", plan, "--json"),
        "prune": ("prune", source, out, "--plan", plan, "--json"),
        "verify": ("verify", out, "--source", source, "--json"),
        "export": ("export", source, tmp_path / "out.gguf", "--plan", plan, "--json"),
        "generate": ("generate", source, "--prompt", PROMPT, "--max-new-tokens", "2", "--json"),
        "evaluate": ("evaluate", source, out, "--plan", plan, "--texts", texts, "--json"),
        "profile": ("profile", source, "-o", tmp_path / "some.stats", "--texts", texts, "--json"),
    }.items():
        ended = done(call(capsys, *arguments))
        assert ended.err.splitlines().count(note) == 1, (name, ended.err)
        assert ended.err.count("experts_per_token") == 1, (name, ended.err)
        output[name] = ended.json()
    assert output["inspect"]["top_k"] == output["prune"]["top_k"] == output["export"]["top_k"] == 2
    assert output["inspect"]["notes"] == [note.removeprefix("note: ")]
    assert [m["top_k"] for m in output["evaluate"]["models"]] == [2, 2, 2]
    written = load_config(out)
    assert (written["num_experts_per_tok"], written["experts_per_token"]) == (2, 2)
    assert call(capsys, "inspect", out).err == ""
    assert call(capsys, "inspect", source, "--quiet").err == ""


def test_two_checkpoints_have_a_note_each(capsys: Capture, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, Shape(), edit_config=lambda c: c.update(experts_per_token=1))
    done(call(capsys, "prune", tmp_path / "a", tmp_path / "out", "--keep", "all"))
    ended = done(call(capsys, "verify", tmp_path / "out", "--source", tmp_path / "b"))
    assert ended.err.count("b/config.json") == 1
