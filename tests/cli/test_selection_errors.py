"""Errors of profile, stats, rank, plan and evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from moe_surgery.selection.statistics import load_statistics, save_statistics
from tests.support.command import call, refused, untouched

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
F32 = ("--dtype", "f32")


CASES: dict[str, tuple[str, int, str]] = {
    "bench: a format of no texts": (
        "bench speculate example:tiny --draft-top-k 1 --format text",
        2,
        "--domain and --format need --texts",
    ),
    "profile: an empty text": (
        "profile example:tiny --texts {new}/empty.txt -o {new}/s",
        3,
        "empty.txt: contains no",
    ),
    "profile: no such text": (
        "profile example:tiny --texts {new}/no.txt -o {new}/s",
        5,
        "no.txt: cannot open",
    ),
    "profile: names for fewer texts": (
        "profile example:tiny --texts {in}/sums.txt --texts {in}/talk.jsonl --texts {in}/asked.jsonl "
        "--domain a --domain b -o {new}/s",
        2,
        "--domain: 2 names for 3 --texts",
    ),
    "profile: no texts": ("profile example:tiny -o {new}/s", 2, "Missing option '--texts'"),
    "profile: no output": ("profile example:tiny --texts {in}/sums.txt", 2, "Missing option '-o'"),
    "profile: an output in no folder": (
        "profile example:tiny --texts {in}/sums.txt -o {new}/no/s",
        5,
        "{new}/no/s: no such folder",
    ),
    "profile: an output that is the text": (
        "profile example:tiny --texts {in}/sums.txt -o {in}/sums.txt",
        2,
        "is an input",
    ),
    "profile: a model without a tokenizer": (
        "profile {in}/other --texts {in}/sums.txt -o {new}/s",
        5,
        "tokenizer.json: not found",
    ),
    "profile: answers to texts": (
        "profile example:tiny --texts {in}/sums.txt --generate 3 -o {new}/s",
        3,
        "sums.txt: answers are generated for conversations",
    ),
    "profile: a format there is not": (
        "profile example:tiny --texts {in}/sums.txt --format csv -o {new}/s",
        2,
        "'csv' is not one of",
    ),
    "merge: another checkpoint": (
        "stats merge {in}/sums.stats {new}/foreign.stats -o {new}/s",
        4,
        "different",
    ),
    "merge: the same twice": (
        "stats merge {in}/sums.stats {in}/both.stats -o {new}/s",
        4,
        "sums.txt is in two",
    ),
    "merge: onto an input": ("stats merge {in}/sums.stats -o {in}/sums.stats", 2, "is an input"),
    "merge: a ranking": ("stats merge {in}/r.json -o {new}/s", 3, "{in}/r.json: "),
    "show: no such file": ("stats show {new}/no.stats", 5, "no.stats: cannot open"),
    "show: a checkpoint": (
        "stats show {in}/other/model.safetensors",
        3,
        "is a safetensors file of weights, not a statistics file",
    ),
    "rank: no metric": ("rank {in}/both.stats", 2, "choose how to rank: --metric frequency|gate|"),
    "rank: an unknown metric": (
        "rank {in}/both.stats --metric best",
        2,
        "--metric best: unknown; known: freq",
    ),
    "rank: an unknown domain": (
        "rank {in}/both.stats --metric reap --domain cooking",
        3,
        "domain 'cooking' is not in these statistics; there are: sums, talk:answer, talk:prompt",
    ),
    "rank: a missing source": ("rank {new}/no.stats --metric reap", 5, "no.stats: cannot open: no such file"),
    "rank: another kind of source": (
        "rank {in}/both.stats {in}/r.json --metric reap",
        3,
        "{in}/r.json: is a ranking, not a statistics file",
    ),
    "rank: two checkpoints": (
        "rank {in}/sums.stats {new}/foreign.stats --metric reap",
        4,
        "different checkpoints",
    ),
    "rank: a ranking as the source": ("rank {in}/r.json", 3, "{in}/r.json: "),
    "rank: a metric for a ranking": ("rank {in}/r.json --metric reap", 3, "is a ranking, not"),
    "rank: experts of ours": ("rank {in}/both.stats --metric reap --num-experts 32", 2, "have both"),
    "plan: another checkpoint's statistics": (
        "plan {in}/both.stats --metric reap -n 2 {in}/other",
        4,
        "the statistics were made from another checkpoint",
    ),
    "plan: no metric": ("plan {in}/both.stats -n 2", 2, "choose how to rank it: --metric frequency|"),
    "plan: an unknown metric": ("plan {in}/both.stats --metric best -n 2", 2, "--metric best: unknown"),
    "plan: an unknown domain": (
        "plan {in}/both.stats --metric reap --domain x -n 2",
        3,
        "domain 'x' is not in",
    ),
    "plan: a metric for a ranking": ("plan {in}/r.json --metric reap -n 2", 2, "{in}/r.json: is a ranking"),
    "plan: missing statistics": ("plan {new}/no.stats --metric reap -n 2", 5, "no.stats: cannot open"),
    "plan: coverage of a ranking": (
        "plan {in}/r.json --coverage 0.9 --model-type gpt_oss",
        2,
        "--coverage needs STATS",
    ),
    "plan: two amounts": (
        "plan {in}/both.stats --metric reap -n 2 --coverage 0.5",
        2,
        "exactly one of --experts",
    ),
    "plan: no amount": ("plan {in}/both.stats --metric reap", 2, "exactly one of --experts, --coverage"),
    "plan: a share of percent": (
        "plan {in}/both.stats --metric reap --coverage 95",
        2,
        "--coverage 95: must be above 0 and at most 1",
    ),
    "plan: no share": (
        "plan {in}/both.stats --metric reap --coverage 0",
        2,
        "--coverage 0: must be above 0 and at most 1",
    ),
    "plan: a target too small": (
        "plan {in}/both.stats --metric reap --target-size 1kB example:tiny",
        2,
        "even with one expert a layer it has",
    ),
    "plan: too few weights": (
        "plan {in}/both.stats --metric reap --target-params 1k example:tiny",
        2,
        "even with one expert a layer it has",
    ),
    "plan: a target for no model": (
        "plan {in}/both.stats --metric reap --target-size 2MB",
        2,
        "--target-size needs CKPT",
    ),
    "plan: no size": (
        "plan {in}/both.stats --metric reap --target-size big example:tiny",
        2,
        "'big' is not a size",
    ),
    "plan: no count": (
        "plan {in}/both.stats --metric reap --target-params 6.6X example:tiny",
        2,
        "'6.6X' is not a number",
    ),
    "plan: too many experts": (
        "plan {in}/both.stats --metric reap -n 33",
        2,
        "--experts 33: the model has 32",
    ),
    "plan: another model type": (
        "plan {in}/both.stats --metric reap -n 3 --model-type other",
        4,
        "the ranking is for gpt_oss, not for other",
    ),
    "plan: a domain for drawn experts": (
        "plan --random -n 3 --domain x example:tiny",
        2,
        "need STATS",
    ),
    "plan: a way to hold nothing": (
        "plan {in}/both.stats --metric reap -n 3 --coverage-over mean",
        2,
        "--coverage-over needs --coverage",
    ),
    "plan: storage for nothing": (
        "plan {in}/both.stats --metric reap -n 3 --store bf16",
        2,
        "--store needs --target-size",
    ),
    "evaluate: nothing to hold against": (
        "evaluate example:tiny --texts {in}/sums.txt",
        2,
        "nothing to compare",
    ),
    "evaluate: an empty text": (
        "evaluate example:tiny --plan {new}/p.json --texts {new}/empty.txt",
        3,
        "contains no",
    ),
    "evaluate: another model's plan": (
        "evaluate example:tiny --plan {new}/foreign.json --texts {in}/sums.txt",
        4,
        "the plan is for gpt_oss with 2 layers of 4 experts",
    ),
    "evaluate: another model": (
        "evaluate example:tiny {in}/other --texts {in}/sums.txt",
        4,
        "{in}/other: has 2 layers",
    ),
    "evaluate: no answers": (
        "evaluate example:tiny --plan {new}/p.json --texts {in}/sums.txt --answers-only",
        2,
        "no token to predict in an answer",
    ),
    "evaluate: nothing to predict": (
        "evaluate example:tiny --plan {new}/p.json --texts {in}/sums.txt --max-tokens 1",
        2,
        "no token to predict",
    ),
    "evaluate: no batches": (
        "evaluate example:tiny --plan {new}/p.json --texts {in}/sums.txt --batch-tokens 0",
        2,
        "--batch-tokens 0: must be at least 1",
    ),
    "evaluate: onto a plan": (
        "evaluate example:tiny --plan {new}/p.json --texts {in}/sums.txt -o {new}/p.json",
        2,
        "is an input",
    ),
    "evaluate: a ranking as a plan": (
        "evaluate example:tiny --plan {in}/r.json --texts {in}/sums.txt",
        3,
        "is a ranking, not a plan",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_is_one_line_with_its_exit_code_and_nothing_is_written(
    case: str, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "empty.txt").write_text("")
    foreign = load_statistics(inputs / "talk.stats")
    foreign.identity = "0" * 32
    save_statistics(foreign, tmp_path / "foreign.stats")
    plan = {"format": "moe-surgery.plan", "version": 1, "model_type": "gpt_oss", "num_source_experts": 32}
    plan |= {"num_layers": 4, "layers": [[0, 1]] * 4}
    (tmp_path / "p.json").write_text(json.dumps(plan))
    plan |= {"num_source_experts": 4, "num_layers": 2, "layers": [[0, 1]] * 2}
    (tmp_path / "foreign.json").write_text(json.dumps(plan))
    arguments, code, output = CASES[case]
    paths = {"in": inputs, "new": tmp_path}
    with untouched(inputs, tmp_path):
        line = refused(call(capsys, *(a.format(**paths) for a in arguments.split())), code)
    assert output.format(**paths) in line
