"""Surgery on a model on the hub: the same output as from its files, for the bytes of what is kept."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from moe_surgery import export_gguf, inspect, prune
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.hub_folder import HubFolder
from moe_surgery.engine.chunks import CHUNK_BYTES
from moe_surgery.engine.fetch import Fetch
from moe_surgery.errors import DiskFullError, InvalidInputError, NetworkError
from moe_surgery.selection.plan import Plan, plan_keeping
from moe_surgery.surgery.verify import verify_checkpoint

from ..support.checkpoints import Shape, write_checkpoint
from ..support.command import PATIENCE, call, contents, done, ended, refused, run, siblings, start
from ..support.faults import SmallDisk
from ..support.hub_server import COMMIT, MODEL, Answer, HubServer, Request, serving

SHAPE = Shape(2, 16, 4, 1024, 768, 8, 2, 32, 256)
KEPT = [1, 2, 6, 11]
SHARDS = 3
HEADERS = SHARDS * 32 * 1024
"""The starts of the shards, in which their headers lie."""

Capture = pytest.CaptureFixture[str]


def keep(model: object) -> Plan:
    return plan_keeping(KEPT, model)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published") / "model", SHAPE, shards=SHARDS)


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(published) as server:
        server.use(tmp_path / "cache", monkeypatch)
        yield server


def snapshot(tmp_path: Path, published: Path, *names: str) -> Path:
    """The files `names` (none: all) of the model in the hub's cache, as huggingface_hub lays them out."""
    home = tmp_path / "cache" / "models--owner--model"
    folder = home / "snapshots" / COMMIT
    for part in (folder, home / "blobs", home / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for file in published.iterdir():
        if not names or file.name in names:
            blob = home / "blobs" / sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            (folder / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return folder


def size_of(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names)


SIDE_FILES = ("README.md", "chat_template.jinja", "generation_config.json", "config.json")


def expected_bytes(published: Path, out: Path) -> int:
    """Kept tensors, headers, and the files next to them."""
    with Checkpoint.open(out) as pruned:
        return pruned.nbytes + HEADERS + size_of(published, *SIDE_FILES, "model.safetensors.index.json")


# --- output and bytes


def test_the_output_is_that_of_the_downloaded_model_for_the_bytes_of_the_kept_experts(
    hub: HubServer, published: Path, tmp_path: Path
) -> None:
    said: list[Fetch] = []
    prune(MODEL, tmp_path / "remote", keep, on_fetch=said.append)
    fetched = hub.total
    hub.forget()
    prune(snapshot(tmp_path, published), tmp_path / "local", keep)
    assert hub.requests == []
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")

    expected = expected_bytes(published, tmp_path / "remote")
    routers = SHAPE.layers * SHAPE.experts * SHAPE.hidden * 2  # read once more, for the model's identity
    assert abs(fetched - expected) <= 0.01 * expected + routers
    assert fetched < 0.45 * size_of(published, *os.listdir(published))
    (fetch,) = said
    assert fetch.name == f"{MODEL}@{COMMIT}"
    assert abs(fetch.nbytes - fetched) <= 0.01 * fetched + HEADERS + routers
    manifest = json.loads((tmp_path / "remote" / "surgery.json").read_text())
    assert manifest["source"]["base_model"] == MODEL
    assert manifest["source"]["revision"] == COMMIT


def test_files_in_the_cache_are_not_fetched(hub: HubServer, published: Path, tmp_path: Path) -> None:
    names = ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"]
    prune(published, tmp_path / "local", keep)
    snapshot(tmp_path, published, *names)
    said: list[Fetch] = []
    prune(MODEL, tmp_path / "mixed", keep, on_fetch=said.append)
    assert not set(names) & set(hub.sent)
    assert hub.sent["model-00001-of-00003.safetensors"] > 1_000_000
    whole, mixed = contents(tmp_path / "local"), contents(tmp_path / "mixed")
    assert {name for name in whole if whole[name] != mixed[name]} <= {"surgery.json", "README.md"}
    assert abs(said[0].nbytes - hub.total) <= 0.02 * hub.total + HEADERS


def test_inspecting_costs_headers_only(hub: HubServer, published: Path) -> None:
    remote, local = inspect(MODEL).as_dict(), inspect(published).as_dict()
    assert remote.pop("path") == f"{MODEL}@{COMMIT}"
    local.pop("path")
    assert remote == local
    assert hub.total <= HEADERS + size_of(published, "config.json", "model.safetensors.index.json")


@pytest.mark.parametrize("store", ["bf16", "f32"])
def test_a_conversion_fetches_every_expert_once(hub: HubServer, tmp_path: Path, store: str) -> None:
    prune(hub.folder, tmp_path / "local", keep, store=store, card=False)
    said: list[Fetch] = []
    prune(MODEL, tmp_path / "remote", keep, store=store, card=False, on_fetch=said.append)
    whole, remote = contents(tmp_path / "local"), contents(tmp_path / "remote")
    assert {name for name in whole if whole[name] != remote[name]} == {"surgery.json"}
    assert hub.total <= 1.01 * said[0].nbytes + 2 * HEADERS


def test_an_export_is_that_of_the_files(hub: HubServer, tmp_path: Path) -> None:
    export_gguf(hub.folder, tmp_path / "local.gguf", tokenizer=False, name="x")
    said: list[Fetch] = []
    export_gguf(MODEL, tmp_path / "remote.gguf", tokenizer=False, name="x", on_fetch=said.append)
    assert (tmp_path / "remote.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
    assert hub.total <= 1.01 * said[0].nbytes + HEADERS + 10_000


def test_verification_against_a_remote_source(hub: HubServer, tmp_path: Path) -> None:
    prune(hub.folder, tmp_path / "out", keep)
    hub.forget()
    assert verify_checkpoint(tmp_path / "out", source=MODEL).ok
    assert hub.total < 1.02 * size_of(tmp_path / "out", *os.listdir(tmp_path / "out")) + HEADERS
    hub.fault = lambda request: Answer(404) if request.host == "storage" else None
    with pytest.raises(NetworkError, match="HTTP 404"):
        verify_checkpoint(tmp_path / "out", source=MODEL)


# --- faults during a run


def has_journal(out: Path) -> bool:
    """Whether something of `out` is in its journal."""
    return any(journal.stat().st_size for journal in out.parent.glob(f".{out.name}.partial-*/.journal"))


def after_a_shard(hub: HubServer, out: Path, then: Callable[[Request], Answer | None]) -> None:
    """Once a shard of `out` is in the journal, the storage answers as `then` says."""

    def fault(request: Request) -> Answer | None:
        if (request.host, request.method) != ("storage", "GET"):
            return None
        return then(request) if has_journal(out) else None

    hub.fault = fault


def after(hub: HubServer, count: int, then: Callable[[Request], Answer | None]) -> None:
    """From its `count`-th GET on, the storage answers as `then` says."""
    lock, seen = threading.Lock(), [0]

    def fault(request: Request) -> Answer | None:
        if (request.host, request.method) != ("storage", "GET"):
            return None
        with lock:
            seen[0] += 1
        return then(request) if seen[0] >= count else None

    hub.fault = fault


def test_a_file_that_changes_during_the_run_is_an_error_and_leaves_nothing(
    hub: HubServer, tmp_path: Path
) -> None:
    after(hub, 6, lambda request: Answer(headers={"ETag": '"another"'}))
    with pytest.raises(InvalidInputError, match=r"\.safetensors: changed while it was being read"):
        prune(MODEL, tmp_path / "out", keep)
    assert os.listdir(tmp_path) == []


def test_a_commit_that_is_gone_at_the_end_is_an_error(hub: HubServer, tmp_path: Path) -> None:
    def fault(request: Request) -> Answer | None:
        heads = sum(r.method == "HEAD" and r.path.endswith(".safetensors") for r in hub.requests)
        gone = {"X-Error-Code": "RevisionNotFound"}
        return Answer(404, gone) if request.method == "HEAD" and heads > SHARDS else None

    hub.fault = fault
    with pytest.raises(Exception, match="has no revision"):
        prune(MODEL, tmp_path / "out", keep)
    assert not (tmp_path / "out").exists()


def test_a_run_on_a_bad_network_gives_the_same_output(
    hub: HubServer, published: Path, tmp_path: Path
) -> None:
    numbers = iter(range(10_000))

    def fault(request: Request) -> Answer | None:
        if request.host != "storage":
            return None
        number = next(numbers)
        answers = [Answer(429, {"Retry-After": "0"}), Answer(503, {"Retry-After": "0"}), Answer(cut=300_000)]
        return answers[number // 2 % 3] if number % 2 else None

    hub.fault = fault
    prune(MODEL, tmp_path / "remote", keep)
    hub.fault = lambda request: None
    prune(snapshot(tmp_path, published), tmp_path / "local", keep)
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")


OPTIONS = {"max_shard_size": 1_500_000}


def todo_bytes(out: Path, partial: Path) -> int:
    """Bytes of the shards that the journal in `partial` does not list."""
    finished = {json.loads(line.rpartition(" ")[0])["name"] for line in journal(partial)}
    assert finished
    return sum(f.stat().st_size for f in out.glob("*.safetensors") if f.name not in finished)


def journal(partial: Path) -> list[str]:
    return (partial / ".journal").read_text().splitlines()


def test_a_lost_network_keeps_the_finished_shards(hub: HubServer, published: Path, tmp_path: Path) -> None:
    prune(published, tmp_path / "local", keep, **OPTIONS)  # type: ignore[arg-type]
    after_a_shard(hub, tmp_path / "out", lambda request: Answer(404))
    with pytest.raises(NetworkError, match="HTTP 404"):
        prune(MODEL, tmp_path / "out", keep, **OPTIONS)  # type: ignore[arg-type]
    (partial,) = tmp_path.glob(".out.partial-*")
    todo = todo_bytes(tmp_path / "local", partial)
    hub.fault = lambda request: None
    hub.forget()
    said: list[Fetch] = []
    result = prune(MODEL, tmp_path / "out", keep, on_fetch=said.append, **OPTIONS)  # type: ignore[arg-type]
    assert result.outcome is not None
    assert result.outcome.bytes_resumed > 0
    extra = HEADERS + SHAPE.layers * SHAPE.experts * SHAPE.hidden * 2 + 100_000
    assert hub.total <= 1.01 * todo + extra
    assert said[0].nbytes <= todo


def test_a_killed_run_is_resumed_without_fetching_again(
    hub: HubServer, published: Path, tmp_path: Path
) -> None:
    out, environment = tmp_path / "out", hub.environment(tmp_path / "cache")
    command: list[str | Path] = ["prune", MODEL, out, "--keep", "1,2,6,11", "--max-shard-size", "1.5MB"]
    prune(snapshot(tmp_path / "as", published), tmp_path / "local", keep, **OPTIONS)  # type: ignore[arg-type]
    process = start(*command, env=environment)

    def kill(_: Request) -> Answer:
        os.kill(process.pid, signal.SIGKILL)
        return Answer(503)

    after_a_shard(hub, out, kill)
    assert ended(process).code == -signal.SIGKILL
    (partial,) = tmp_path.glob(".out.partial-*")
    todo = todo_bytes(tmp_path / "local", partial)
    hub.fault = lambda request: None
    hub.forget()
    assert "resumed: kept" in done(run(*command, env=environment)).err
    assert hub.total <= 1.01 * todo + HEADERS + SHAPE.layers * SHAPE.experts * SHAPE.hidden * 2 + 100_000
    assert contents(out) == contents(tmp_path / "local")
    assert siblings(out) == []


def lose_storage(hub: HubServer, after: float, journal_of: Path | None = None) -> None:
    """The storage answers 404 after `after` bytes, and not before the output `journal_of` has a journal."""

    def fault(request: Request) -> Answer | None:
        if request.host != "storage" or hub.total <= after:
            return None
        limit = time.monotonic() + PATIENCE
        while journal_of is not None and not has_journal(journal_of) and time.monotonic() < limit:
            time.sleep(0.001)
        return Answer(404)

    hub.fault = fault


def test_a_run_is_resumed_within_a_shard(
    hub: HubServer, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_surgery.surgery.run.FETCHED_SEGMENT_BYTES", CHUNK_BYTES)
    prune(published, tmp_path / "local", keep)
    shard = max((tmp_path / "local").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    lose_storage(hub, 0.8 * shard.stat().st_size, tmp_path / "out")
    with pytest.raises(NetworkError, match="HTTP 404"):
        prune(MODEL, tmp_path / "out", keep)
    (partial,) = tmp_path.glob(".out.partial-*")
    entries = [json.loads(line.rpartition(" ")[0]) for line in journal(partial)]
    begun = max(entry["bytes"] for entry in entries if entry["name"] == f".{shard.name}.tmp")
    assert begun % CHUNK_BYTES == 0
    done_before = begun + sum(
        (tmp_path / "local" / entry["name"]).stat().st_size for entry in entries if "bytes" not in entry
    )
    todo = sum(f.stat().st_size for f in (tmp_path / "local").glob("*.safetensors")) - done_before

    hub.fault = lambda request: None
    # What the unfinished file takes on the disk is not asked for again, and a full disk does not cost it.
    with pytest.raises(DiskFullError, match="needs") as refusal:
        prune(MODEL, tmp_path / "out", keep, ops=SmallDisk(0))
    (asked,) = re.findall(r"needs ([\d,]+) bytes", str(refusal.value))
    needed = int(asked.replace(",", ""))
    assert needed < 100_000 < todo
    hub.forget()
    announced: list[Fetch] = []
    result = prune(MODEL, tmp_path / "out", keep, on_fetch=announced.append, ops=SmallDisk(needed))
    assert result.outcome is not None
    assert result.outcome.bytes_resumed == done_before
    assert result.outcome.bytes_written == todo
    routers = SHAPE.layers * SHAPE.experts * SHAPE.hidden * 2  # read once more, for the model's identity
    small = HEADERS + routers + size_of(published, *SIDE_FILES, "model.safetensors.index.json")
    assert todo <= hub.total <= 1.01 * todo + small
    assert todo - HEADERS <= announced[0].nbytes <= todo + small
    names = {f.name for f in (tmp_path / "local").iterdir()} - {"surgery.json", "README.md"}
    for name in names:  # these two name the source
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_what_is_converted_is_resumed_after_whole_shards(
    hub: HubServer, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_surgery.surgery.run.FETCHED_SEGMENT_BYTES", CHUNK_BYTES)
    lose_storage(hub, 6_000_000)
    with pytest.raises(NetworkError, match="HTTP 404"):
        prune(MODEL, tmp_path / "out", keep, store="bf16")
    (partial,) = tmp_path.glob(".out.partial-*")
    assert not [name for name in os.listdir(partial) if name.endswith(".tmp")]


# --- the command line


def test_prune_says_beforehand_what_it_fetches(hub: HubServer, tmp_path: Path, capsys: Capture) -> None:
    command = ["prune", MODEL, str(tmp_path / "out"), "--keep", "1,2,6,11"]
    planned = done(call(capsys, *command, "--dry-run", "--json")).json()["bytes_to_fetch"]
    assert "to fetch: " in done(call(capsys, *command, "--dry-run")).out
    before = hub.total
    printed = done(call(capsys, *command)).err
    assert f"of {MODEL}@{COMMIT}" in printed.splitlines()[0]
    assert printed.startswith("fetching ")
    assert 0 < hub.total - before - planned < 0.02 * planned + HEADERS
    assert done(call(capsys, "verify", tmp_path / "out", "--source", MODEL)).out.endswith("read)\n")


def test_a_model_that_cannot_be_had_is_one_line(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such model" in refused(call(capsys, "inspect", "owner/other"), 5)
    assert "has no revision no-such" in refused(call(capsys, "inspect", f"{MODEL}@no-such"), 5)
    hub.gated = True
    message = refused(call(capsys, "prune", MODEL, tmp_path / "out", "--keep", "1"), 5)
    assert f"access is restricted; ask for it at {hub.url}/{MODEL}" in message
    hub.gated, hub.private = False, True
    assert done(call(capsys, "inspect", MODEL)).out
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "if it is private, log in" in refused(call(capsys, "inspect", MODEL), 5)
    hub.private = False
    hub.fault = lambda request: Answer(429, {"Retry-After": "3000"})
    assert "limits requests (HTTP 429)" in refused(call(capsys, "inspect", MODEL), 5)
    hub.fault = lambda request: Answer(ignore_range=True)
    assert "does not support range requests" in refused(call(capsys, "inspect", MODEL), 5)


def test_without_a_network_is_one_line(
    tmp_path: Path, published: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = HubServer(published)
    server.close()
    server.use(tmp_path / "cache", monkeypatch)
    message = refused(call(capsys, "inspect", MODEL), 5)
    assert f"{server.url} cannot be reached" in message


def test_offline_nothing_is_asked(hub: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(call(capsys, "inspect", MODEL), 5)
    assert "not in the local hub cache" in message
    with pytest.raises(Exception, match="HF_HUB_OFFLINE is set"):
        HubFolder(MODEL)
    assert hub.requests == []


def test_a_folder_and_the_cache_win_over_the_hub(
    hub: HubServer, published: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(tmp_path, published)
    assert done(call(capsys, "inspect", MODEL, "--json")).json()["path"].endswith(f"snapshots/{COMMIT}")
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / MODEL, Shape(experts=7))
    assert done(call(capsys, "inspect", MODEL, "--json")).json()["experts"] == 7
    assert hub.requests == []


@pytest.mark.parametrize("lacking", ["README.md", "model-00002-of-00003.safetensors"])
def test_what_huggingface_hub_downloaded_is_used(
    hub: HubServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """All weights: offline too. All but a shard: only that shard is fetched."""
    from huggingface_hub import snapshot_download

    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    snapshot_download(MODEL, ignore_patterns=[lacking], max_workers=1)
    hub.forget()
    ended = done(call(capsys, "prune", MODEL, tmp_path / "out", "--keep", "1,2,6,11"))
    if lacking == "README.md":
        assert hub.requests == []
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert done(call(capsys, "inspect", MODEL)).out
    else:
        assert set(hub.sent) == {lacking}
        assert ended.err.startswith("fetching ")


def test_running_a_model_names_the_download_that_it_needs(hub: HubServer, capsys: Capture) -> None:
    pytest.importorskip("torch")
    from moe_surgery.errors import OutputError
    from moe_surgery.runtime.load import load_model

    with pytest.raises(OutputError, match=f"download it first: hf download {MODEL} --revision {COMMIT}"):
        load_model(MODEL)
