"""The card's metadata is what the hub reads, and the source's where it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery import make_card, prune
from moe_surgery.errors import UsageError
from tests.card.cards import (
    SHAPE,
    ModelCard,
    cut,
    headings,
    keep_all,
    metadata,
    readme,
)
from tests.support.checkpoints import write_checkpoint


def test_metadata_is_what_the_hub_reads(out: Path) -> None:
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == metadata(readme(out))
    assert metadata(readme(out)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en", "no"],
        "tags": ["moe-surgery", "mixture-of-experts", "pruned", "gpt_oss"],
    }


def test_base_model_is_asked_of_option_cache_config_and_card_in_this_order(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--cached" / "snapshots" / "0123abc"
    named = {"_name_or_path": "owner/configured"}
    source = write_checkpoint(cache, SHAPE, edit_config=lambda c: c.update(named))
    card = b"---\nbase_model: owner/told\n---\n"

    def base(number: int, folder: Path, **options: str) -> tuple[object, object]:
        (folder / "README.md").write_bytes(card)
        out = tmp_path / f"out-{number}"
        prune(folder, out, cut, **options)  # type: ignore[arg-type]
        result = metadata(readme(out))
        return result.get("base_model"), result.get("base_model_relation")

    assert base(0, source, base_model="owner/given") == ("owner/given", "finetune")
    assert base(1, source) == ("owner/cached", "finetune")
    assert "revision `0123abc`" in readme(tmp_path / "out-1")
    assert headings(readme(tmp_path / "out-1"))[0] == "cached with 3 of 8 experts"
    local = write_checkpoint(tmp_path / "local", SHAPE, edit_config=lambda c: c.update(named))
    assert base(2, local) == ("owner/configured", "finetune")
    plain = write_checkpoint(tmp_path / "plain", SHAPE)
    assert base(3, plain) == ("owner/told", "finetune")
    card = b"# No metadata\n"
    assert base(4, plain) == (None, None)
    assert "A pruned version of `plain`:" in readme(tmp_path / "out-4")


@pytest.mark.parametrize("named", ["./models/x", "/data/x/y", "model", 7, "a--b/c", "a/b/c", "owner/x.git"])
def test_name_in_the_config_that_is_not_a_hub_id_is_no_base_model(tmp_path: Path, named: object) -> None:
    source = write_checkpoint(tmp_path / "m", edit_config=lambda c: c.update({"_name_or_path": named}))
    prune(source, tmp_path / "out", keep_all)
    assert "base_model" not in metadata(readme(tmp_path / "out"))


@pytest.mark.parametrize(
    "name", ["", "a b", "../x", "a/b/c", "a--b", "-a", "a/b\n", "é/b", "x" * 97, "a/b: [c"]
)
def test_base_model_that_is_not_a_id_is_refused_before_anything_is_written(
    source: Path, out: Path, tmp_path: Path, name: str
) -> None:
    validate = pytest.importorskip("huggingface_hub.utils").validate_repo_id
    if name:
        with pytest.raises(ValueError, match=r"repo_id|Repo id"):
            validate(name)
    with pytest.raises(UsageError, match="`base_model`"):
        prune(source, tmp_path / "new", cut, base_model=name)
    with pytest.raises(UsageError, match="`base_model`"):
        make_card(out, base_model=name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["", "apache 2.0", "a\nb: c", '"', "é", "x" * 65])
def test_license_that_is_not_a_identifier_is_refused(out: Path, name: str) -> None:
    with pytest.raises(UsageError, match="`license`"):
        make_card(out, license=name)


def test_license_and_base_model_given_replace_what_the_source_said(out: Path) -> None:
    result = metadata(make_card(out, license="other", base_model="a/b"))
    assert (result["license"], result["base_model"]) == ("other", "a/b")
    assert "as given when this card was made" in make_card(out, license="other")


def test_relation_is_quantized_where_weights_became_mxfp4(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, "bf16")
    prune(source, tmp_path / "a", cut, store="mxfp4", base_model="a/b")
    assert metadata(readme(tmp_path / "a"))["base_model_relation"] == "quantized"
    assert "converted from BF16 to MXFP4" in readme(tmp_path / "a")
    prune(tmp_path / "a", tmp_path / "b", keep_all, store="bf16", base_model="a/b")
    result = metadata(readme(tmp_path / "b"))
    assert result["base_model_relation"] == "finetune"
    assert "pruned" not in result["tags"]
    assert headings(readme(tmp_path / "b"))[0] == "a, all 3 experts, BF16"
    assert "All experts of the source are kept" in readme(tmp_path / "b")
