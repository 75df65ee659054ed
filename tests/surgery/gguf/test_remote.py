"""GGUF files on the hub: found by path or tag, and pruned for the bytes of what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from moe_surgery import inspect
from moe_surgery.checkpoint import retries
from moe_surgery.checkpoint.gguf.resolve import is_gguf, open_gguf
from moe_surgery.engine.fetch import Fetch
from moe_surgery.errors import NetworkError, OutputError
from moe_surgery.surgery.verify import verify_checkpoint
from tests.support.gguf_slices import assert_pruned
from tests.support.hub_server import COMMIT, MODEL, Answer, HubServer, serving
from tests.support.raw_gguf import TinyMoe, write_split

from .models import pruned

TINY = TinyMoe(hidden=256, width=512, experts=16)
KEPT = (1, 2, 6, 11)
WINDOW = 256 << 10


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    (folder / "UD-Q8_K_XL").mkdir(parents=True)
    (folder / "BF16").mkdir()
    TINY.write(folder / "Tiny-Q8_0.gguf")
    TINY.write(folder / "Tiny-UD-Q2_K.gguf", seed=2)
    TinyMoe(experts=4).write(folder / "Tiny-Q2_K.gguf")
    write_split(folder / "UD-Q8_K_XL", "Tiny-UD-Q8_K_XL", TINY.entries(), TINY.tensors(), 3)
    write_split(folder / "BF16", "Tiny-BF16", TINY.entries(), TINY.tensors(), 2)
    for name in ("mmproj-Q8_0.gguf", "imatrix.gguf", "README.md"):
        (folder / name).write_bytes(b"GGUF")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(published) as server:
        server.use(tmp_path / "cache", monkeypatch)
        yield server


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("Q8_0", "Tiny-Q8_0.gguf"),
        ("q8_0", "Tiny-Q8_0.gguf"),
        ("Tiny-Q2_K.gguf", "Tiny-Q2_K.gguf"),
        ("UD-Q2_K", "Tiny-UD-Q2_K.gguf"),
        ("UD-Q8_K_XL", "Tiny-UD-Q8_K_XL-00001-of-00003.gguf"),
        ("BF16/Tiny-BF16-00001-of-00002.gguf", "Tiny-BF16-00001-of-00002.gguf"),
        ("BF16/Tiny-BF16", "Tiny-BF16-00001-of-00002.gguf"),
    ],
)
def test_files_by_path_and_tag(hub: HubServer, wanted: str, found: str) -> None:
    for name in (f"{MODEL}:{wanted}", f"{MODEL}@main:{wanted}"):
        assert is_gguf(name)
        with open_gguf(name) as model:
            assert model.name == found
            assert str(model.path).startswith(f"{MODEL}@{COMMIT}")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            "Q4_K_M",
            "no such GGUF file; there is: BF16/Tiny-BF16-00001-of-00002.gguf, Tiny-Q2_K.gguf, Tiny-Q8_0.gguf",
        ),
        ("8_0", "no such GGUF file"),
        ("Q2_K", "several files end in that: Tiny-Q2_K.gguf, Tiny-UD-Q2_K.gguf; name one of them"),
        ("imatrix", "no such GGUF file"),
    ],
)
def test_names_that_mean_no_file_or_several(hub: HubServer, wanted: str, words: str) -> None:
    with pytest.raises(OutputError) as caught:
        open_gguf(f"{MODEL}:{wanted}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", ["Q8_0", "UD-Q8_K_XL"])
def test_pruning_fetches_headers_and_kept_experts(
    hub: HubServer, published: Path, tmp_path: Path, tag: str
) -> None:
    said: list[Fetch] = []
    pruned(f"{MODEL}:{tag}", tmp_path / "out.gguf", KEPT, on_fetch=said.append)  # type: ignore[arg-type]
    assert_pruned(published / "Tiny-Q8_0.gguf", tmp_path / "out.gguf", dict.fromkeys(range(3), KEPT), 16)
    size = (tmp_path / "out.gguf").stat().st_size
    files = 3 if tag != "Q8_0" else 1
    router = 256 * 16 * 4  # the first one, for the digest of the source
    assert hub.total <= 1.02 * size + files * WINDOW + router
    assert hub.total < 0.5 * (published / "Tiny-Q8_0.gguf").stat().st_size + files * WINDOW
    assert len(said) == 1
    assert abs(said[0].nbytes - size) < 0.02 * size
    hub.forget()
    assert verify_checkpoint(tmp_path / "out.gguf", source=f"{MODEL}:{tag}").ok
    assert hub.total <= 1.02 * size + files * WINDOW + router


def test_inspecting_costs_headers_only(hub: HubServer, published: Path) -> None:
    remote, local = inspect(f"{MODEL}:Q8_0").as_dict(), inspect(published / "Tiny-Q8_0.gguf").as_dict()
    assert remote.pop("path") == f"{MODEL}@{COMMIT}/Tiny-Q8_0.gguf"
    local.pop("path")
    assert remote == local
    assert hub.total <= 2 * WINDOW


def test_files_in_the_cache_are_read_from_there(
    hub: HubServer, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    home = tmp_path / "cache" / "models--owner--model"
    folder = home / "snapshots" / COMMIT
    for part in (folder, home / "blobs", home / "refs"):
        part.mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    content = (published / "Tiny-Q8_0.gguf").read_bytes()
    blob = home / "blobs" / sha256(content).hexdigest()
    blob.write_bytes(content)
    (folder / "Tiny-Q8_0.gguf").symlink_to(blob)
    pruned(f"{MODEL}:Q8_0", tmp_path / "out.gguf", KEPT)  # type: ignore[arg-type]
    assert hub.total == 0
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pruned(f"{MODEL}:Q8_0", tmp_path / "again.gguf", KEPT)  # type: ignore[arg-type]
    assert hub.requests == []
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    with pytest.raises(OutputError, match=r"no such GGUF file; there is: Tiny-Q8_0.gguf"):
        open_gguf(f"{MODEL}:UD-Q2_K")


def test_a_hub_that_goes_away_leaves_what_the_next_run_resumes(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_DELAY", 0.0005)
    seen = 0

    def fault(request: object) -> Answer | None:
        nonlocal seen
        seen += getattr(request, "method", "") == "GET" and getattr(request, "host", "") == "storage"
        return Answer(503, {"Retry-After": "0"}) if seen > 6 else None

    hub.fault = fault
    with pytest.raises(NetworkError):
        pruned(f"{MODEL}:UD-Q8_K_XL", tmp_path / "out.gguf", KEPT)  # type: ignore[arg-type]
    assert not (tmp_path / "out.gguf").exists()
    assert len(list(tmp_path.glob(".out.gguf.partial-*"))) == 1
    hub.fault = lambda request: None
    pruned(f"{MODEL}:UD-Q8_K_XL", tmp_path / "out.gguf", KEPT)  # type: ignore[arg-type]
    assert not list(tmp_path.glob(".out.gguf.*"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.gguf", True),
        ("folder/model-00001-of-00002.gguf", True),
        ("owner/name:Q4_K_M", True),
        ("owner/name@main:UD-Q4_K_XL/file.gguf", True),
        ("owner/name", False),
        ("example:tiny", False),
        ("folder", False),
        ("model.safetensors", False),
    ],
)
def test_names_of_gguf_models(name: str, expected: bool) -> None:
    assert is_gguf(name) is expected
