"""One word for one thing: an option of a name is the same option in every command."""

from __future__ import annotations

import re
from collections import defaultdict

import click
import pytest

from tests.cli.test_help import at, command_paths

PATHS = command_paths()
REPEATED_IN_SOME = {"--plan", "--draft", "--draft-plan", "--evaluation"}
"""Given once where a command has one model, as often as wanted where it compares several."""


def options(path: tuple[str, ...]) -> dict[str, click.Option]:
    found = [p for p in at(path).params if isinstance(p, click.Option)]
    return {name: option for option in found for name in option.opts}


def test_an_option_takes_the_same_kind_of_value_everywhere() -> None:
    kinds: dict[str, set[object]] = defaultdict(set)
    for path in PATHS:
        for name, option in options(path).items():
            repeated = option.multiple and name not in REPEATED_IN_SOME
            kinds[name].add((option.type.name, repeated, option.is_flag, bool(option.secondary_opts)))
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
        ("export",),
        ("bench", "surgery"),
    }


@pytest.mark.parametrize(
    "command",
    [
        "inspect",
        "profile",
        "search",
        "evaluate",
        "prune",
        "export",
        "generate",
        "bench speculate",
        "bench surgery",
    ],
)
def test_the_model_is_the_first_argument(command: str) -> None:
    first = next(p for p in at(tuple(command.split())).params if isinstance(p, click.Argument))
    assert (first.name, first.nargs, first.required) == ("ckpt", 1, True)


@pytest.mark.parametrize(
    "gone",
    ["--new-tokens", "--lengths", "--target", "--batch-size"],
)
def test_old_spellings_are_gone(gone: str) -> None:
    assert [path for path in PATHS if gone in options(path)] == []


def test_plan_and_prune_say_which_experts_stay_by_the_same_options() -> None:
    shared = ("--experts", "--keep", "--order", "--top-k")
    plan, prune = options(("plan",)), options(("prune",))
    assert [plan[name].help for name in shared] == [prune[name].help for name in shared]


PRIVATE_WORDS = r"\b(is no|anew|goes on|so many|of its own|as it is|otherwise than|told|said)\b"


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_is_plain_english(path: tuple[str, ...]) -> None:
    command = at(path)
    texts = [command.help or "", *(o.help or "" for o in options(path).values())]
    assert [text for text in texts if re.search(PRIVATE_WORDS, text)] == []
