"""Stored names and values as a transformers model has them, by transformers' own conversion mappings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["Parameters"]


class Parameters:
    """The parameters and persistent buffers of `model`, and how stored tensors become them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.known: dict[str, Tensor] = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self._targets: dict[str, tuple[str, str | None]] = {}
        self._strict = tuple(model._keep_in_fp32_modules_strict or ())

    def target(self, name: str) -> tuple[str, str | None]:
        """The parameter that the stored tensor `name` becomes (of several the first), and the converter's pattern."""
        if name not in self._targets:
            prefix = self._model.base_model_prefix
            found = rename_source_key(name, self._renamings, self._converters, prefix, self.known)
            if found[0] not in self.known and name in self.known:
                found = rename_source_key(name, [], [], prefix, self.known)
            self._targets[name] = found
        return self._targets[name]

    def convert(self, tensors: Mapping[str, Tensor], *, one_expert: bool = False) -> dict[str, Tensor]:
        """Stored `tensors`, all that a parameter is made of, as parameters; those that the model lacks are left out.

        With `one_expert` they are those of one expert, of which a parameter for one is made.
        """
        model = _OneExpert(self._model) if one_expert else self._model
        transforms: dict[str, Any] = {}
        for name, tensor in sorted(tensors.items()):
            target, pattern = self.target(name)
            if target not in self.known:
                continue
            if target not in transforms:
                transforms[target] = (
                    WeightRenaming(name, target)
                    if pattern is None
                    else copy.deepcopy(self._by_pattern[pattern])
                )
            transforms[target].add_tensor(target, name, pattern or name, tensor)
        result: dict[str, Tensor] = {}
        for target, transform in transforms.items():
            converted = transform.convert(target, model=model, config=self._model.config)
            for parameter, value in converted.items():
                result[parameter] = value[0] if isinstance(value, list) else value
        return result

    def kept_in_float32(self, name: str) -> bool:
        """Whether transformers keeps the parameter `name` in float32 in a model of 16 bits."""
        return any(part in name for part in self._strict)

    def set(self, name: str, value: Tensor) -> None:
        """Make `value` the parameter or buffer `name`."""
        module, _, leaf = name.rpartition(".")
        owner: nn.Module = self._model.get_submodule(module)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value


class _OneExpert:
    """`model` to conversions that look at the shape of a stacked parameter, with one expert."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        parameter: Tensor = self._model.get_parameter(name)
        return parameter[:1]
