"""Model families as data: tensor names and roles, the expert axis, config keys."""

from __future__ import annotations

import warnings

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.errors import CheckpointWarning, InvalidInputError
from moe_surgery.families.base import AnyFamily, CatalogFamily, Family, Role
from moe_surgery.families.catalog import CATALOG
from moe_surgery.families.described import build_model_spec
from moe_surgery.families.gpt_oss import GPT_OSS
from moe_surgery.families.model_spec import ModelSpec, ModelTensor

__all__ = [
    "FAMILIES",
    "AnyFamily",
    "CatalogFamily",
    "Family",
    "ModelSpec",
    "ModelTensor",
    "Role",
    "identify_model",
]

FAMILIES: tuple[AnyFamily, ...] = (GPT_OSS, *CATALOG)


def identify_model(checkpoint: Checkpoint, families: tuple[AnyFamily, ...] = FAMILIES) -> ModelSpec:
    """The `ModelSpec` of `checkpoint`, its tensors checked against its family.

    `families` are the model families to recognise. Each note is also a CheckpointWarning. Raises
    InvalidInputError where the model type is unknown or config and tensors disagree; a checkpoint of
    another family, class, layout or quantisation is reported as such.
    """
    model_type = checkpoint.config.get("model_type")
    if not any(isinstance(f, Family) and f.model_type == model_type for f in families):
        from moe_surgery.families.catalog_spec import build_catalog_spec, find_catalog_family

        if (entry := find_catalog_family(checkpoint, families)) is not None:
            return _with_warnings(build_catalog_spec(checkpoint, entry))
    try:
        return _with_warnings(build_model_spec(checkpoint, families))
    except InvalidInputError as error:
        from moe_surgery.families.unsupported import unsupported_reason

        if (reason := unsupported_reason(checkpoint, families)) is None:
            raise
        raise InvalidInputError(reason) from error


def _with_warnings(model: ModelSpec) -> ModelSpec:
    for note in model.notes:
        warnings.warn(note, CheckpointWarning, stacklevel=3)
    return model
