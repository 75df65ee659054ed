"""What transformers ignores in a model's folder is ignored, and logits are those that transformers gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_surgery import inspect, load_model, plan_keeping, prune
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.errors import InvalidInputError
from tests.support.command import assert_sound, call

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

load_file, save_file = safetensors_torch.load_file, safetensors_torch.save_file

Capture = pytest.CaptureFixture[str]
TOKENS = torch.arange(5, 25)
FIRST = "model-00001-of-00002.safetensors"
LISTED = (FIRST, "model-00002-of-00002.safetensors")


def source_tensors() -> dict[str, torch.Tensor]:
    return {name: t for file in LISTED for name, t in load_file(resolve("example:tiny") / file).items()}


def zeros() -> dict[str, torch.Tensor]:
    """The model's tensors, all zero: reading them instead shows."""
    return {name: torch.zeros_like(t) for name, t in source_tensors().items()}


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def peft(folder: Path) -> None:
    a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save({a: torch.ones(4, 64)}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def value_head_file(folder: Path) -> None:
    save({"v_head.summary.weight": torch.ones(1, 64)}, folder / "value_head.safetensors")


def backups(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / f"{FIRST}.bak")
    save(zeros(), folder / "model.safetensors.old")
    save(zeros(), folder / "pytorch_model.bin.bak")
    shutil.copy(folder / "model.safetensors.index.json", folder / "model.safetensors.index.json.orig")


def stray(folder: Path) -> None:
    save(zeros(), folder / "aaa.safetensors")
    save(zeros(), folder / "model-00003-of-00003.safetensors")


def hidden(folder: Path) -> None:
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7")


def single(folder: Path) -> None:
    """One model.safetensors without an index, another file beside it."""
    for file in (*LISTED, "model.safetensors.index.json"):
        (folder / file).unlink()
    save(source_tensors(), folder / "model.safetensors")
    save(zeros(), folder / "other.safetensors")


def add_tensors(folder: Path, names: list[str]) -> None:
    """Into the first shard and the index."""
    added = {name: torch.ones(8) for name in names}
    save(load_file(folder / FIRST) | added, folder / FIRST)
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | dict.fromkeys(names, FIRST))


def inv_freq(folder: Path) -> None:
    layers = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(4)]
    add_tensors(folder, ["model.rotary_emb.inv_freq", *layers])


def value_head(folder: Path) -> None:
    add_tensors(folder, ["v_head.summary.weight", "v_head.summary.bias"])


def tied(folder: Path) -> None:
    """tie_word_embeddings over an lm_head.weight that differs from the embedding."""
    edit_json(folder / "config.json", tie_word_embeddings=True)


def tied_equal(folder: Path) -> None:
    tied(folder)
    embedding = source_tensors()["model.embed_tokens.weight"]
    for file in LISTED:
        tensors = load_file(folder / file)
        if "lm_head.weight" in tensors:
            save(tensors | {"lm_head.weight": embedding.clone()}, folder / file)


# How the folder is changed; what the one note says; files that pruning must not copy.
FOLDERS: dict[str, tuple[Callable[[Path], None], str | None, set[str]]] = {
    "PEFT": (
        peft,
        "2 files are ignored, as in transformers, such as adapter_config.json (a PEFT adapter, which transformers "
        "applies if peft is installed; moe-surgery merge",
        {"adapter_config.json", "adapter_model.safetensors"},
    ),
    "value head beside": (
        value_head_file,
        "1 file is ignored, as in transformers: value_head.safetensors (a value head of TRL)",
        {"value_head.safetensors"},
    ),
    "backups": (
        backups,
        f"4 files are ignored, as in transformers, such as {FIRST}.bak (a backup copy)",
        {
            f"{FIRST}.bak",
            "model.safetensors.old",
            "pytorch_model.bin.bak",
            "model.safetensors.index.json.orig",
        },
    ),
    "stray shards": (
        stray,
        "2 files are ignored, as in transformers, such as aaa.safetensors (not listed in",
        {"aaa.safetensors", "model-00003-of-00003.safetensors"},
    ),
    "hidden": (hidden, None, {"._model.safetensors"}),
    "one file and another": (
        single,
        "1 file is ignored, as in transformers: other.safetensors (model.safetensors is the whole model)",
        {"other.safetensors"},
    ),
    "inv_freq": (
        inv_freq,
        "5 tensors are ignored, as in transformers: model.layers.0.self_attn.rotary_emb.inv_freq (a buffer",
        set(),
    ),
    "value head inside": (
        value_head,
        "2 tensors are ignored, as in transformers: v_head.summary.bias (a value head of TRL)",
        set(),
    ),
    "tied, another lm_head": (
        tied,
        "lm_head.weight is stored; the stored tensor is used, as in transformers",
        set(),
    ),
    "tied, the same lm_head": (tied_equal, "lm_head.weight is stored; the stored tensor is used", set()),
}


def theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def ours(folder: Path) -> torch.Tensor:
    model = load_model(folder, dtype=torch.float32, backend="reference")
    with torch.no_grad():
        return model(TOKENS[None], model.new_cache(1, len(TOKENS)))[0]


@pytest.fixture(autouse=True)
def without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is where peft is not installed: with it, an adapter in the folder is applied."""
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: False)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(resolve("example:tiny"), copy)
    FOLDERS[request.node.callspec.params["case"]][0](copy)
    return copy


@pytest.mark.parametrize("case", FOLDERS)
def test_logits_are_those_of_transformers(case: str, folder: Path) -> None:
    torch.testing.assert_close(ours(folder), theirs(folder), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", FOLDERS)
def test_every_command_says_it_in_one_note(case: str, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    output = FOLDERS[case][1]
    texts = tmp_path / "texts.txt"
    texts.write_text("Question: What is 7 + 5?\n")
    commands: list[list[str | Path]] = [
        ["inspect", folder],
        ["prune", folder, tmp_path / "out", "--keep", "0-3"],
        ["export", folder, tmp_path / "out.gguf"],
        ["verify", folder, "--structure-only"],
        ["generate", folder, "--prompt", "7 + 5 =", "--max-new-tokens", "1"],
        ["profile", folder, "--texts", texts, "-o", tmp_path / "s.stats"],
    ]
    for command in commands:
        ended = call(capsys, *command)
        assert ended.code == 0, ended.err
        notes = [
            line for line in ended.err.splitlines() if line.startswith("note: ") and "transformers" in line
        ]
        notes = [line for line in notes if str(folder) in line]
        assert len(notes) == (output is not None), ended.err
        assert all(output in line for line in notes if output)
    result = call(capsys, "inspect", folder, "--json").json()["notes"]
    assert len(result) == (output is not None)


@pytest.mark.parametrize("case", FOLDERS)
def test_a_pruned_model_is_the_same_without_what_is_ignored(case: str, folder: Path, tmp_path: Path) -> None:
    everything, some = tmp_path / "all", tmp_path / "some"
    prune(folder, everything, lambda model: plan_keeping(None, model))
    assert not FOLDERS[case][2] & {file.name for file in everything.iterdir()}
    assert_sound(everything, folder)
    torch.testing.assert_close(theirs(everything), theirs(folder), rtol=0, atol=0)
    prune(folder, some, lambda model: plan_keeping([3, 1, 30, 7], model))
    torch.testing.assert_close(ours(some), theirs(some), rtol=1e-4, atol=1e-3)
    assert inspect(some).notes == ()


def test_model_safetensors_beside_an_index_is_refused(tmp_path: Path) -> None:
    """transformers reads it alone, other programs the shards: no choice would be everybody's."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("example:tiny"), folder)
    before = theirs(folder)
    save(zeros(), folder / "model.safetensors")
    assert not torch.equal(theirs(folder), before)
    with pytest.raises(InvalidInputError, match=r"model\.safetensors: not listed in .* remove one"):
        inspect(folder)


def test_a_portuguese_readme_is_no_weights(tmp_path: Path) -> None:
    from moe_surgery.checkpoint.additions import is_weights

    names = ["README.pt.md", "tokens.bin.txt", "a.safetensors.md", "adapter.py", "safetensors", "x.bin_notes"]
    assert not any(map(is_weights, names))
    assert all(
        map(is_weights, ["x.safetensors~", "x.bin.1", "x.gguf.part", "x.pth", "pytorch_model.bin.index.json"])
    )
