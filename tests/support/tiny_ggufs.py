"""Tiny GGUF files of mixture-of-experts architectures, with random weights, that llama.cpp loads.

Written with the gguf package. Experts are quantised by it where it can; in other types they are random
blocks whose scales are chosen so that the weights have the usual size. Types of ik_llama.cpp are random
bytes: such a file can be cut, not run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf import quants as gguf_quants

from moe_surgery.checkpoint.gguf.block_types import BY_NAME
from tests.support.gguf_architectures import ARCHITECTURES, Architecture
from tests.support.gguf_parts import NEXTN

__all__ = ["ARCHITECTURES", "LOADABLE_TYPES", "MERGING", "dimensions", "random_tensor", "write_tiny_gguf"]

VOCABULARY = 96
CONTEXT = 256

LOADABLE_TYPES = tuple(
    name for name, t in BY_NAME.items() if t.number < 100 and not re.fullmatch(r"I\d+|F64", name)
)
"""Types of experts with which llama.cpp runs these files."""

MERGING = tuple(name for name, row in ARCHITECTURES.items() if row.merges)
"""Architectures that may store gate and up as one tensor."""

_SCALES: Mapping[str, tuple[int, ...]] = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "Q1_0": (0,),
    "Q2_0": (0,),
}
"""Where a block's F16 scales lie."""


def dimensions(hidden: int, experts: int, top_k: int = 2) -> dict[str, int]:
    """What the words in `gguf_architectures` stand for; no two widths of a matrix are equal."""
    head = hidden // 4
    return {
        "embd": hidden,
        "ff": 2 * hidden,
        "shared": hidden,
        "dense": 3 * hidden,
        "latent": hidden,
        "experts": experts,
        "top_k": top_k,
        "vocab": VOCABULARY,
        "heads": 4,
        "head": head,
        "q": 4 * head,
        "kv": 2 * head,
        "state": 16,
        "q_lora": 48,
        "kv_lora": 64,
        "o_lora": 16,
        "rope": 16,
        "mla_key": 40,
        "mla_value": 24,
    }


def write_tiny_gguf(
    path: Path,
    architecture: str,
    *,
    types: str | Sequence[str] = "Q4_0",
    dense: str = "F32",
    experts: int = 8,
    top_k: int = 2,
    layers: int | None = None,
    hidden: int | None = None,
    merged: bool = False,
    scales: bool = False,
    mtp: int | None = None,
    groups: int | None = None,
    split: int = 1,
    alignment: int | None = None,
    metadata: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Path:
    """Write one, and return its path: of the first file if `split` > 1.

    `types` are taken in turn by the expert weights, in the order of the file; `dense` is the type of other
    matrices. `layers` counts blocks without those of multi-token prediction, `mtp`; the leading dense ones
    come on top unless it is given (hybrids have a fixed number). `hidden` is by default the smallest width that the
    types allow. `merged` stores gate and up as one tensor, `scales` adds `.scale` and `.input_scale` for each expert.
    `metadata` holds further keys.
    """
    row = ARCHITECTURES[architecture]
    if merged and not row.merges:
        raise ValueError(f"{architecture} has no merged gate and up")
    if split > 1 and alignment:
        raise ValueError("the gguf package states the alignment in the first file of a set only")
    kinds = [types] if isinstance(types, str) else list(types)
    hidden = hidden or max(64, *(BY_NAME[name].block_values for name in (*kinds, dense)))
    words = dimensions(hidden, experts, top_k)
    trunk = len(row.pattern) or layers or row.leading_dense + row.layers
    if mtp is None:
        mtp = row.mtp or 0
    elif mtp and row.mtp is None:
        raise ValueError(f"{architecture} has no blocks for multi-token prediction")

    names = _tensors(row, trunk, mtp, merged=merged, scales=scales)
    writer = GGUFWriter(path, architecture, split_max_tensors=-(-len(names) // split) if split > 1 else 0)
    if alignment:
        writer.add_custom_alignment(alignment)
    groups = row.groups if groups is None else groups
    counts = {"block_count": trunk + mtp, "expert_count": experts, "expert_used_count": top_k}
    keys = _keys(row, words, counts, groups=groups, mtp=mtp)
    _add_metadata(writer, architecture, keys, experts, metadata or {})

    turn = 0
    for name, shape in names.items():
        sizes = [_evaluate(word, words) for word in shape.split()][::-1]
        kind = "I32" if "tid2eid" in name else "F32"
        if re.search(r"ffn_(gate|up|down|gate_up)_(ch)?exps\.weight$", name):
            kind = kinds[turn % len(kinds)]
            turn += 1
        elif _is_dense_matrix(name, sizes) and sizes[-1] % BY_NAME[dense].block_values == 0:
            kind = dense
        data = random_tensor(name, sizes, kind, seed)
        # As signed bytes, since the writer then takes shape and type as they are, of types it does not know too.
        writer.add_tensor(name, data.view(np.int8), raw_shape=sizes, raw_dtype=BY_NAME[kind].number)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    files = writer.format_shard_names(path)
    writer.close()
    return files[0]


def _tensors(row: Architecture, trunk: int, mtp: int, *, merged: bool, scales: bool) -> dict[str, str]:
    """Name -> shape, in the order of the file."""
    result = {"token_embd.weight": "embd vocab", "output_norm.weight": "embd", **row.whole}
    if not row.tied:
        result["output.weight"] = "embd vocab"
    for block in range(trunk + mtp):
        plain = not row.recurrent or block % 2 == 1 or block >= trunk
        parts = dict(row.attention if plain else row.recurrent)
        if row.pattern:
            parts = dict(row.pattern[block])
        elif block < row.leading_dense:
            parts.update(row.dense)
        else:
            moe = dict(row.moe)
            if merged:
                del moe["ffn_gate_exps.weight"], moe["ffn_up_exps.weight"]
                moe["ffn_gate_up_exps.weight"] = "embd 2*ff experts"
            if scales:
                for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
                    moe |= dict.fromkeys((f"{name}.scale", f"{name}.input_scale"), "experts")
            parts.update(moe)
        if block >= trunk:
            parts.update(NEXTN)
        result.update({f"blk.{block}.{name}": shape for name, shape in parts.items()})
    return result


def _is_dense_matrix(name: str, shape: Sequence[int]) -> bool:
    return (
        len(shape) > 1
        and name.endswith(".weight")
        and not re.search("ffn_gate_inp|tid2eid|ssm_conv|hc_|_ape", name)
    )


def _keys(
    row: Architecture, words: Mapping[str, int], counts: Mapping[str, int], *, groups: int, mtp: int
) -> dict[str, object]:
    keys: dict[str, object] = {
        "vocab_size": "vocab",
        "context_length": CONTEXT,
        "embedding_length": "embd",
        "feed_forward_length": "ff" if row.experts_are_dense else "dense",
        "attention.head_count": "heads",
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": "head",
        "rope.freq_base": 10000.0,
        **counts,
        **row.keys,
    }
    if row.leading_dense:
        keys["leading_dense_block_count"] = row.leading_dense
    if row.mtp is not None:
        keys["nextn_predict_layers"] = mtp
    if groups:
        keys |= {"expert_group_count": groups, "expert_group_used_count": max(1, groups // 2)}

    def resolved(value: object) -> object:
        if isinstance(value, list):
            return [resolved(item) for item in value]
        return _evaluate(value, words) if isinstance(value, str) else value

    return {name: resolved(value) for name, value in keys.items()}


def _add_metadata(
    writer: GGUFWriter,
    architecture: str,
    keys: Mapping[str, object],
    experts: int,
    more: Mapping[str, object],
) -> None:
    writer.add_name(f"Tiny {architecture}")
    writer.add_size_label(f"{experts}x1M")
    writer.add_quantization_version(2)
    for name, value in {**{f"{architecture}.{name}": value for name, value in keys.items()}, **more}.items():
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
            case _:
                raise TypeError(f"{name}: {value!r}")
    writer.add_tokenizer_model("none")


def _evaluate(words: str, values: Mapping[str, int]) -> int:
    """A sum of products: `2*embd`, `q+2*kv`, `mla_key-rope`, `experts/2`."""
    total = 0
    for sign, term in re.findall(r"([+-]?)([^+-]+)", words):
        product = 1
        for operator, factor in re.findall(r"([*/]?)(\w+)", term):
            value = int(factor) if factor.isdigit() else values[factor]
            product = product // value if operator == "/" else product * value
        total += -product if sign == "-" else product
    return total


def random_tensor(name: str, shape: Sequence[int], kind: str, seed: int = 0) -> np.ndarray:
    """Bytes, uint8 [..., bytes of a row], of a tensor of `shape` (slowest first) in a type."""
    generator = np.random.default_rng([seed, crc32(name.encode())])
    block = BY_NAME[kind]
    wanted = (*shape[:-1], block.row_bytes(shape[-1]))
    number = block.number
    if number <= max(GGMLQuantizationType):
        try:
            if kind == "I32":  # for each token distinct experts, of eight
                return generator.random((shape[0], 8)).argsort(1)[:, : shape[1]].astype("<i4").view(np.uint8)
            values = _values(name, shape, generator)
            if kind in ("F32", "F16"):
                return values.astype("<f4" if kind == "F32" else "<f2").view(np.uint8)
            return gguf_quants.quantize(values, GGMLQuantizationType(number)).view(np.uint8).reshape(wanted)
        except NotImplementedError:
            pass
    return _random_blocks(kind, wanted, shape[-1], generator)


def _values(name: str, shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    noise = generator.standard_normal(shape, dtype=np.float32)
    if name == "rope_freqs.weight":
        return np.ones(shape, np.float32)
    if name.endswith("ssm_a"):
        return -0.5 - np.abs(noise)
    if name.endswith(("_scale", "exps.scale")):
        return np.float32(0.5) + generator.random(shape, dtype=np.float32)
    if ("norm" in name and name.endswith("weight")) or name.endswith("gate_inp.scale"):
        return 1 + noise / 10
    if name.endswith(".bias") or name.endswith("exp_probs_b"):
        return noise / 10
    if name.startswith("token_embd") or name.endswith("attn_sinks.weight"):
        return noise
    strength = 2 if "ffn_gate_inp" in name else 1  # routers that decide
    return noise * np.float32(strength / shape[-1] ** 0.5)


def _random_blocks(
    kind: str, wanted: Sequence[int], columns: int, generator: np.random.Generator
) -> np.ndarray:
    size = BY_NAME[kind].block_bytes
    data = generator.integers(0, 256, tuple(wanted), dtype=np.uint8)
    if kind not in (*_SCALES, "IQ1_M", "NVFP4"):
        return data
    blocks = data.reshape(-1, size)
    _set_scale(kind, blocks, np.ones(len(blocks), "<f2"))
    root = {"Q1_0": 1.0, "Q2_0": 1.5**0.5}.get(kind)
    if root is None:
        sample = gguf_quants.dequantize(blocks[:64], GGMLQuantizationType(BY_NAME[kind].number))
        root = float(np.sqrt(np.mean(np.square(sample, dtype=np.float64))))
    # Not all alike, so that blocks taken from elsewhere show.
    factors = generator.uniform(0.5, 1.5, len(blocks)) / root / columns**0.5
    _set_scale(kind, blocks, factors.astype("<f2"))
    return data


def _set_scale(kind: str, blocks: np.ndarray, scales: np.ndarray) -> None:
    if kind == "IQ1_M":  # the four nibbles of the scale lie in the top ones of four words
        words = blocks[:, 48:].copy().view("<u2")
        bits = scales.view("<u2")[:, None] >> np.array([0, 4, 8, 12], "<u2")
        blocks[:, 48:] = ((words & 0x0FFF) | ((bits & 15) << 12)).astype("<u2").view(np.uint8)
    elif kind == "NVFP4":  # a byte for every 16 values: 4 bits of exponent (bias 7), 3 of mantissa
        exponents = np.floor(np.log2(scales.astype(np.float32))).astype(np.int64)[:, None] + 7
        blocks[:, :4] = np.clip(exponents, 0, 14) * 8 + (blocks[:, :4] & 7)
    else:
        for offset in _SCALES[kind]:
            blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
