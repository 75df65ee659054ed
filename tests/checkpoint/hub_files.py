"""The files of a model that `hub` in conftest.py serves, and reading them."""

from __future__ import annotations

import random

from moe_surgery.checkpoint.hub_folder import HubFolder
from moe_surgery.checkpoint.source import ByteSource

from ..support.hub_server import MODEL, Answer, Fault, Request

CONTENT = random.Random(5).randbytes(3_000_001)
SHARD = "model.safetensors"
PART = (100_000, 700_000)
"""A range beyond the start of the file."""


def folder_of(revision: str | None = None) -> HubFolder:
    return HubFolder(MODEL, revision)


def read(source: ByteSource, begin: int = PART[0], end: int = PART[1]) -> None:
    """Read [begin, end) and compare."""
    assert source.read(begin, end - begin) == CONTENT[begin:end]


def first(count: int, answer: Answer, method: str = "GET") -> Fault:
    """A fault: the first `count` requests to the storage (HEAD: to the hub) get `answer`."""
    host = "storage" if method == "GET" else "hub"
    left = [count]

    def fault(request: Request) -> Answer | None:
        if request.host == host and request.method == method and left[0]:
            left[0] -= 1
            return answer
        return None

    return fault
