"""The front matter of a source's README: what is read is what YAML says, and nothing stops a run."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_surgery.card.front_matter import front_matter, read_source_card
from moe_surgery.card.source_card import SourceCard
from moe_surgery.card.text import ranges, scalar

READ = [
    "license: apache-2.0",
    "license: 'mit'",
    'license: "mit" # a comment',
    "license: mit # a comment",
    "license:   mit   ",
    "license: a#b",
    "license : mit",
    "language: no",
    "language: [en, de,fr]",
    "language: [ en ]",
    "language: []",
    "language:\n- en\n- de",
    "language:\n  - en # english\n\n  # comment\n  - 'no'",
    "base_model:\n- a/b",
    "base_model: a/b\nlicense: mit\nbase_model: c/d",
    "license_name: My own licence, it's 100% mine",
    "license_link: https://example.org/x#y",
    "version: 1.0\ndate: 2020-01-01\nok: true",
    "# only\n\nlicense: mit # said",
    "model-index:\n- name: x\n  results:\n  - a: b\nlicense: mit",
]
"""Front matter whose strings and lists of strings are all read."""

LEFT = [
    "license: |\n  many\n  lines",
    "license: >-\n  folded",
    "license: *x",
    "license: &x mit",
    "license: !!str mit",
    "license: {a: b}",
    'license: "a\\u0062"',
    "license: many\n  words",
    "license: 'it''s'",
    "license: [a, [b]]",
    "license: ['a, b', c]",
    "license:\n- a: b",
    "license:\n- - a",
    "license:\n  key: value",
    "license:",
    "license: ~",
    "license: null",
    "license: a: b",
    "license: @x",
]
"""Front matter beyond what is read, or that says nothing, or is no YAML."""


def lines(text: str) -> list[str]:
    return ["---", *text.split("\n"), "---", "# Title"]


@pytest.mark.parametrize("text", READ)
def test_simple_values_are_read_as_yaml_reads_them(text: str) -> None:
    expected = yaml.load(text, yaml.BaseLoader)  # every scalar a string
    simple = {
        key: value if isinstance(value, str) else tuple(value)
        for key, value in expected.items()
        if isinstance(value, str) or all(isinstance(item, str) for item in value)
    }
    assert front_matter(lines(text)) == simple


@pytest.mark.parametrize("text", LEFT)
def test_everything_else_counts_as_not_said(text: str) -> None:
    assert "license" not in front_matter(lines(text))
    assert front_matter(lines(f"{text}\nother: mit"))["other"] == "mit"


FRAGMENTS = st.sampled_from(
    [
        "license",
        "language",
        ":",
        " ",
        "\n",
        "- ",
        "  ",
        "en",
        "a/b",
        "'",
        '"',
        "[",
        "]",
        ",",
        "#",
        "|",
        "~",
        "no",
        "1",
        "---",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(FRAGMENTS, max_size=14).map("".join))
def test_what_is_read_of_any_text_is_what_yaml_reads_or_nothing(text: str) -> None:
    try:
        expected = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError:
        expected = None
    results = read_source_card(f"---\n{text}\n---\n".encode())
    if isinstance(expected, dict) and "---" not in text:
        if results.license is not None:
            assert expected["license"] in (results.license, [results.license])
        result = expected.get("language")
        assert set(results.languages) <= set([result] if isinstance(result, str) else result or [])


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text().map(lambda t: f"---\n{t}\n---\n# Cite\n{t}".encode("utf-8", "replace"))
)
def test_any_bytes_are_a_card(raw: bytes) -> None:
    assert isinstance(read_source_card(raw), SourceCard)


@pytest.mark.parametrize(
    "text", ["", "# Title", "text\n---\nlicense: mit\n---\n", "---\nlicense: mit\n", " license: mit\n---\n"]
)
def test_without_front_matter_nothing_is_said(text: str) -> None:
    assert read_source_card(text.encode()) == SourceCard()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_system_are_read(end: str) -> None:
    text = end.join(["\ufeff", "---", "license: mit", "--- ", "# Cite", "```", "@a", "```"])
    assert read_source_card(text.encode()) == SourceCard(license="mit", citation="@a")


@pytest.mark.parametrize(
    ("body", "citation"),
    [
        ("# Citation\nSee us.\n\n## Deeper\nMore.\n# Next\nNo.", "See us.\n\nMore."),
        (
            "## Citing\n```bibtex\n@a\n# no heading\n```\nwords\n```\n@b\n```\n## Next\n",
            "@a\n# no heading\n@b",
        ),
        ("```\n# Citation\nin code\n```\n# **BibTeX**\n~~~~\n@c\n~~~\n~~~~", "@c\n~~~"),
        ("# Excited\nNo.", None),
        ("# Citation\n\n# Next\n", None),
        ("# Citation\n" + "x" * 5000, None),
    ],
)
def test_citation_is_the_section_of_that_name(body: str, citation: str | None) -> None:
    assert read_source_card(body.encode()).citation == citation


@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1))
def test_scalar_is_read_back_by_yaml(text: str) -> None:
    if text.isprintable():
        assert yaml.safe_load(f"key: {scalar(text)}\nlist:\n- {scalar(text)}") == {
            "key": text,
            "list": [text],
        }


@pytest.mark.parametrize(
    "text", ["no", "Yes", "on", "NULL", "true", "1.0", "0x1f", "1e3", ".inf", "2020-01-01", "~", "y"]
)
def test_scalar_that_yaml_would_take_for_no_string_is_quoted(text: str) -> None:
    assert yaml.safe_load(scalar(text)) == text


def test_ranges_keep_the_order() -> None:
    assert ranges((0, 1, 2, 3, 7, 5, 6, 9, 8)) == "0-3, 7, 5, 6, 9, 8"
    assert ranges((4,)) == "4"
