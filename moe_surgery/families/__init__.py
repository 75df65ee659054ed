"""What model families call their tensors, where experts lie in them, and which config keys count them."""

from __future__ import annotations

import warnings

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.errors import CheckpointWarning, InvalidInputError
from moe_surgery.families.base import Family, Role
from moe_surgery.families.foreign import foreign
from moe_surgery.families.gpt_oss import GPT_OSS
from moe_surgery.families.model_spec import ModelSpec, ModelTensor, build_model_spec

__all__ = ["FAMILIES", "Family", "ModelSpec", "ModelTensor", "Role", "identify_model"]

FAMILIES: tuple[Family, ...] = (GPT_OSS,)


def identify_model(checkpoint: Checkpoint, families: tuple[Family, ...] = FAMILIES) -> ModelSpec:
    """The `ModelSpec` that `checkpoint` holds, every tensor's presence, shape and dtype checked.

    `families` are those that it may be of. Each of its notes is also a CheckpointWarning. Raises
    InvalidInputError where the model type is unknown or config and tensors disagree; a checkpoint of
    another family, class, layout or quantisation is named as such.
    """
    try:
        model = build_model_spec(checkpoint, families)
    except InvalidInputError as error:
        if (instead := foreign(checkpoint, families)) is None:
            raise
        raise InvalidInputError(instead) from error
    for note in model.notes:
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    return model
