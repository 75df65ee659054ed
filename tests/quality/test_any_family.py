"""Models that transformers has, run layer by layer: statistics, views and search against its whole model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import Plan, inspect, prune  # noqa: E402
from moe_surgery.checkpoint.checkpoint import Checkpoint  # noqa: E402
from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.families import identify_model  # noqa: E402
from moe_surgery.quality.candidates import Candidate, pruned_candidate  # noqa: E402
from moe_surgery.quality.corpus import Passage  # noqa: E402
from moe_surgery.quality.evaluate import evaluate_passages  # noqa: E402
from moe_surgery.quality.greedy_elimination import greedy_elimination  # noqa: E402
from moe_surgery.quality.open_layers import open_layers, open_with_transformers  # noqa: E402
from moe_surgery.quality.profile import profile_passages  # noqa: E402
from moe_surgery.selection.ranking import load_ranking  # noqa: E402
from moe_surgery.selection.statistics import load_statistics  # noqa: E402
from moe_surgery.surgery.routing import check_view  # noqa: E402
from tests.support.any_family import statistics  # noqa: E402
from tests.support.command import call  # noqa: E402
from tests.support.masked import biases, load, logits, restricted  # noqa: E402
from tests.support.routed import assert_same  # noqa: E402
from tests.support.tiny_checkpoints import save, unpacked  # noqa: E402
from tests.support.tiny_families import FAMILIES, TinyFamily  # noqa: E402

pytestmark = pytest.mark.xdist_group("transformers")

Capture = pytest.CaptureFixture[str]
BY_NAME = {family.name: family for family in FAMILIES}
QUICK = ("qwen3_5_moe", "deepseek_v3 grouped", "ernie4_5_moe", "glm4_moe fp8")
# Their layers pass more to the next one than hidden states.
NOT_RUN = ("glm_moe_dsa",)
SEQUENCES = ((5, 9, 33, 21, 7, 60, 61, 3), (11, 12, 4), (40, 41, 42, 43, 44, 45, 9, 9, 10))
PASSAGES = [Passage("x", SEQUENCES[0]), Passage("y", SEQUENCES[1]), Passage("x", SEQUENCES[2])]


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    """Checkpoints by the family's name, as far as they were made."""
    return {}


@pytest.fixture
def made(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    def make(family: TinyFamily) -> Path:
        if family.name not in folders:
            folders[family.name] = save(family, tmp_path_factory.mktemp("tiny") / "model")
        return folders[family.name]

    return make


def of(sequences: Sequence[Sequence[int]], domain: str) -> list[Sequence[int]]:
    return [s for s, p in zip(sequences, PASSAGES, strict=True) if p.domain == domain]


def check_statistics(family: TinyFamily, folder: Path) -> None:
    found = profile_passages(open_layers(folder), PASSAGES)
    full = load(unpacked(folder))
    for domain, layers in found.items():
        expected = statistics(full, of(SEQUENCES, domain), family.experts)
        assert len(layers) == len(expected) == inspect(folder).layers
        assert_same(layers, expected)


def keep(folder: Path, counts: Sequence[int], seed: int) -> Plan:
    """Random experts, so many in each layer, the same number from each group."""
    found, rng = inspect(folder), np.random.default_rng(seed)
    groups = found.groups[0] if found.groups else 1
    size = found.experts // groups
    layers = []
    for number in range(found.layers):
        each = counts[number % len(counts)] // groups
        rows = [group * size + rng.permutation(size)[:each] for group in range(groups)]
        layers.append(tuple(int(e) for e in np.concatenate(rows)))
    numbers = tuple(found.layer_numbers)
    return Plan(
        found.model_type,
        found.experts,
        tuple(layers),
        layer_numbers=() if numbers == tuple(range(len(numbers))) else numbers,
    )


def check_views(family: TinyFamily, folder: Path, out: Path) -> None:
    plan = keep(folder, family.counts[-1:], 3)
    prune(folder, out, plan, card=False)
    model = open_layers(folder)
    with Checkpoint.open(out) as opened:
        pruned = pruned_candidate("pruned", opened.files, open_layers(out), model, plan.numbers)
    full, view, same = evaluate_passages(model, [PASSAGES], [Candidate("view", plan.layers), pruned])
    assert view.domains == same.domains
    assert view.experts == same.experts == (family.counts[-1],) * len(plan.layers)
    whole = load(unpacked(folder))
    expected: dict[str, list[torch.Tensor]] = {"x": [], "y": []}
    kept = dict(zip(plan.numbers, plan.layers, strict=True))
    before = [torch.log_softmax(logits(whole, torch.tensor([p.tokens]))[0], -1) for p in PASSAGES]
    with restricted(whole, kept, family.experts, family.tail):
        for passage, reference in zip(PASSAGES, before, strict=True):
            log_p = torch.log_softmax(logits(whole, torch.tensor([passage.tokens]))[0], -1)
            kl = (reference.exp() * (reference - log_p)).sum(-1)
            expected[passage.domain].append(kl[:-1])
    for domain, kls in expected.items():
        assert view.domains[domain].kl == pytest.approx(float(torch.cat(kls).mean()), rel=1e-3, abs=1e-6)
        assert full.domains[domain].kl < 1e-6


@pytest.mark.parametrize("name", QUICK)
def test_statistics_are_what_hooks_on_the_whole_model_see(name: str, made) -> None:  # type: ignore[no-untyped-def]
    check_statistics(BY_NAME[name], made(BY_NAME[name]))


@pytest.mark.parametrize("name", QUICK)
def test_a_view_is_the_pruned_checkpoint_and_the_masked_model(name: str, made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    check_views(BY_NAME[name], made(BY_NAME[name]), tmp_path / "pruned")


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in NOT_RUN], ids=lambda f: f.name)
def test_so_it_is_for_every_family(family: TinyFamily, made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    check_statistics(family, made(family))
    if family.model_type != "deepseek_v4":  # the masked model would need its tables rewritten
        check_views(family, made(family), tmp_path / "pruned")


def greedy_by_hand(family: TinyFamily, folder: Path) -> list[float]:
    """Errors of the last layer's output by the number of experts left, of a greedy choice with the whole model."""
    model = load(unpacked(folder))
    numbers = inspect(folder).layer_numbers
    layer = next(m for n, m in model.named_modules() if n.endswith(f"layers.{numbers[-1]}"))
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(
        lambda _m, _a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )

    def output(left: Sequence[int]) -> torch.Tensor:
        seen.clear()
        kept = {n: tuple(range(family.experts)) for n in numbers} | {numbers[-1]: tuple(left)}
        before = [bias.clone() for _, bias in biases(model, (family.experts,))]
        with restricted(model, kept, family.experts):
            for sequence in SEQUENCES:
                logits(model, torch.tensor([sequence]))
        for (_, bias), value in zip(biases(model, (family.experts,)), before, strict=True):
            with torch.no_grad():
                bias.copy_(value)
        return torch.cat([s.reshape(-1, s.shape[-1]) for s in seen]).double()

    left = list(range(family.experts))
    full = output(left)
    norms = full.pow(2).sum(1)
    errors = [0.0]
    while len(left) > 1:
        costs = {}
        for expert in left:
            rest = [e for e in left if e != expert]
            costs[expert] = float(((output(rest) - full).pow(2).sum(1) / norms).mean())
        worst = min(costs, key=lambda e: costs[e])
        left.remove(worst)
        errors.append(costs[worst])
    return errors[::-1]


@pytest.mark.parametrize("name", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "olmoe", "minimax_m2"])
def test_search_is_greedy_over_the_whole_models_output(name: str, made) -> None:  # type: ignore[no-untyped-def]
    """A softmax with weights that sum to one, one without, and a sigmoid with a bias."""
    folder = made(BY_NAME[name])
    orders = greedy_elimination(open_layers(folder), PASSAGES)
    expected = greedy_by_hand(BY_NAME[name], folder)
    assert all(sorted(order.experts) == list(range(8)) for order in orders)
    assert orders[-1].errors == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_search_keeps_groups_equal(made) -> None:  # type: ignore[no-untyped-def]
    folder = made(BY_NAME["deepseek_v3 grouped"])
    for order in greedy_elimination(open_layers(folder), PASSAGES):
        assert sorted(order.experts) == list(range(16))
        for kept in (8, 12):
            assert np.bincount(np.array(order.experts[:kept]) // 4).tolist() == [kept // 4] * 4
            assert order.errors[kept - 1] is not None
        assert order.errors[:7] == (None,) * 7
        assert order.errors[-1] == 0.0


def test_gpt_oss_is_the_same_either_way(tiny_model) -> None:  # type: ignore[no-untyped-def]
    other = open_with_transformers("example:tiny")
    for ours, theirs in zip(
        *(profile_passages(m, PASSAGES).values() for m in (tiny_model, other)), strict=True
    ):
        assert_same(theirs, ours)
    plan = keep(resolve("example:tiny"), (8, 20), 1)
    candidates = [Candidate("view", plan.layers), Candidate("top-2", plan.layers, 2)]
    one, two = (evaluate_passages(m, [PASSAGES], candidates) for m in (tiny_model, other))
    for a, b in zip(one, two, strict=True):
        assert (a.experts, a.top_k) == (b.experts, b.top_k)
        for domain, quality in a.domains.items():
            assert b.domains[domain].kl == pytest.approx(quality.kl, rel=1e-3, abs=1e-6)
            assert b.domains[domain].rerouted == quality.rerouted
    for a, b in zip(*(greedy_elimination(m, PASSAGES) for m in (tiny_model, other)), strict=True):
        assert a.errors == pytest.approx(b.errors, rel=1e-2, abs=1e-5)


def test_layers_of_a_view_may_differ_and_its_top_k_too(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A plan of 3 and 5 experts with one of them for a token, layer by layer against pruned checkpoints."""
    folder = made(BY_NAME["qwen3_moe"])
    model = open_layers(folder)
    [only] = evaluate_passages(model, [PASSAGES], [Candidate("x", keep(folder, (3, 5), 2).layers, 1)])[1:]
    assert (only.experts, only.top_k) == ((3, 5, 3), 1)
    same = evaluate_passages(model, [PASSAGES], [Candidate("all", (tuple(range(8)),) * 3)])[1]
    assert all(q.kl < 1e-7 and q.agreement == 1 for q in same.domains.values())
    most = replace(keep(folder, (5,), 2), top_k=1)
    prune(folder, tmp_path / "out", most, card=False)
    pruned = Candidate("pruned", most.layers, model=open_layers(tmp_path / "out"))
    view, again = evaluate_passages(model, [PASSAGES], [Candidate("v", most.layers, 1), pruned])[1:]
    assert view.domains == again.domains


def test_a_plan_that_the_router_cannot_follow_is_refused(made) -> None:  # type: ignore[no-untyped-def]
    folder = made(BY_NAME["deepseek_v3 grouped"])
    with Checkpoint.open(folder) as opened:
        spec = identify_model(opened)
    plan = Plan("deepseek_v3", 16, (tuple(range(8)),) * 2, layer_numbers=(1, 2))
    with pytest.raises(PlanMismatchError, match=r"layer 1: expert \d+ of group"):
        check_view(spec, plan, "x")


def edited(folder: Path, out: Path, **settings: object) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (out / file.name).symlink_to(file)
    (out / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | settings))
    return out


def test_what_cannot_be_run_is_named(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = made(BY_NAME["qwen3_moe"])
    with pytest.raises(UsageError, match=r"`backend` native: Qwen3-MoE runs on transformers"):
        open_layers(folder, backend="native")
    with pytest.raises(InvalidInputError, match=r"no tensor for 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        evaluate_passages(open_layers(edited(folder, tmp_path / "a", attention_bias=True)), [PASSAGES], [])
    unknown = edited(made(BY_NAME["deepseek_v3 grouped"]), tmp_path / "b", model_type="kimi_k2")
    with pytest.raises(InvalidInputError, match=r"has no model of type kimi_k2"):
        open_layers(unknown)
    with pytest.raises(InvalidInputError, match=r"glm_moe_dsa cannot be run layer by layer"):
        open_layers(made(BY_NAME["glm_moe_dsa"]))
    with pytest.raises(InvalidInputError, match=r"cannot build this model"):
        open_layers(edited(folder, tmp_path / "c", hidden_act="no such function"))


def with_tokenizer(folder: Path, out: Path) -> Path:
    """A copy of a tiny checkpoint whose tokens are single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    copy = edited(folder, out)
    words = {chr(ord("A") + n): n for n in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


def test_commands_go_from_texts_to_a_pruned_checkpoint(made, tmp_path: Path, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """DeepSeek-V3 with groups, whose first layer has no experts."""
    model = with_tokenizer(made(BY_NAME["deepseek_v3 grouped"]), tmp_path / "model")
    text = tmp_path / "words.txt"
    text.write_text("THEQUICKBROWNFOXJUMPSOVERTHELAZYDOGandthequickbrownfox")
    stats, ranking, plan, out = (tmp_path / n for n in ("a.stats", "a.json", "plan.json", "out"))
    for command in (
        ("profile", model, "--texts", text, "-o", stats, "--context", "20"),
        ("rank", stats, "--metric", "reap", "-o", ranking),
        ("plan", ranking, model, "--experts", "8", "-o", plan),
        ("prune", model, out, "--plan", plan),
        ("search", model, "--texts", text, "-o", tmp_path / "found.json"),
        ("plan", tmp_path / "found.json", model, "--experts", "12", "-o", tmp_path / "found-12.json"),
    ):
        ended = call(capsys, *command)
        assert ended.code == 0, ended.err
    found = load_statistics(stats)
    assert (found.layer_numbers, found.tokens, found.settings["backend"]) == (
        (1, 2),
        {"words": 54},
        "transformers",
    )
    assert load_ranking(tmp_path / "found.json").layer_numbers == (1, 2)
    ended = call(capsys, "evaluate", model, out, "--plan", plan, "--texts", text, "--json")
    assert ended.code == 0, ended.err
    full, view, pruned = json.loads(ended.out)["models"]
    assert view["domains"] == pruned["domains"]
    assert view["domains"]["words"]["kl"] > 0 == full["domains"]["words"]["kl"]


def test_without_transformers_a_line_says_what_to_install(
    made,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_tokenizer(made(BY_NAME["qwen3_moe"]), tmp_path / "model")
    (tmp_path / "a.txt").write_text("SOMETEXT")
    for name in [n for n in sys.modules if n.startswith("moe_surgery.quality.transformers_layers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    ended = call(capsys, "profile", model, "--texts", tmp_path / "a.txt", "-o", tmp_path / "a.stats")
    assert ended.code == 2
    assert "runs on the transformers package: pip install 'moe-surgery[transformers]'" in ended.error
