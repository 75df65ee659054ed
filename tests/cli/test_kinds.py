"""A file of one kind given where another belongs: the error says what it is and which command takes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.command import call, untouched
from tests.support.imatrices import Sums, write_legacy_imatrix

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"

# Name of the file in the fixture's folder -> what the error calls it, and a word of where it belongs.
KINDS = {
    "plan.json": ("a plan", "--plan of prune"),
    "sorted-plan.json": ("a plan", "--plan of prune"),
    "ranking.json": ("a ranking", "moe-surgery plan RANKING --experts N"),
    "published.json": ("a ranking", "moe-surgery plan RANKING --experts N"),
    "numbered.json": ("a ranking", "moe-surgery plan RANKING --experts N"),
    "numbered.jsonl": ("a ranking", "moe-surgery plan RANKING --experts N"),
    "rank-output.json": ("what rank or search printed with --json", "written with -o"),
    "tiny.stats": ("a statistics file", "moe-surgery rank, plan, report or stats"),
    "stats.safetensors": ("a statistics file", "moe-surgery rank, plan, report or stats"),
    "outcome.json": ("published statistics of experts", "moe-surgery rank"),
    "evaluation.json": ("an evaluation", "--evaluation of moe-surgery report or card"),
    "trace.json": ("a trace", "no command reads it"),
    "pruned/surgery.json": ("the manifest of a pruned checkpoint", "pass its folder"),
    "pruned/expert_mapping.json": ("the expert mapping of a pruned checkpoint", "pass its folder"),
    "bench.json": ("the result of a benchmark", "no command reads it"),
    "inspect.json": ("the result of inspect", "pass the checkpoint"),
    "pruned/config.json": ("the config.json of a model", "pass its folder"),
    "index.json": ("the shard index of a checkpoint", "pass its folder"),
    "pruned": ("a checkpoint folder", "where help says CKPT"),
    "pruned/model.safetensors": ("a safetensors file of weights", "where help says CKPT"),
    "tiny.gguf": ("a GGUF file", "inspect, plan, prune and verify take it"),
    "im.dat": ("an importance matrix", "--imatrix of plan or prune"),
    "report.html": ("an HTML page", "browser"),
}
RANKINGS = {"ranking.json", "published.json", "numbered.json", "numbered.jsonl"}
PLANS = {"plan.json", "sorted-plan.json"}
STATS = {"tiny.stats", "stats.safetensors"}
CHECKPOINTS = {"pruned", "pruned/model.safetensors"}
MODELS = CHECKPOINTS | {"tiny.gguf"}
TEXTS = {"pruned/config.json", "report.html"}

# Where it is given -> the command, what belongs there, which files do, and the exit code.
ARGUMENTS: dict[str, tuple[str, str, set[str], int]] = {
    "prune --plan": ("prune example:tiny {new}/out --plan {file}", "a plan", PLANS, 3),
    "export --plan": ("export example:tiny {new}/out.gguf --plan {file}", "a plan", PLANS, 3),
    "generate --plan": ("generate example:tiny --prompt a --plan {file}", "a plan", PLANS, 3),
    "generate --draft-plan": ("generate example:tiny --prompt a --draft-plan {file}", "a plan", PLANS, 3),
    "evaluate --plan": ("evaluate example:tiny --texts {in}/texts.txt --plan {file}", "a plan", PLANS, 3),
    "trace --plan": ("trace example:tiny --prompt a -o {new}/t.html --plan {file}", "a plan", PLANS, 3),
    "profile --sequential": (
        "profile example:tiny --texts {in}/texts.txt -o {new}/s --sequential {file}",
        "a plan",
        PLANS,
        3,
    ),
    "report --plan": ("report {in}/tiny.stats -o {new}/r.html --plan {file}", "a plan", PLANS, 3),
    "report --evaluation": (
        "report {in}/tiny.stats -o {new}/r.html --evaluation {file}",
        "an evaluation",
        {"evaluation.json"},
        3,
    ),
    "card --evaluation": ("card {in}/pruned --evaluation {file}", "an evaluation", {"evaluation.json"}, 3),
    "report": (
        "report {file} -o {new}/r.html",
        "a statistics file or a ranking",
        {*STATS, *RANKINGS, "outcome.json"},
        3,
    ),
    "stats show": ("stats show {file}", "a statistics file", STATS, 3),
    "stats merge": ("stats merge {in}/tiny.stats {file} -o {new}/s", "a statistics file", STATS, 3),
    "rank": ("rank {file}", "a statistics file", {*STATS, "outcome.json"}, 3),
    "rank beside statistics": (
        "rank {in}/tiny.stats {file} --metric reap",
        "a statistics file",
        {*STATS, "outcome.json"},
        3,
    ),
    "rank --interleave-with": (
        "rank {in}/tiny.stats --metric reap --interleave-with {file}",
        "a ranking",
        RANKINGS,
        3,
    ),
    "plan": ("plan {file} -n 2", "a ranking or a statistics file", RANKINGS | STATS, 3),
    "plan --metric": (
        "plan {file} -n 2 --metric reap",
        "a ranking or a statistics file",
        RANKINGS | STATS,
        3,
    ),
    # A GGUF file that is no matrix is named by its architecture.
    "plan --imatrix": (
        "plan example:tiny -n 2 --imatrix {file}",
        "an importance matrix",
        {"im.dat", "tiny.gguf"},
        3,
    ),
    "stats import": (
        "stats import {file} --model-top-k 2 -o {new}/s",
        "counts of routed tokens",
        {"im.dat", "tiny.gguf"},
        3,
    ),
    "prune --ranking": ("prune example:tiny {new}/out --ranking {file} -n 2", "a ranking", RANKINGS, 3),
    "bench decode --ranking": (
        "bench decode example:tiny --expert-counts 2 --ranking {file}",
        "a ranking",
        RANKINGS,
        3,
    ),
    "profile --texts": ("profile example:tiny -o {new}/s --texts {file}", "texts", TEXTS, 3),
    "search --texts": ("search example:tiny -o {new}/r --texts {file}", "texts", TEXTS, 3),
    "inspect": ("inspect {file}", "a checkpoint", MODELS, 2),
    "prune": ("prune {file} {new}/out --keep 0", "a checkpoint", MODELS, 2),
    "prune a plan": ("prune {file} {new}/out --plan {in}/plan.json", "a checkpoint", MODELS, 2),
    "export": ("export {file} {new}/out.gguf", "a checkpoint", CHECKPOINTS, 2),
    "generate": ("generate {file} --prompt a", "a checkpoint", CHECKPOINTS, 2),
    "trace": ("trace {file} --prompt a -o {new}/t.html", "a checkpoint", CHECKPOINTS, 2),
    "generate --draft": ("generate example:tiny --prompt a --draft {file}", "a checkpoint", CHECKPOINTS, 2),
    "evaluate": (
        "evaluate example:tiny {file} --texts {in}/texts.txt",
        "a checkpoint",
        CHECKPOINTS,
        2,
    ),
    "profile": ("profile {file} --texts {in}/texts.txt -o {new}/s", "a checkpoint", CHECKPOINTS, 2),
    "bench surgery": ("bench surgery {file}", "a checkpoint", CHECKPOINTS, 2),
    "plan CKPT": ("plan --keep 0 {file}", "a checkpoint", MODELS, 2),
    "verify": ("verify {file}", "a checkpoint", MODELS, 2),
    "verify --source": ("verify {in}/pruned --source {file}", "a checkpoint", CHECKPOINTS, 2),
    "card": ("card {file}", "a checkpoint", CHECKPOINTS, 2),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind, written by the commands themselves wherever they write it."""
    from click.testing import CliRunner

    from moe_surgery.cli import cli

    folder = tmp_path_factory.mktemp("kinds")

    def run(*arguments: str) -> str:
        ended = CliRunner().invoke(cli, [a.format(**{"in": folder}) for a in arguments])
        assert ended.exit_code == 0, (arguments, ended.output, ended.exception)
        return ended.stdout

    (folder / "texts.txt").write_text("Question: What is 7 + 5?\nAnswer: 7 + 5 = 12.\n")
    run("profile", TINY, "--texts", "{in}/texts.txt", "-o", "{in}/tiny.stats")
    shutil.copy(folder / "tiny.stats", folder / "stats.safetensors")
    output = run("rank", "{in}/tiny.stats", "--metric", "reap", "-o", "{in}/ranking.json", "--json")
    (folder / "rank-output.json").write_text(output)
    layers = json.loads((folder / "ranking.json").read_text())["layers"]
    (folder / "published.json").write_text(json.dumps({f"layer_{n}": row for n, row in enumerate(layers)}))
    (folder / "numbered.json").write_text(json.dumps({str(n): row for n, row in enumerate(layers)}))
    lines = [json.dumps({str(n): row}) + "\n" for n, row in enumerate(layers)]
    (folder / "numbered.jsonl").write_text("".join(lines))
    run("plan", "--keep", "0-3", TINY, "-o", "{in}/plan.json")
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "sorted-plan.json").write_text(json.dumps(dict(reversed(plan.items())), indent=4))
    run("prune", TINY, "{in}/pruned", "--plan", "{in}/plan.json")
    texts = ("--texts", "{in}/texts.txt")
    run("evaluate", TINY, "--plan", "{in}/plan.json", *texts, "-o", "{in}/evaluation.json")
    (folder / "trace.json").write_text(run("trace", TINY, "--prompt", "a", "--json"))
    run("export", TINY, "{in}/tiny.gguf")
    run("report", "{in}/tiny.stats", "-o", "{in}/report.html")
    (folder / "inspect.json").write_text(run("inspect", TINY, "--json"))
    bench = ("bench", "kernels", "--hidden", "64", "--expert-counts", "2", "--rounds", "1", "--json")
    (folder / "bench.json").write_text(run(*bench))
    experts = {"3": {"count_frequency": 0.5}}
    phases = {f"{p}_expert_analytics": {"layer_0": experts} for p in ("think", "answer")}
    (folder / "outcome.json").write_text(json.dumps({"sample_count": 2, **phases}))
    sums = {"blk.0.ffn_gate_exps.weight": Sums(np.ones((2, 4)), np.ones(2, np.int64))}
    write_legacy_imatrix(folder / "im.dat", sums)
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors"}}
    (folder / "index.json").write_text(json.dumps(index, indent=2))
    return folder


def test_the_table_names_every_file_once(made: Path) -> None:
    assert all((made / name).exists() for name in KINDS)


# Every argument with every third kind that does not belong there, so that each kind meets each sort of argument.
WRONG = [
    (kind, argument)
    for i, (argument, (_, _, right, _)) in enumerate(ARGUMENTS.items())
    for j, kind in enumerate(KINDS)
    if kind not in right and (i + j) % 3 == 0
]


def test_every_kind_is_given_where_every_other_belongs() -> None:
    met = {(kind, ARGUMENTS[argument][1]) for kind, argument in WRONG}
    expected = {
        (kind, sort) for _, sort, right, _ in ARGUMENTS.values() for kind in KINDS if kind not in right
    }
    assert {pair for pair in expected if pair[1] in ("a plan", "a checkpoint")} <= met
    assert {kind for kind, _ in met} == set(KINDS)
    assert {argument for _, argument in WRONG} == set(ARGUMENTS)


@pytest.mark.parametrize(("kind", "argument"), WRONG)
def test_what_is_given_in_place_of_another_kind_is_named(
    kind: str, argument: str, made: Path, tmp_path: Path, capsys: Capture
) -> None:
    command, expected, _, code = ARGUMENTS[argument]
    filled = [a.format(**{"in": made, "new": tmp_path, "file": made / kind}) for a in command.split()]
    with untouched(made, tmp_path):
        ended = call(capsys, *filled)
    title, use = KINDS[kind]
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert f"{made / kind}: is {title}, not {expected}; " in ended.error
    assert use in ended.error


@pytest.mark.parametrize(
    "name", ["plan.json", "ranking.json", "tiny.stats", "outcome.json", "evaluation.json"]
)
def test_a_damaged_file_of_the_right_kind_keeps_its_own_error(
    name: str, made: Path, tmp_path: Path, capsys: Capture
) -> None:
    raw = (made / name).read_bytes()
    damaged = tmp_path / name
    damaged.write_bytes(
        raw.replace(b'"version": 1', b'"version": 7').replace(b'"sample_count": 2', b'"x": 2')
    )
    if name == "tiny.stats":
        damaged.write_bytes(raw[:-1])
    commands = {
        "plan.json": ["prune", TINY, tmp_path / "out", "--plan", damaged],
        "ranking.json": ["plan", damaged, "-n", "2"],
        "tiny.stats": ["stats", "show", damaged],
        "outcome.json": ["rank", damaged],
        "evaluation.json": [
            "report",
            made / "tiny.stats",
            "-o",
            tmp_path / "r.html",
            "--evaluation",
            damaged,
        ],
    }
    ended = call(capsys, *commands[name])
    assert ended.code == 3
    assert f"{damaged}: " in ended.error
    assert "; this reads" in ended.error or ": is a" not in ended.error


# --- outputs that read as sources

SOURCES = [
    "example:tiny",
    "example:new",
    "published:law",
    "hf://a/b",
    "https://huggingface.co/a/b",
    "a/b@main",
]
WRITERS = {
    "prune": "prune example:tiny {out} --keep 0",
    "export": "export example:tiny {out}",
    "plan": "plan --keep 0 example:tiny -o {out}",
    "rank": "rank {in}/tiny.stats --metric reap -o {out}",
    "profile": "profile example:tiny --texts {in}/texts.txt -o {out}",
    "search": "search example:tiny --texts {in}/texts.txt -o {out}",
    "evaluate": "evaluate example:tiny --plan {in}/plan.json --texts {in}/texts.txt -o {out}",
    "trace": "trace example:tiny --prompt a -o {out}",
    "report": "report {in}/tiny.stats -o {out}",
    "report --png": "report {in}/tiny.stats -o r.html --png {out}",
    "card": "card {in}/pruned -o {out}",
    "stats merge": "stats merge {in}/tiny.stats -o {out}",
    "demo": "demo --output {out}",
    "bench --plot": "bench surgery example:tiny --plot {out}",
}


# Every command with two of the names, and every name with some command: all ask the same function.
@pytest.mark.parametrize(
    ("writer", "out"),
    [(w, out) for i, w in enumerate(WRITERS) for j, out in enumerate(SOURCES) if (i + j) % 3 == 0],
)
def test_an_output_that_reads_as_a_source_is_refused(
    writer: str, out: str, made: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [a.format(**{"in": made, "out": out}) for a in WRITERS[writer].split()]
    with untouched(made, tmp_path):
        ended = call(capsys, *filled)
    assert (ended.code, ended.out) == (2, "")
    assert f"{out}: is a source, not an output path; for a path, write ./{out}" in ended.error


@pytest.mark.parametrize("out", ["./example:tiny", "runs/model", "runs/model@2", "law:8", "a@b"])
def test_paths_are_written_whatever_they_hold(
    out: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert call(capsys, "prune", TINY, out, "--keep", "0").code == 0
    assert (tmp_path / out / "config.json").is_file()


def test_the_library_refuses_the_same_strings_but_takes_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_surgery import export_gguf, make_plan, plan_keeping, prune
    from moe_surgery.errors import UsageError

    monkeypatch.chdir(tmp_path)
    plan = make_plan(TINY, lambda model: plan_keeping([0], model))
    with pytest.raises(UsageError, match="is a source, not an output path"):
        prune(TINY, "example:tiny", plan)
    with pytest.raises(UsageError, match="is a source, not an output path"):
        export_gguf(TINY, "owner/model@main")
    assert list(tmp_path.iterdir()) == []
    prune(TINY, Path("example:tiny"), plan)
    assert (tmp_path / "example:tiny" / "config.json").is_file()
