"""`moe-surgery bench`: tables, JSON, plots, and Ctrl-C at any moment."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import click
import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from moe_surgery import inspect, plan_random
from moe_surgery.cli.bench.shared import finish
from moe_surgery.cli.terminal import Terminal
from tests.support.command import PATIENCE, call, start

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
QUICK = {
    "decode": ["decode", TINY, "--expert-counts", "4", "--depth", "8", "--steps", "2", "--rounds", "1"],
    "speculate": [
        *("speculate", TINY, "--draft-top-k", "1", "--draft-lengths", "1,2", "--dtype", "f32"),
        *("--depth", "8", "--rounds", "1", "--prompts", "2", "--prompt-tokens", "6", "--max-new-tokens", "5"),
    ],
    "surgery": ["surgery", TINY, "--expert-counts", "4", "--rounds", "1"],
    "kernels": ["kernels", "--hidden", "64", "--expert-counts", "2", "--rounds", "1"],
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "sums.jsonl"
    lines = [f"Question: What is {a} + {a + 3}?\nAnswer: {2 * a + 3}.\n" for a in range(5)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def arguments(name: str, texts: Path) -> list[str]:
    return [*QUICK[name], *(["--texts", str(texts)] if name == "speculate" else [])]


@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_prints_a_table(capsys: Capture, name: str, texts: Path) -> None:
    ended = call(capsys, "bench", *arguments(name, texts))
    assert ended.code == 0, ended.err
    words = {
        "decode": ("tokens/s", "4 experts", "read loop"),
        "speculate": ("break-even", "speed-up", "sums", "added", "cache"),
        "surgery": ("x cp", "peak memory", "inspect s"),
        "kernels": ("route", "experts", "dense", "of read loop"),
    }
    assert all(word in ended.out for word in words[name])


@pytest.mark.parametrize("name", QUICK)
def test_json_and_plot_hold_the_figures(capsys: Capture, tmp_path: Path, name: str, texts: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    ended = call(capsys, "bench", *arguments(name, texts), "--json", "--plot", picture)
    assert (ended.code, ended.err) == (0, "")
    result = ended.json()
    assert result["interrupted"] is False
    assert result["versions"]["python"]
    rows = result["drafts"][0]["figures"] if name == "speculate" else result["rows"]
    assert rows
    assert picture.read_bytes().startswith(b"\x89PNG")
    if name in ("decode", "speculate"):
        settings = result["settings"]
        assert settings["dtype"] == ("f32" if settings["backend"] == "native" else "bf16")
    if name == "speculate":
        draft = result["drafts"][0]
        assert [row["length"] for row in draft["lengths"]] == [1, 2]
        assert (draft["top_k"], draft["weight_bytes"]) == (1, 0)
        # Keys and values in float32 of 4 layers with 2 heads of 32. 8 tokens, the last not looked at again,
        # and 2 drafted ones; likewise 6 and 5 new ones with 1 and 2 drafted: all within the window.
        column = 2 * 4 * 2 * 32 * 4
        caches = ("target_cache_bytes", "draft_cache_bytes")
        assert [draft[side] for side in caches] == [9 * column] * 2
        assert [[row[side] for side in caches] for row in rows] == [[11 * column] * 2, [12 * column] * 2]
        assert all(row["differing_prompts"] == 0 for row in rows)


def test_formats_of_dense_weights_are_compared(capsys: Capture) -> None:
    ended = call(capsys, "bench", *QUICK["decode"], "--dense", "keep", "--dense", "q8_0", "--json")
    rows = ended.json()["rows"]
    suffix = ", dense q8_0"
    assert [row["model"] for row in rows] == [TINY, "4 experts", TINY + suffix, "4 experts" + suffix]
    # Of 34 bytes for 32 values 5 blocks make 170 a row, padded to 192; before 320.
    matrices = 2048 + 4 * (8 * 32 + 2 * 2 * 32)  # rows of 160 columns, and 160 of 256 in each of four layers
    saved = matrices * (320 - 192) + 4 * 160 * (512 - 320)
    for kept, q8_0 in zip(rows[:2], rows[2:], strict=True):
        assert kept["bytes_per_token"] - q8_0["bytes_per_token"] == saved
    assert rows[0]["ratio"]["median"] == 1


def test_drafts_of_several_sizes_are_compared(capsys: Capture, tmp_path: Path, texts: Path) -> None:
    plans = []
    for count in (2, 31):
        plans.append(tmp_path / f"{count}.json")
        plans[-1].write_text(plan_random(count, 0, inspect(TINY)).to_json())
    options = [TINY, "--draft-lengths", "2", "--depth", "8", "--rounds", "1", "--max-new-tokens", "6"]
    chosen = ["--prompt-tokens", "6", "--prompts", "2", "--texts", str(texts), "--json"]
    drafts = [part for plan in plans for part in ("--draft-plan", str(plan))]
    ended = call(capsys, "bench", "speculate", *options, *drafts, *chosen)
    result = ended.json()["drafts"]
    assert [d["experts"] for d in result] == [2, 31]
    row = 2 * 160 + 2 + 8  # of the router, with its bias, and of the index
    assert [d["weight_bytes"] for d in result] == [4 * 2 * row, 4 * 31 * row]


# --- Ctrl-C

LONG = {
    "decode": ["decode", TINY, "--depth", "8", "--steps", "2", "--rounds", "1000000"],
    "speculate": [
        *("speculate", TINY, "--draft-top-k", "1", "--draft-lengths", "1", "--rounds", "1"),
        *("--depth", "8", "--prompt-tokens", "6", "--prompts", "5", "--max-new-tokens", "3000"),
    ],
    "surgery": ["surgery", TINY, "--expert-counts", "4", "--rounds", "1000"],
    "kernels": ["kernels", "--hidden", "64", "--expert-counts", "2", "--rounds", "1000000"],
    "costs": [
        *("speculate", TINY, "--draft-top-k", "1", "--draft-lengths", "1", "--depth", "8"),
        *("--rounds", "1000000"),
    ],
}


# One of each kind of result; all share the code that stops them.
INTERRUPTED = [
    ("decode", "table"),
    ("kernels", "json"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("speculate", "json"), ("surgery", "table"))),
]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("name", "form"), INTERRUPTED)
def test_interrupting_prints_what_was_measured_so_far(
    tmp_path: Path, texts: Path, name: str, form: str
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    more = {
        "speculate": ["--texts", str(texts)],
        "surgery": ["--work", str(work)],
    }
    options = ["--json"] if form == "json" else []
    short = [option if option != "3000" else "40" for option in LONG[name]]
    process = start("bench", *short, *more.get(name, []), "-v", *options)
    assert process.stderr is not None
    signs = {
        "decode": "round 0",
        "speculate": "x plain",
        "surgery": "x cp",
        "kernels": " us",
        "costs": "check step",
    }
    while signs[name] not in (line := process.stderr.readline()):
        assert line, "ended before anything was measured"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    output = "moe-surgery: interrupted; figures are of what was measured so far"
    assert err.splitlines()[-1] == output
    if form == "json":
        result = json.loads(out)
        assert result["interrupted"] is True
        if name in ("speculate", "costs"):
            assert result["drafts"][0]["figures" if name == "speculate" else "lengths"]
        else:
            assert result["rows"]
    else:
        words = {
            "decode": TINY,
            "speculate": "sums",
            "surgery": "x cp",
            "kernels": "route",
            "costs": "break-even",
        }
        assert words[name] in out
    assert list(work.iterdir()) == []


def test_what_was_interrupted_before_anything_was_measured_says_so() -> None:
    terminal = Terminal()
    with pytest.raises(click.Abort):
        finish(terminal, interrupted=True, measured=False)
    assert terminal.after_interrupt == "; nothing measured yet"
    finish(terminal, interrupted=False, measured=True)


# --- what cannot be

REFUSED: dict[str, tuple[list[str], str]] = {
    "no numbers": (
        ["decode", TINY, "--expert-counts", "4,x"],
        "Invalid value for '--expert-counts': '4,x' is not a list",
    ),
    "no rounds": (["decode", TINY, "--rounds", "0"], "--rounds 0: must be at least 1"),
    "too many experts": (
        ["decode", TINY, "--expert-counts", "33"],
        "--expert-counts 33: the model has 32 experts",
    ),
    "no draft": (["speculate", TINY], "no draft; pass --draft, --draft-plan or"),
    "no length": (
        ["speculate", TINY, "--draft-top-k", "1", "--draft-lengths", "0"],
        "--draft-lengths 0: must be 1 to 64",
    ),
    "too long a context": (
        ["speculate", TINY, "--draft-top-k", "1", "--depth", "5000"],
        "--depth 5000 and --draft-lengths need 5010 tokens; these models support 4096",
    ),
    "no new tokens": (
        ["speculate", TINY, "--draft-top-k", "1", "--max-new-tokens", "0"],
        "--max-new-tokens 0: must be at least 1",
    ),
    "a draft that takes more": (
        ["speculate", TINY, "--draft-top-k", "5"],
        "--draft-top-k 5: example:tiny itself uses 4; a draft must use fewer",
    ),
    "more experts than there are": (
        ["surgery", TINY, "--expert-counts", "33"],
        "--expert-counts 33: the model has 32",
    ),
    "a picture of no kind": (["kernels", "--plot", "out.txt"], "out.txt: must end in"),
    "a picture nowhere": (
        ["kernels", "--plot", "/nowhere/a.png"],
        "/nowhere/a.png: is a folder, or its folder",
    ),
    "no such backend": (["kernels", "--backend", "magic"], "--backend magic: unknown; known: "),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_one_line(capsys: Capture, options: list[str], said: str) -> None:
    ended = call(capsys, "bench", *options)
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert ended.error.startswith(f"moe-surgery: {said}")


def test_a_checkpoint_that_is_not_there_is_named(capsys: Capture) -> None:
    ended = call(capsys, "bench", "surgery", "nowhere")
    assert (ended.code, ended.error) == (5, "moe-surgery: nowhere: no such checkpoint folder or file")


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_measured(
    capsys: Capture, tmp_path: Path
) -> None:
    asked = [{"role": "user", "content": "Why? " * 3000}, {"role": "assistant", "content": "So."}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
    options = [TINY, "--draft-top-k", "1", "--texts", str(tmp_path / "long.jsonl"), "-v"]
    ended = call(capsys, "bench", "speculate", *options)
    assert (ended.code, ended.out) == (2, "")
    assert "--texts: a prompt of 'long' has" in ended.err
    assert "step" not in ended.err


def test_without_matplotlib_the_extra_is_named(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = call(capsys, "bench", "kernels", "--plot", "a.png")
    line = "moe-surgery: a plot needs the matplotlib package: pip install 'moe-surgery[report]'"
    assert (ended.code, ended.error) == (2, line)


@pytest.mark.parametrize("name", QUICK)
def test_every_benchmark_has_help_with_an_example_and_a_word_on_every_option(
    capsys: Capture, name: str
) -> None:
    import click

    from moe_surgery.cli.bench import command

    ended = call(capsys, "bench", name, "--help")
    assert ended.code == 0
    assert f"moe-surgery bench {name}" in ended.out
    result = command.get_command(click.Context(command), name)
    assert result is not None
    assert [o.opts[0] for o in result.params if isinstance(o, click.Option) and not o.help] == []
