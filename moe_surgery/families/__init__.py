"""Model families as data: tensor names and roles, the expert axis, config keys."""

from __future__ import annotations

import warnings

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.errors import CheckpointWarning, InvalidInputError
from moe_surgery.families.base import Family, Role
from moe_surgery.families.gpt_oss import GPT_OSS
from moe_surgery.families.model_spec import ModelSpec, ModelTensor, build_model_spec

__all__ = ["FAMILIES", "Family", "ModelSpec", "ModelTensor", "Role", "identify_model"]

FAMILIES: tuple[Family, ...] = (GPT_OSS,)


def identify_model(checkpoint: Checkpoint, families: tuple[Family, ...] = FAMILIES) -> ModelSpec:
    """The `ModelSpec` of `checkpoint`, every tensor's presence, shape and dtype checked.

    `families` are the model families to recognise. Each note is also a CheckpointWarning. Raises
    InvalidInputError where the model type is unknown or config and tensors disagree; a checkpoint of
    another family, class, layout or quantisation is reported as such.
    """
    try:
        model = build_model_spec(checkpoint, families)
    except InvalidInputError as error:
        from moe_surgery.families.unsupported import unsupported_reason

        if (reason := unsupported_reason(checkpoint, families)) is None:
            raise
        raise InvalidInputError(reason) from error
    for note in model.notes:
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    return model
