"""Models split over several files: read as one, and refused where the files do not belong together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.checkpoint.local_file import LocalFolder
from moe_surgery.checkpoint.source import Folder
from moe_surgery.errors import InvalidInputError, MoeSurgeryError, OutputError
from tests.support.gguf_bytes import STRING, U8, file, i32, kv, tensor, text, u16, u32
from tests.support.sources import MemoryFolder

ARCH = kv("general.architecture", STRING, text("gpt-oss"))
NAMES = ("a", "b", "c", "d", "e")


def content(name: str) -> bytes:
    return name.encode() * 12


def shard(
    names: Sequence[str],
    number: int,
    count: int,
    total: int = len(NAMES),
    *,
    keys: Sequence[bytes] | None = None,
    alignment: int = 32,
) -> bytes:
    """The file `number` (from 0) of a set with tensors f32 [3] called `names`, as gguf-split writes it."""
    entries = [*([ARCH] if number == 0 else [])]
    entries += keys or [u16("split.no", number), u16("split.count", count), i32("split.tensors.count", total)]
    if alignment != 32:
        entries.append(u32("general.alignment", alignment))
    step = alignment
    rows = [tensor(name, [3], 0, i * step) for i, name in enumerate(names)]
    data = b"".join(content(name) + bytes(step - 12) for name in names)
    return file(entries, rows, data, alignment=alignment)


def write(folder: Path, parts: Sequence[bytes], prefix: str = "model") -> str:
    """Write the files of a set; the name of the first."""
    names = [f"{prefix}-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))]
    for name, raw in zip(names, parts, strict=True):
        (folder / name).write_bytes(raw)
    return names[0]


def opened(folder: Path, name: str) -> GgufModel:
    return GgufModel.open(LocalFolder(folder), name)


def refused(folder: Path, name: str, pattern: str, error: type[MoeSurgeryError] = InvalidInputError) -> None:
    with pytest.raises(error, match=pattern) as caught:
        opened(folder, name)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


THREE = [shard(["a", "b"], 0, 3), shard(["c"], 1, 3), shard(["d", "e"], 2, 3)]


@pytest.mark.parametrize("split", [(5,), (2, 1, 2), (0, 5), (0, 2, 3), (1, 1, 1, 1, 1), (5, 0)])
@pytest.mark.parametrize("alignment", [16, 32, 4096])
def test_a_set_is_one_model(tmp_path: Path, split: tuple[int, ...], alignment: int) -> None:
    rest, parts = list(NAMES), []
    for number, count in enumerate(split):
        parts.append(shard(rest[:count], number, len(split), alignment=alignment))
        rest = rest[count:]
    name = write(tmp_path, parts)
    for folder in (LocalFolder(tmp_path), MemoryFolder(tmp_path)):
        assert_whole(folder, name, parts)


def assert_whole(folder: Folder, name: str, parts: Sequence[bytes]) -> None:
    split = len(parts)
    with GgufModel.open(folder, name) as model:
        assert tuple(model.tensors) == NAMES
        assert len(model.shards) == split
        assert model.nbytes == sum(map(len, parts))
        assert model.value("general.architecture") == "gpt-oss"
        assert model.value("split.count") == split
        assert model.value("no.such.key") is None
        for one in model.tensors.values():
            source = model.shards[one.shard].source
            assert source.read(one.offset, one.nbytes) == content(one.name)


def test_a_file_without_split_keys_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "x-00002-of-00003.gguf").write_bytes(file([ARCH], [tensor("a", [3], 0, 0)], bytes(32)))
    with opened(tmp_path, "x-00002-of-00003.gguf") as model:
        assert list(model.tensors) == ["a"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_set_of_one_may_have_any_name(tmp_path: Path, count: int) -> None:
    (tmp_path / "m.gguf").write_bytes(shard(NAMES, 0, count))
    with opened(tmp_path, "m.gguf") as model:
        assert tuple(model.tensors) == NAMES


def test_a_missing_file(tmp_path: Path) -> None:
    name = write(tmp_path, THREE)
    (tmp_path / "model-00003-of-00003.gguf").unlink()
    refused(
        tmp_path, name, r"model-00003-of-00003\.gguf: not found; the model is split over 3 files", OutputError
    )


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    name = write(tmp_path, [*THREE[:2], THREE[2][:-40]])
    refused(tmp_path, name, r"00003-of-00003\.gguf: tensor 'e' ends at byte .* cut off; download it again")


def test_another_file_than_the_first(tmp_path: Path) -> None:
    write(tmp_path, THREE)
    refused(
        tmp_path, "model-00002-of-00003.gguf", r"is file 2 of a set of 3; pass model-00001-of-00003\.gguf$"
    )


def test_a_first_file_that_was_renamed(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(THREE[0])
    refused(tmp_path, "model.gguf", "the first of 3 files, so its name must end in -00001-of-00003.gguf")
    (tmp_path / "model-00001-of-00004.gguf").write_bytes(THREE[0])
    refused(tmp_path, "model-00001-of-00004.gguf", "its name must end in -00001-of-00003.gguf")
    (tmp_path / "other.gguf").write_bytes(THREE[1])
    refused(tmp_path, "other.gguf", "is file 2 of a set of 3; pass the first one")


def test_files_in_the_wrong_order(tmp_path: Path) -> None:
    name = write(tmp_path, [THREE[0], THREE[2], THREE[1]])
    refused(tmp_path, name, r"00002-of-00003\.gguf: key 'split\.no' is 2, expected 1: it does not belong")


def test_a_file_of_another_model(tmp_path: Path) -> None:
    for other, pattern in [
        (shard(["x", "d"], 2, 3, total=9), r"key 'split\.tensors\.count' is 9, expected 5: it does not"),
        (shard(["d", "e"], 2, 4), r"key 'split\.count' is 4, expected 3"),
        (shard(["a", "d"], 2, 3), r"tensor 'a' is also in model-00001-of-00003\.gguf"),
        (shard(["d"], 2, 3), r"'split\.tensors\.count' is 5, but the 3 files of the set have 4 tensors"),
        (shard(["d", "e"], 2, 3, alignment=64), "has alignment 64, model-00001-of-00003.gguf has 32"),
        (file([ARCH], [tensor("d", [3], 0, 0)], bytes(32)), r"key 'split\.no' is missing, expected 2"),
    ]:
        refused(tmp_path, write(tmp_path, [*THREE[:2], other]), pattern)


def test_keys_that_llama_cpp_cannot_read(tmp_path: Path) -> None:
    number, count, total = u16("split.no", 0), u16("split.count", 3), i32("split.tensors.count", 5)
    for keys, pattern in [
        ([number, u32("split.count", 3), total], r"key 'split\.count' is of type u32, llama.cpp needs u16"),
        ([kv("split.no", U8, b"\0"), count, total], r"key 'split\.no' is of type u8, llama.cpp needs u16"),
        ([number, count, u32("split.tensors.count", 5)], "is of type u32, llama.cpp needs i32"),
        ([count, total], r"has key 'split\.count' but not 'split\.no'"),
        ([number, count], r"has key 'split\.count' but not 'split\.tensors\.count'"),
    ]:
        refused(tmp_path, write(tmp_path, [shard(["a", "b"], 0, 3, keys=keys), *THREE[1:]]), pattern)


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    name = write(tmp_path, [*THREE[:2], shard(["a", "d"], 2, 3)])
    fds = Path("/proc/self/fd")
    if not fds.exists():
        pytest.skip("reads /proc")
    before = len(list(fds.iterdir()))
    refused(tmp_path, name, "is also in")
    assert len(list(fds.iterdir())) == before


def test_llama_cpp_reads_and_refuses_the_same_sets(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    gguf_split(tmp_path)

    def loads(folder: Path, name: str) -> bool:
        try:
            llama_cpp.Llama(str(folder / name), vocab_only=True, verbose=False).close()
        except ValueError:
            return False
        return True

    first, second, third = sorted(path.name for path in tmp_path.glob("tiny-*"))
    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda folder: None, first),
        (lambda folder: None, second),
        (lambda folder: (folder / third).unlink(), first),
        (lambda folder: shutil.copy(folder / second, folder / third), first),
        (lambda folder: (folder / first).rename(folder / "tiny.gguf"), "tiny.gguf"),
    ]
    for number, (prepare, passed) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in (first, second, third):
            shutil.copy(tmp_path / name, folder)
        prepare(folder)
        try:
            opened(folder, passed).close()
            ours = True
        except MoeSurgeryError:
            ours = False
        assert loads(folder, passed) == ours == (number == 0)


def gguf_split(folder: Path) -> None:
    """Write the bundled model to `folder` as three files, put together from an export of one."""
    from moe_surgery import export_gguf

    export_gguf("example:tiny", folder / "whole.gguf")
    with opened(folder, "whole.gguf") as model:
        raw = (folder / "whole.gguf").read_bytes()
        names = list(model.tensors)
        entries = [raw[entry.offset : entry.end] for entry in model.metadata.values()]
        parts = []
        for number, chosen in enumerate((names[:30], names[30:50], names[50:])):
            rows, data = [], b""
            for name in chosen:
                one = model.tensors[name]
                rows.append(tensor(name, tuple(reversed(one.shape)), one.type.number, len(data)))
                data += raw[one.offset : one.offset + one.nbytes]
                data += bytes(-len(data) % 32)
            keys = [u16("split.no", number), u16("split.count", 3), i32("split.tensors.count", len(names))]
            parts.append(file([*(entries if number == 0 else []), *keys], rows, data))
    write(folder, parts, "tiny")
