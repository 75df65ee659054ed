"""The card is valid for the hub, true to the checkpoint, and the same whoever asks for it."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery import make_card, plan_from_ranking, plan_keeping, plan_random, prune
from moe_surgery.card.method import METHODS
from moe_surgery.errors import OutputError, PlanMismatchError, UsageError, VerificationError
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.selection.metrics import METRICS
from moe_surgery.selection.plan import Plan, load_plan
from moe_surgery.selection.ranking import Ranking
from tests.card.cards import (
    ModelCard,
    blocks,
    cells,
    counted,
    evaluation_of,
    headings,
    metadata,
    quality,
    section,
    spans,
    tokens,
)
from tests.support.checkpoints import Shape, write_checkpoint

SHAPE = Shape(layers=3, experts=8, top_k=2)
README = b"""\
---
license: apache-2.0
language:
- en
- "no"
tags:
- vllm
---

# A model

## How to cite

As here:

```bibtex
@misc{model, title={A ``model''}}
```

# More
"""


def cut(model: ModelSpec) -> Plan:
    return plan_random(3, 5, model)


def keep_all(model: ModelSpec) -> Plan:
    return plan_keeping(None, model)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "some-model", SHAPE, shards=2)
    (folder / "README.md").write_bytes(README)
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    prune(source, tmp_path / "out", cut)
    return tmp_path / "out"


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


# --- metadata


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
        said = metadata(readme(out))
        return said.get("base_model"), said.get("base_model_relation")

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
    assert "A smaller `plain`:" in readme(tmp_path / "out-4")


@pytest.mark.parametrize("named", ["./models/x", "/data/x/y", "model", 7, "a--b/c", "a/b/c", "owner/x.git"])
def test_name_in_the_config_that_is_no_hub_id_is_no_base_model(tmp_path: Path, named: object) -> None:
    source = write_checkpoint(tmp_path / "m", edit_config=lambda c: c.update({"_name_or_path": named}))
    prune(source, tmp_path / "out", keep_all)
    assert "base_model" not in metadata(readme(tmp_path / "out"))


@pytest.mark.parametrize(
    "name", ["", "a b", "../x", "a/b/c", "a--b", "-a", "a/b\n", "é/b", "x" * 97, "a/b: [c"]
)
def test_base_model_that_is_no_id_is_refused_before_anything_is_written(
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
def test_license_that_is_no_identifier_is_refused(out: Path, name: str) -> None:
    with pytest.raises(UsageError, match="`license`"):
        make_card(out, license=name)


def test_license_and_base_model_given_replace_what_the_source_said(out: Path) -> None:
    said = metadata(make_card(out, license="other", base_model="a/b"))
    assert (said["license"], said["base_model"]) == ("other", "a/b")
    assert "as given when this card was made" in make_card(out, license="other")


def test_relation_is_quantized_where_weights_became_mxfp4(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, "bf16")
    prune(source, tmp_path / "a", cut, store="mxfp4", base_model="a/b")
    assert metadata(readme(tmp_path / "a"))["base_model_relation"] == "quantized"
    assert "converted from BF16 to MXFP4" in readme(tmp_path / "a")
    prune(tmp_path / "a", tmp_path / "b", keep_all, store="bf16", base_model="a/b")
    said = metadata(readme(tmp_path / "b"))
    assert said["base_model_relation"] == "finetune"
    assert "pruned" not in said["tags"]
    assert headings(readme(tmp_path / "b"))[0] == "a, all 3 experts, BF16"
    assert "All experts of the source are kept" in readme(tmp_path / "b")


# --- numbers


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("mxfp4", "keep"), ("mxfp4", "bf16"), ("bf16", "mxfp4"), ("original", "keep"), ("resaved", "keep")],
)
def test_numbers_are_those_of_the_files(layout: str, dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, layout, shards=3)
    full, out = tmp_path / "full", tmp_path / "out"
    prune(source, full, keep_all, card=False)
    result = prune(source, out, cut, store=dtype)
    rows = cells(readme(out))
    total, active = counted(out, 3, 2)
    source_total, source_active = counted(full, 8, 2)
    assert rows["parameters"] == [f"{total:,}", f"{source_total:,}"]
    assert rows["active parameters"] == [f"{active:,}", f"{source_active:,}"]
    assert rows["experts per layer"] == ["3", "8"]
    assert rows["experts per token (top-k)"] == ["2", "2"]
    assert rows["layers"] == ["3", "3"]
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (out, source)]
    assert rows["weight files"] == [f"{size / 1000:.2f} kB" for size in sizes]
    stored = {"mxfp4": "MXFP4 (4.25 bits per weight)", "bf16": "BF16"}
    before = "mxfp4" if layout in ("mxfp4", "original") else "bf16"
    assert rows["expert weights"] == [stored[result.program.expert_format.name], stored[before]]
    assert rows["other weights"] == ["BF16", "BF16"]
    if result.program.expert_format.name == "mxfp4":
        assert f"which takes {2 * total / 1000:.2f} kB" in readme(out)


def test_top_k_that_changed_is_told(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(experts=8, top_k=4))
    prune(source, tmp_path / "out", lambda m: plan_keeping([0, 1, 2], m))
    card = readme(tmp_path / "out")
    assert cells(card)["experts per token (top-k)"] == ["3", "4"]
    assert "top-k 3 is not a power of two" in card
    assert "**Top-k changed.**" in card


# --- the same card


@pytest.mark.parametrize("layout", ["mxfp4", "bf16", "original", "resaved"])
@pytest.mark.parametrize("dtype", ["keep", "bf16", "mxfp4"])
def test_card_of_a_finished_checkpoint_is_the_one_it_was_written_with(
    layout: str, dtype: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, layout, shards=2)
    (source / "README.md").write_bytes(README)
    (source / "USAGE_POLICY").write_text("terms")
    prune(source, tmp_path / "out", cut, store=dtype, max_shard_size=9000)
    assert make_card(tmp_path / "out") == readme(tmp_path / "out")


def test_same_inputs_give_the_same_card_wherever_and_whenever(
    source: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.utime(source / "README.md", (0, 0))
    prune(source, tmp_path / "elsewhere" / "other name", cut)
    assert readme(tmp_path / "elsewhere" / "other name") == readme(out)
    (tmp_path / "moved").mkdir()
    out.rename(tmp_path / "moved" / "again")
    assert make_card(tmp_path / "moved" / "again") == readme(tmp_path / "moved" / "again")


def test_no_path_of_this_machine_is_told(out: Path, tmp_path: Path) -> None:
    for name in ("README.md", "surgery.json"):
        assert str(tmp_path) not in (out / name).read_text()
        assert tmp_path.parent.name not in (out / name).read_text()


def test_no_card_leaves_the_sources_readme_as_it_was_called_before(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "bare", cut, card=False)
    assert not (tmp_path / "bare" / "README.md").exists()
    assert (tmp_path / "bare" / "README.source.md").read_bytes() == README
    prune(source, tmp_path / "out", cut)
    assert make_card(tmp_path / "bare") == readme(tmp_path / "out")


def test_source_without_readme_gets_a_card(source: Path, tmp_path: Path) -> None:
    (source / "README.md").unlink()
    prune(source, tmp_path / "out", cut)
    assert not (tmp_path / "out" / "README.source.md").exists()
    assert "The source's model card does not name a licence." in readme(tmp_path / "out")
    assert make_card(tmp_path / "out") == readme(tmp_path / "out")


def test_card_of_a_card_carries_licence_and_citation_on(out: Path, tmp_path: Path) -> None:
    prune(out, tmp_path / "smaller", lambda m: plan_keeping([0, 2], m))
    first, second = readme(out), readme(tmp_path / "smaller")
    assert metadata(second)["license"] == "apache-2.0"
    assert blocks(second, "bibtex") == blocks(first, "bibtex") == ["@misc{model, title={A ``model''}}\n"]


def test_manifest_of_a_version_that_recorded_less_still_gives_a_card(out: Path) -> None:
    from tests.support.manifests import rewrite

    def forget(document: dict[str, dict[str, object]]) -> None:
        document["source"] = {key: document["source"][key] for key in ("layout", "files")}

    rewrite(out, forget)
    card = make_card(out)
    assert cells(card)["experts per token (top-k)"] == ["2", "not recorded"]
    assert cells(card)["expert weights"][1] == "not recorded"
    with pytest.raises(PlanMismatchError, match="does not record which model was pruned"):
        make_card(out, evaluation=evaluation_of("example:tiny", load_plan_of(out), 2))


def test_manifest_with_fields_of_other_types_gives_a_card_all_the_same(out: Path) -> None:
    from tests.support.manifests import rewrite

    junk = {
        "name": 5,
        "top_k": "4",
        "expert_storage": [],
        "base_model": "a: [b",
        "base_model_from": {},
        "revision": 3,
    }
    rewrite(out, lambda d: d["source"].update(junk))
    assert "base_model" not in metadata(make_card(out))


def test_manifest_and_weights_of_two_models_are_refused(out: Path) -> None:
    from tests.support.manifests import rewrite

    rewrite(out, lambda d: d["plan"].update(layers=[[0, 1]] * 3))
    with pytest.raises(VerificationError, match=r"surgery.json: its plan does not match"):
        make_card(out)


def test_checkpoint_without_manifest_has_no_card_to_make(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"surgery.json: not found"):
        make_card(source)
    with pytest.raises(OutputError, match="no such"):
        make_card(tmp_path / "nowhere")


def load_plan_of(out: Path) -> Plan:
    plan = out.parent / "plan.json"
    plan.write_text(json.dumps(json.loads((out / "surgery.json").read_text())["plan"]))
    return load_plan(plan)


# --- what it tells


SECTIONS = [
    "Numbers",
    "How the experts were chosen",
    "Kept experts",
    "Evaluation",
    "Limits",
    "Usage",
    "Verify and reproduce",
    "Licence",
    "Citation",
]


def test_sections_are_there_in_order(out: Path) -> None:
    assert headings(readme(out)) == ["some-model with 3 of 8 experts", *SECTIONS]
    assert {"LICENSE", "apache-2.0", "README.source.md"} <= spans(readme(out))


def test_kept_experts_are_listed_by_layer(out: Path) -> None:
    plan = load_plan_of(out)
    rows = cells(section(readme(out), "Kept experts"))
    told = {layer: experts[0] for layer, experts in rows.items() if layer.isdigit()}
    for layer, kept in enumerate(plan.layers):
        numbers: list[int] = []
        for part in told[str(layer)].split(", "):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
        assert tuple(numbers) == kept


def test_long_plan_is_left_to_the_manifest(tmp_path: Path) -> None:
    shape = Shape(
        layers=5, experts=1024, top_k=1, hidden=32, intermediate=32, heads=1, kv_heads=1, head_dim=2
    )
    source = write_checkpoint(tmp_path / "in", shape)
    prune(source, tmp_path / "out", lambda m: plan_random(1000, 1, m))
    assert "<details>" not in readme(tmp_path / "out")
    assert len(readme(tmp_path / "out")) < 8000


RANKED = {"method": "reap", "domains": ["law"], "tokens": 4096, "checkpoint": "0" * 32}
TEXTS = {"law": [{"name": "l.txt", "xxh3_128": "1" * 32, "tokens": 4096}]}


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        ({"ranking": "law.json"}, ["in the ranking file `law.json`", "is not recorded"]),
        ({**RANKED, "texts": TEXTS}, ["highest `reap`", "| `law` | 1 | 4,096 | `l.txt` |"]),
        (
            {**RANKED, "protect_super_experts": True},
            ["outlier activations", "Domains: `law`", "Tokens: 4,096"],
        ),
        ({"method": "frequency", "statistics": ["a/b/c.json"] * 5}, ["5 files of published", "and 2 more"]),
        (
            {"method": "frequency", "statistics": ["a"], "interleaved_with": {"ranking": "all.json"}},
            ["(`all.json`)"],
        ),
        ({"method": "new way", "beam": 4}, ["recorded in the plan: `new way`", "`beam`: `4`"]),
        ({"method": None}, ["is not recorded in the plan"]),
        ({"method": 7, "texts": {"a": 3, "b": [4, {"tokens": "x"}]}, "domains": 4, "tokens": True}, ["`7`"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_choice_is_told_in_words(provenance: dict[str, object], words: list[str], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    ranking = Ranking(8, (tuple(range(8)),) * 3, provenance=provenance)
    prune(
        source,
        tmp_path / "out",
        lambda m: plan_from_ranking(ranking, 3, model_type="gpt_oss", order="ranking"),
    )
    told = section(readme(tmp_path / "out"), "How the experts were chosen")
    assert [word for word in words if word not in told] == []
    assert "best first" in told


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_random_choice_is_told_and_remade_by_the_commands(
    top_k: int | None, source: Path, tmp_path: Path
) -> None:
    from moe_surgery.cli import main

    out = tmp_path / "out"
    prune(source, out, cut, top_k=top_k)
    card = readme(out)
    assert "chosen at random (seed `5`)" in card
    commands = [line for block in blocks(card, "sh") for line in block.splitlines()]
    (plan,) = [line.split() for line in commands if line.startswith("moe-surgery plan ")]
    made = tmp_path / "made.json"
    arguments = [{"path/to/the/source": str(source), "plan.json": str(made)}.get(a, a) for a in plan[1:]]
    with pytest.raises(SystemExit):
        main(arguments)
    assert load_plan(made) == load_plan_of(out)


def test_plan_without_provenance_says_so(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    prune(source, tmp_path / "out", Plan("gpt_oss", 8, ((0, 1), (2, 3), (4, 5))))
    assert "is not recorded in the plan" in readme(tmp_path / "out")


def test_every_metric_has_words() -> None:
    assert set(METHODS) == set(METRICS)


def test_python_of_the_card_runs_as_it_stands(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    out = tmp_path / "out"
    prune("example:tiny", out, lambda m: plan_keeping(list(range(8)), m), store="bf16")
    (program,) = blocks(readme(out), "python")
    assert "path/to/this/folder" in program
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(program.replace("path/to/this/folder", str(out)), {})
    assert said.getvalue().strip()


# --- evaluation


def test_evaluation_is_shown_with_its_figures(source: Path, out: Path) -> None:
    plan = load_plan_of(out)
    card = make_card(out, evaluation=evaluation_of(source, plan, 2))
    rows = cells(section(card, "Evaluation"))
    law, code = quality(1, 3, 300), quality(2, 3)
    redirected = [100 * sum(q.rerouted) / 3 for q in (law, code)]
    assert rows["`law`"] == [
        "300", "2.12", f"{2.718281828459045**law.cross_entropy:.2f}", f"{law.kl:.4f}",
        f"{100 * law.agreement:.1f} %", f"{redirected[0]:.1f} %",
    ]  # fmt: skip
    mean = (300 * law.kl + 100 * code.kl) / 400
    assert (rows["all"][0], rows["all"][3]) == ("400", f"{mean:.4f}")
    assert rows["all"][5] == f"{(300 * redirected[0] + 100 * redirected[1]) / 400:.1f} %"
    assert "Not evaluated" not in card
    assert "Not evaluated" in readme(out)


def test_evaluation_of_something_else_is_refused(source: Path, out: Path) -> None:
    plan = load_plan_of(out)
    good = evaluation_of(source, plan, 2)
    full, mine = good.models
    wrong = [
        replace(good, identity="0" * 32),
        replace(good, num_experts=16),
        replace(good, models=(full,)),
        replace(good, models=(full, replace(mine, experts=(3, 3, 4)))),
        replace(good, models=(full, replace(mine, top_k=1))),
        replace(good, models=(full, replace(mine, provenance={**plan.provenance, "seed": 6}))),
        replace(good, models=(full, mine, replace(mine, name="b", domains={"law": quality(3, 3)}))),
    ]
    for evaluation in wrong:
        with pytest.raises(PlanMismatchError, match="evaluat"):
            make_card(out, evaluation=evaluation)
    twice = replace(good, models=(full, mine, replace(mine, name="b", kind="checkpoint")))
    assert make_card(out, evaluation=twice) == make_card(out, evaluation=good)


# --- strangers' words

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
    full, mine = good.models
    named = [replace(m, name=name, domains={name: next(iter(m.domains.values()))}) for m in (full, mine)]
    texts: dict[str, list[dict[str, object]]] = {name: [{"name": name}]}
    evaluation = replace(good, models=tuple(named), texts=texts, settings={name: name})
    for card in (readme(out), make_card(out, evaluation=evaluation)):
        said = metadata(card)
        assert set(said) <= {
            "library_name", "pipeline_tag", "license", "license_name", "license_link", "tags", "language",
        }  # fmt: skip
        found = tokens(card)
        kinds = {token.type for token in found}
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
        html = {token.content.strip() for token in found if token.type == "html_block"}
        assert html <= {"<details>\n<summary>Kept experts of each layer</summary>", "</details>"}
        assert headings(card)[1:] == SECTIONS
        (citation,) = [block for block in blocks(card, "") if "# H" in block]
        assert citation.endswith("\n```\n`````\n</pre>\n")
        bare = "".join(t.content for t in found if t.type == "text")
        assert "script" not in bare
        assert all(c.isprintable() or c == "\n" for c in card)
        widths = {len(row) for row in cells(section(card, "How the experts were chosen")).values()}
        assert widths == {3}
    assert make_card(out) == readme(out)


def test_name_that_is_no_unicode_is_replaced(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "plain", SHAPE)
    folder = os.fsencode(tmp_path) + b"/m\xff"
    try:
        os.rename(source, folder)
    except OSError:
        pytest.skip("this file system wants Unicode names")
    prune(os.fsdecode(folder), tmp_path / "out", cut)
    assert "A smaller `m\ufffd`" in readme(tmp_path / "out")
