"""config.json of a catalogue family: counts under any of their names, at the root and in "text_config"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from moe_surgery.checkpoint.text import describe_value
from moe_surgery.errors import InvalidInputError

__all__ = [
    "COUNT_KEYS",
    "GROUP_KEYS",
    "MTP_KEYS",
    "TOP_K_KEYS",
    "count_in",
    "hidden_layers",
    "holders",
    "mtp_layers",
    "optional_count",
    "with_counts",
]

COUNT_KEYS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
GROUP_KEYS: Final = ("n_group", "num_expert_group")
MTP_KEYS: Final = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
LAYER_KEYS: Final = ("num_hidden_layers", "num_layers")
LAYER_LISTS: Final = ("layers_block_type", "hybrid_override_pattern")
NESTED: Final = "text_config"


def holders(config: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """The objects that hold the language model's settings, each with the prefix of its keys in messages."""
    yield "", config
    nested = config.get(NESTED)
    if isinstance(nested, Mapping):
        yield f"{NESTED}.", nested


def count_in(config: Mapping[str, object], keys: tuple[str, ...], where: str) -> tuple[str, int]:
    """The number under any of `keys`, with the key that holds it; every place must agree.

    A list of equal numbers counts as that number. Raises InvalidInputError, naming `where` and the keys, where
    there is none, where two differ, or for something that is not a positive integer.
    """
    found = optional_count(config, keys, where)
    if found is None:
        raise InvalidInputError(f"{where}: {' or '.join(keys)} is missing; add the one that the model reads")
    return found


def optional_count(config: Mapping[str, object], keys: tuple[str, ...], where: str) -> tuple[str, int] | None:
    """The same, None where no key is there or all are null."""
    first: tuple[str, int] | None = None
    for prefix, holder in holders(config):
        for key in keys:
            value = holder.get(key)
            if value is None:
                continue
            number = _number(value)
            if number is None:
                raise InvalidInputError(
                    f"{where}: {prefix}{key} is {describe_value(value)}, not a positive integer"
                )
            if first is not None and number != first[1]:
                raise InvalidInputError(
                    f"{where}: {first[0]} is {first[1]}, but {prefix}{key} is {number}; programs differ in which they "
                    "read: make them equal"
                )
            first = first or (prefix + key, number)
    return first


def hidden_layers(config: Mapping[str, object], where: str) -> int:
    """The number of layers without those for multi-token prediction; the smaller of two keys.

    (LongCat-Flash counts its layers, and its attention blocks, of which a layer has two.)
    Raises InvalidInputError where no key has it.
    """
    found = []
    for _, holder in holders(config):
        found += [len(v) for v in map(holder.get, LAYER_LISTS) if isinstance(v, (list, str)) and v]
    if not found:
        counts = (optional_count(config, (key,), where) for key in LAYER_KEYS)
        found = [count[1] for count in counts if count is not None]
    if not found:
        raise InvalidInputError(f"{where}: {LAYER_KEYS[0]} is missing; add it")
    return min(found)


def mtp_layers(config: Mapping[str, object]) -> int:
    """The number of layers for multi-token prediction that any key counts."""
    values = (holder.get(key) for _, holder in holders(config) for key in MTP_KEYS)
    return max((v for v in values if type(v) is int), default=0)


def with_counts(config: Mapping[str, object], counts: Mapping[tuple[str, ...], int]) -> dict[str, object]:
    """A copy in which every key of `counts` that is there, in every place, holds its number."""

    def edited(holder: Mapping[str, object]) -> dict[str, object]:
        return {key: replaced(key, value) for key, value in holder.items()}

    def replaced(key: str, value: object) -> object:
        if key == NESTED and isinstance(value, Mapping):
            return edited(value)
        number = next((n for keys, n in counts.items() if key in keys), None)
        if number is None or value is None:
            return value
        return [number] * len(value) if isinstance(value, list) else number

    return edited(config)


def _number(value: object) -> int | None:
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        value = value[0]
    return value if type(value) is int and value > 0 else None
