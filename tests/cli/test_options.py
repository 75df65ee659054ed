"""Sizes and expert lists as they are written on the command line."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.cli.options import EXPERT_LIST, SIZE


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("500 MB", 500_000_000),
        ("1.5kB", 1500),
        ("4GiB", 4 * 2**30),
        ("2TiB", 2 * 2**40),
        ("17", 17),
        ("17B", 17),
        ("0", 0),
    ],
)
def test_sizes_are_decimal_unless_they_say_otherwise(text: str, nbytes: int) -> None:
    assert SIZE.convert(text, None, None) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "5XB", "5G", "1e9", "1_000", "5GB5", "0x10", "nan", "٣GB"]
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size; write 5GB"):
        SIZE.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("0", [0]),
        ("0,3,8-11", [0, 3, 8, 9, 10, 11]),
        ("7,2,5", [7, 2, 5]),
        (" 1 , 3 - 5 ", [1, 3, 4, 5]),
        ("4-4", [4]),
        ("00012", [12]),
    ],
)
def test_lists_are_numbers_and_ranges_in_the_order_given(text: str, kept: list[int]) -> None:
    assert EXPERT_LIST.convert(text, None, None) == kept


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), min_size=1, max_size=5))
def test_a_range_is_its_numbers(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" for first, more in ranges)
    expected = [n for first, more in ranges for n in range(first, first + more + 1)]
    assert EXPERT_LIST.convert(text, None, None) == expected


def test_all_is_a_word_of_its_own() -> None:
    assert EXPERT_LIST.convert("all", None, None) == EXPERT_LIST.convert(" all ", None, None) == "all"


@pytest.mark.parametrize(
    "text", ["", ",", "1,,2", "1-", "-1", "1-2-3", "a", "All", "1;2", "1.0", "123456", "٣"]
)
def test_what_is_not_a_list_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not an expert number; write all, or numbers and ranges"):
        EXPERT_LIST.convert(text, None, None)


@pytest.mark.parametrize("text", ["3-1", "0,9-8"])
def test_a_range_that_runs_backwards_is_refused_and_not_empty(text: str) -> None:
    with pytest.raises(click.BadParameter, match="runs backwards"):
        EXPERT_LIST.convert(text, None, None)
