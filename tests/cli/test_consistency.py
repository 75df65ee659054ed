"""One word for one thing: an option of a name is the same option in every command."""

from __future__ import annotations

import re
from collections import defaultdict

import click
import pytest

from tests.support.command_tree import command_at, command_paths

PATHS = command_paths()
REPEATED_IN_SOME = {"--metric", "--plan", "--draft", "--draft-plan", "--evaluation", "--dense", "--ranking"}
"""Given once where a command has one model, as often as wanted where it compares several."""
LISTS_IN_SOME = {"--experts", "-n"}
"""A number where a command makes one model, a list where it makes several."""


def options(path: tuple[str, ...]) -> dict[str, click.Option]:
    result = [p for p in command_at(path).params if isinstance(p, click.Option)]
    return {name: option for option in result for name in option.opts}


def test_an_option_takes_the_same_kind_of_value_everywhere() -> None:
    kinds: dict[str, set[object]] = defaultdict(set)
    for path in PATHS:
        for name, option in options(path).items():
            repeated = option.multiple and name not in REPEATED_IN_SOME
            listed = name in LISTS_IN_SOME and option.type.name == "LIST"
            kind = "integer" if listed else option.type.name
            kinds[name].add((kind, repeated, option.is_flag, bool(option.secondary_opts)))
    assert {name: kind for name, kind in kinds.items() if len(kind) > 1} == {}


def test_dtype_is_what_is_computed_in_and_store_how_weights_are_stored() -> None:
    choices: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for path in PATHS:
        for name in ("--dtype", "--store"):
            if option := options(path).get(name):
                assert isinstance(option.type, click.Choice)
                choices[name].add(tuple(option.type.choices))
    assert choices["--dtype"] == {("bf16", "f32", "f16")}
    assert all(chosen[0] == "keep" for chosen in choices["--store"])
    assert {path for path in PATHS if "--store" in options(path)} == {
        ("plan",),
        ("prune",),
        ("sweep",),
        ("merge",),
        ("export",),
        ("bench", "surgery"),
    }


WITHOUT_A_MODEL = {
    "merge",
    "stats merge",
    "stats show",
    "stats import",
    "rank",
    "plan",
    "report",
    "bench kernels",
    "demo",
    "doctor",
}


def arguments(path: tuple[str, ...]) -> list[click.Argument]:
    return [p for p in command_at(path).params if isinstance(p, click.Argument)]


def test_the_model_is_the_first_argument_of_every_command_that_reads_one() -> None:
    """`plan` can do without one; there CKPT comes after the ranking, and in `merge` after the adapter."""
    first = {" ".join(path): next(iter(arguments(path)), None) for path in PATHS}
    models = {name: a for name, a in first.items() if a is not None and a.human_readable_name[:4] == "CKPT"}
    assert set(first) - set(models) == WITHOUT_A_MODEL
    assert all(a.required and a.nargs == (-1 if name == "bench decode" else 1) for name, a in models.items())
    assert [a.human_readable_name for a in arguments(("plan",))] == ["[RANKING|STATS]", "[CKPT]"]
    assert [a.human_readable_name for a in arguments(("merge",))] == ["ADAPTER", "CKPT", "OUT"]


def test_an_option_takes_a_checkpoint_only_beside_the_model() -> None:
    """The source to compare with or to follow, the draft, and the model that imported counts are of."""
    second = {(" ".join(p), n) for p in PATHS for n, o in options(p).items() if o.metavar == "CKPT"}
    assert second == {
        ("verify", "--source"),
        ("repair", "--source"),
        ("generate", "--draft"),
        ("bench speculate", "--draft"),
        ("stats import", "--model"),
    }


def meaning(help_text: str) -> str:
    """What an option is, without what a command does with it and its default."""
    return re.split(r"[;:.(]", help_text)[0]


def test_an_option_means_the_same_in_every_command() -> None:
    meanings: dict[str, set[str]] = defaultdict(set)
    for path in PATHS:
        for name, option in options(path).items():
            meanings[name].add(meaning(option.help or ""))
    outputs = meanings.pop("--output") | meanings.pop("-o")
    assert all(text.startswith("Write ") for text in outputs)
    assert {name: result for name, result in meanings.items() if len(result) > 1} == {}


def test_defaults_are_written_in_one_form() -> None:
    texts = [option.help or "" for path in PATHS for option in options(path).values()]
    assert [text for text in texts if re.search(r"[Dd]efault", text) and "; default: " not in text] == []


@pytest.mark.parametrize(
    "gone",
    ["--new-tokens", "--lengths", "--target", "--batch-size", "--checkpoint"],
)
def test_old_spellings_are_gone(gone: str) -> None:
    assert [path for path in PATHS if gone in options(path)] == []


def test_plan_and_prune_say_which_experts_stay_by_the_same_options() -> None:
    shared = ("--experts", "--keep", "--order", "--top-k")
    plan, prune = options(("plan",)), options(("prune",))
    assert [plan[name].help for name in shared] == [prune[name].help for name in shared]


PRIVATE_WORDS = (
    r"\b(is no|anew|goes? on|goes? with|so many|of (its|their) own|as it (is|was)|otherwise than|told|said|likeliest|"
    r"for each token|a token|a layer together|what is left|hold|asked|drawn|beside)\b"
)


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_is_plain_english(path: tuple[str, ...]) -> None:
    command = command_at(path)
    texts = [command.help or "", *(o.help or "" for o in options(path).values())]
    assert [text for text in texts if re.search(PRIVATE_WORDS, text)] == []
