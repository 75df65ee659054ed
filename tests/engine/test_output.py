"""Output files written by several threads."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.writer import OutputFile
from moe_surgery.engine.chunks import CHUNK_BYTES
from moe_surgery.engine.output import write_layout
from moe_surgery.engine.producer import Producer
from moe_surgery.engine.spans import Literal
from moe_surgery.surgery.program import OutputShard, OutputTensor

CONTENT = random.Random(0).randbytes(9 * CHUNK_BYTES + 1000)


class SlowOps(FileOps):
    """Writes that take times of their own."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        time.sleep(self._rng.choice((0, 0, 0.01)))
        return super().pwrite(fd, data, offset)


@pytest.mark.parametrize("start", [0, 2 * CHUNK_BYTES])
@pytest.mark.parametrize("seed", range(2))
def test_positions_are_told_in_order_when_all_before_them_is_written(
    tmp_path: Path, start: int, seed: int
) -> None:
    file = OutputFile(tmp_path / "out", SlowOps(seed))
    file.write(memoryview(CONTENT[:start]), 0)
    temporary = OutputFile.temporary(file.path)
    positions: list[int] = []

    def written(position: int) -> None:
        positions.append(position)
        assert temporary.read_bytes()[:position] == CONTENT[:position]

    tensor = OutputTensor("t", "U8", (len(CONTENT),), (Literal(CONTENT),))
    layout = OutputShard("out", b"", (tensor,))
    write_layout(layout, Producer(layout, {}), file, lambda *_: None, start=start, written=written)
    file.publish()
    assert (tmp_path / "out").read_bytes() == CONTENT
    assert positions == [*range(start + CHUNK_BYTES, len(CONTENT), CHUNK_BYTES), len(CONTENT)]
