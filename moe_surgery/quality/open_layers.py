"""Opens a checkpoint of any family to go through it layer by layer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.source import Folder
from moe_surgery.errors import UsageError
from moe_surgery.families import FAMILIES, AnyFamily, Family, ModelSpec, identify_model
from moe_surgery.quality.layers import LayerModel
from moe_surgery.quality.own_layers import OwnLayers
from moe_surgery.runtime.device import open_device
from moe_surgery.runtime.load import DTYPES, check_on_disk, load_model
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import check_top_k

if TYPE_CHECKING:
    from moe_surgery.quality.transformers_layers.model import TransformersModel

__all__ = ["open_layers", "open_with_transformers"]


def open_layers(
    path: PathLike | Folder,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
    top_k: int | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
) -> LayerModel:
    """The model in `path`, one layer of which is in memory at a time.

    A family that the runtime runs goes through its kernels; arguments are those of `load_model`. Any other goes
    through the modules of the transformers package, which is needed for that; `dtype` is then float32 on the CPU and
    bfloat16 elsewhere unless given, and `backend` must be None.

    Raises as `load_model`; UsageError where transformers is missing.
    """
    with Checkpoint.open(path) as checkpoint:
        spec = identify_model(checkpoint, families)
    if isinstance(spec.family, Family):
        model = load_model(
            path, device, dtype, backend=backend, top_k=top_k, one_layer=True, families=families
        )
        return OwnLayers(model)
    if backend is not None:
        raise UsageError(
            f"`backend` {backend}: {spec.family.title} runs on transformers' own modules; leave the option out"
        )
    return open_with_transformers(path, device, dtype, top_k=top_k, families=families)


def open_with_transformers(
    path: PathLike | Folder,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    top_k: int | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
) -> TransformersModel:
    """As `open_layers`, with transformers' modules for every family."""
    try:
        from moe_surgery.quality.transformers_layers.model import TransformersModel
    except ImportError:
        raise UsageError(
            "this family runs on the transformers package: pip install 'moe-surgery[transformers]'"
        ) from None
    torch_device = open_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"`dtype` {dtype}: choose one of {', '.join(map(str, DTYPES))}")
    chosen = dtype or (torch.float32 if torch_device.type == "cpu" else torch.bfloat16)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(path))
        check_on_disk(checkpoint)
        spec: ModelSpec = identify_model(checkpoint, families)
        if top_k is not None:
            check_top_k(top_k, spec.experts, f"{path} has")
        model = TransformersModel(checkpoint, spec, torch_device, chosen, top_k)
        if any(shard.source.map() is None for shard in checkpoint.shards.values()):
            stack.pop_all()  # layers are yet to be read
        return model
