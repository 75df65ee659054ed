"""The message with which a checkpoint is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery import inspect
from moe_surgery.errors import InvalidInputError


def refusal(folder: Path) -> str:
    """The one line with which `folder` is refused."""
    with pytest.raises(InvalidInputError) as caught:
        inspect(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert message.isprintable()
    assert caught.value.exit_code == 3
    return message
