"""Counts in recordings of SGLang (.pt). The one module here that imports torch, when it reads such a file."""

from __future__ import annotations

import io
import pickle
from importlib.util import find_spec
from typing import Any

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.selection.importers.arrays import table_of
from moe_surgery.selection.importers.table import CountTable

__all__ = ["counts_from_sglang"]


def counts_from_sglang(raw: bytes, where: str) -> CountTable:
    """A recording of SGLang's expert distribution recorder in its modes stat and stat_approx: `logical_count` int
    [passes, layers, experts], added up over passes.

    Read by torch with `weights_only`. Raises InvalidInputError, UsageError without torch.
    """
    if find_spec("torch") is None:
        raise UsageError(f"{where}: reading a .pt file needs torch: pip install 'moe-surgery[torch]'")
    import torch

    try:
        content: Any = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInputError(
            f"{where}: not a .pt file that torch reads without running code: {reason}"
        ) from None
    if not isinstance(content, dict):
        raise InvalidInputError(f"{where}: is not a recording of SGLang's expert distribution recorder")
    if "records" in content:
        raise InvalidInputError(
            f"{where}: was recorded in the mode per_token or per_pass, with numbers of replicated experts; record "
            "with --expert-distribution-recorder-mode stat"
        )
    counted = content.get("logical_count")
    if not isinstance(counted, torch.Tensor) or counted.ndim not in (2, 3) or counted.is_floating_point():
        raise InvalidInputError(
            f"{where}: has no logical_count of [passes, layers, experts], as recordings of SGLang in mode stat do"
        )
    array = counted.to(torch.int64).numpy()
    return table_of(array.sum(axis=0) if array.ndim == 3 else array, where)
