"""A card put into a finished checkpoint: `verify` holds before and after, and names README.md in between."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from moe_surgery import make_card, plan_keeping, prune, write_card
from moe_surgery.errors import MoeSurgeryError, OutputError, VerificationError
from moe_surgery.surgery.verify import verify_checkpoint
from tests.support.checkpoints import write_checkpoint
from tests.support.command import assert_sound, contents
from tests.support.faults import FaultyOps, open_files

NEW = "# Another card\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.fixture(params=["with a card", "without"])
def out(source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    prune(source, tmp_path / "out", lambda m: plan_keeping([3, 1], m), card=request.param == "with a card")
    return tmp_path / "out"


def test_new_card_is_part_of_the_checkpoint(source: Path, out: Path) -> None:
    before = contents(out)
    assert write_card(out, NEW) == out / "README.md"
    assert (out / "README.md").read_text() == NEW
    assert_sound(out, source)
    after = contents(out)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"README.md", "surgery.json"}
    (out / "README.md").write_text(NEW.replace("A", "B"))
    assert verify_checkpoint(out).problems == (
        f"{out}/README.md: edited or damaged since it was written: its digest does not match the manifest",
    )


def test_card_of_prune_written_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    plan = lambda m: plan_keeping([3, 1], m)  # noqa: E731
    prune(source, tmp_path / "out", plan)
    prune(source, tmp_path / "bare", plan, card=False)
    before = contents(tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "bare"):
        write_card(folder, make_card(folder))
        assert contents(folder) == before


@pytest.mark.parametrize("content", [b"mine", b"", None])
def test_readme_changed_by_hand_is_kept_unless_overwritten(
    source: Path, out: Path, content: bytes | None
) -> None:
    readme = out / "README.md"
    if content is None:
        readme.unlink(missing_ok=True)
        readme.symlink_to(out / "config.json")
    else:
        readme.write_bytes(content)
    before = contents(out)
    with pytest.raises(OutputError, match=r"README.md: was not written by moe-surgery or was edited since"):
        write_card(out, NEW)
    assert contents(out) == before
    write_card(out, NEW, overwrite=True)
    assert_sound(out, source)
    assert not readme.is_symlink()


def test_altered_manifest_is_not_made_whole_by_a_card(out: Path) -> None:
    manifest = out / "surgery.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"mxfp4", b"mxFp4", 1))
    before = contents(out)
    with pytest.raises(VerificationError, match="the manifest was modified"):
        write_card(out, NEW)
    assert contents(out) == before


class Killed(BaseException):
    """The process is gone: nothing cleans up after it."""


class Stopping(FaultyOps):
    """Every call from number `at` on is never made."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._stop, self._seen = at, 0

    def enter(self, kind: str) -> bool:
        self._seen += 1
        if self._seen >= self._stop:
            raise Killed
        return False


def test_killed_at_any_call_leaves_what_verify_accepts_or_names_and_the_next_run_completes(
    source: Path, out: Path
) -> None:
    old, backup = contents(out), out.with_name("backup")
    shutil.copytree(out, backup)
    between = 0
    for at in range(1, 100):
        try:
            write_card(out, NEW, ops=Stopping(at))
        except Killed:
            now = {name: digest for name, digest in contents(out).items() if not name.endswith(".tmp")}
            problems = verify_checkpoint(out).problems
            if now != old and now["surgery.json"] == old["surgery.json"]:
                between += 1
                assert (out / "README.md").read_text() == NEW
                assert [p.partition(": ")[0] for p in problems] == (
                    [f"{out}/README.md"] if "README.md" in old else []
                )
            else:
                assert problems == ()
            write_card(out, NEW)
            assert_sound(out, source)
            shutil.rmtree(out)
            shutil.copytree(backup, out)
            continue
        assert between > 0
        assert_sound(out, source)
        return
    pytest.fail("never ran to its end")


CALLS = {"open", "pwrite", "fsync", "fsync_dir", "rename", "close", "unlink"}


def test_the_system_calls_of_a_card(out: Path) -> None:
    """Those that the next test lets fail, and no others."""
    ops = FaultyOps()
    write_card(out, NEW, ops=ops)
    assert set(ops.calls) == CALLS


@pytest.mark.parametrize("kind", sorted(CALLS - {"unlink"}))
def test_failure_of_any_system_call_is_one_line_and_leaves_no_half_file(
    source: Path, out: Path, kind: str
) -> None:
    failed = 0
    for at in range(1, 20):
        ops = FaultyOps(kind, at, errno.EIO)
        before = open_files(out)
        error: MoeSurgeryError | None = None
        try:
            write_card(out, f"{NEW}{at}\n", ops=ops, overwrite=True)
        except MoeSurgeryError as caught:
            error = caught
        if error is not None:
            failed += 1
            assert isinstance(error, OutputError)
            assert str(out) in str(error)
            assert len(str(error).splitlines()) == 1
        assert open_files(out) == before
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
        assert all("README.md" in p or "surgery.json" in p for p in verify_checkpoint(out).problems)
        if not ops.failures:
            break
    assert failed > 0
    assert_sound(out, source)


def test_what_a_killed_run_left_and_nobody_may_remove(out: Path) -> None:
    """The leftover cannot be unlinked: one line, and the card is as it was."""
    (out / ".README.md.tmp").write_text("half")
    before = contents(out)
    with pytest.raises(OutputError, match=r"\.README\.md\.tmp: cannot remove"):
        write_card(out, NEW, ops=FaultyOps("unlink", 1, errno.EACCES), overwrite=True)
    assert contents(out) == before
