"""Names from untrusted files appear in a card only as code."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery import make_card, prune
from moe_surgery.selection.plan import Plan
from tests.card.cards import (
    SECTIONS,
    SHAPE,
    blocks,
    cells,
    cut,
    evaluation_of,
    headings,
    metadata,
    readme,
    section,
    tokens,
)
from tests.support.checkpoints import write_checkpoint

HOSTILE = "a|b`c``d`<script>x</script>[l](u)![i](u)*b*_e_#@u$x$\\`&amp;\u202e\u2028\x1b[31m\n\n# H\n---\n\"'{}: - !x"


@pytest.mark.parametrize(
    "name", [HOSTILE.replace("/", ":"), " ", "-", "# H", "`", "a`<script>x", "|", "\n", "\\", "x" * 200, "é…"]
)
def test_hostile_names_are_only_ever_code(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(tmp_path / name, SHAPE)
    front = json.dumps(name.replace("/", ":"))
    (source / "README.md").write_text(
        f"---\nlicense: other\nlicense_name: {front}\nlicense_link: {front}\nbase_model: {front}\n"
        f"language: {front}\n---\n# Citation\n~~~\n{HOSTILE}\n```\n`````\n</pre>\n~~~\n{HOSTILE}"
    )
    (source / f"LICENSE{name[:150]}".replace("/", ":")).write_text("terms")
    provenance = {
        "method": name, "domains": [name], "ranking": name, name: name, "tokens": 1,
        "texts": {name: [{"name": name, "tokens": 1}]}, "statistics": [name], "interleaved_with": {"method": name},
    }  # fmt: skip
    plan = Plan("gpt_oss", 8, ((0, 1), (2, 3), (4, 5)), provenance=provenance)
    out = tmp_path / "out"
    prune(source, out, plan)
    good = evaluation_of(source, plan, 2)
    full, actual = good.models
    named = [replace(m, name=name, domains={name: next(iter(m.domains.values()))}) for m in (full, actual)]
    texts: dict[str, list[dict[str, object]]] = {name: [{"name": name}]}
    evaluation = replace(good, models=tuple(named), texts=texts, settings={name: name})
    for card in (readme(out), make_card(out, evaluation=evaluation)):
        result = metadata(card)
        assert set(result) <= {
            "library_name", "pipeline_tag", "license", "license_name", "license_link", "tags", "language",
        }  # fmt: skip
        results = tokens(card)
        kinds = {token.type for token in results}
        assert not kinds & {
            "html_inline",
            "link_open",
            "image",
            "hr",
            "s_open",
            "code_block",
            "blockquote_open",
        }
        assert not {"em_open"} & kinds
        html = {token.content.strip() for token in results if token.type == "html_block"}
        assert html <= {"<details>\n<summary>Kept experts of each layer</summary>", "</details>"}
        assert headings(card)[1:] == SECTIONS
        (citation,) = [block for block in blocks(card, "") if "# H" in block]
        assert citation.endswith("\n```\n`````\n</pre>\n")
        bare = "".join(t.content for t in results if t.type == "text")
        assert "script" not in bare
        assert all(c.isprintable() or c == "\n" for c in card)
        widths = {len(row) for row in cells(section(card, "How the experts were chosen")).values()}
        assert widths == {3}
    assert make_card(out) == readme(out)


def test_name_that_is_not_a_unicode_is_replaced(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "plain", SHAPE)
    folder = os.fsencode(tmp_path) + b"/m\xff"
    try:
        os.rename(source, folder)
    except OSError:
        pytest.skip("this file system wants Unicode names")
    prune(os.fsdecode(folder), tmp_path / "out", cut)
    assert "A pruned version of `m\ufffd`" in readme(tmp_path / "out")
