"""How a catalogue family's tensors are stored: their role by name, and the number format of experts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Final

from moe_surgery.checkpoint.checkpoint import TensorRef
from moe_surgery.checkpoint.text import printable
from moe_surgery.families.base import Role
from moe_surgery.families.catalog_config import holders
from moe_surgery.families.model_spec import ModelTensor
from moe_surgery.formats.expert_format import AS_STORED, ExpertFormat, format_of_dtype

__all__ = ["format_of", "packed_bits", "role_of", "values_of"]

_FLOATS: Final = frozenset({"BF16", "F16", "F32"})
_FLOAT8: Final = frozenset({"F8_E4M3", "F8_E5M2"})
_ROLES: Final = (
    (re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|embed|embeddings)\.weight$"), Role.EMBEDDING),
    (re.compile(r"(^|\.)(lm_head|output|head)\.weight$"), Role.UNEMBEDDING),
    (re.compile(r"share[d]?_(expert|mlp|w13|w2)"), Role.SHARED_EXPERT),
    (re.compile(r"(^|\.)[a-z0-9_]*norm[a-z0-9_]*\.(weight|bias)$"), Role.NORM),
    (re.compile(r"(^|\.)(self_attn|attn|attention|linear_attn|mamba)\."), Role.ATTENTION),
)
# Last parts of the names of a quantised weight's scales and the like, which are not weights.
_SCALES: Final = re.compile(
    r"(scale|scale_inv|scales|scale_2|qzeros|zero_point|g_idx|weight_shape|suh|svh|mcg|mul1|input_scale)$"
)


def role_of(name: str) -> Role:
    """The role of a tensor that does not count experts, for sums by part."""
    return next((role for pattern, role in _ROLES if pattern.search(name)), Role.OTHER)


def values_of(leaf: str, ref: TensorRef, config: Mapping[str, object]) -> int | None:
    """The weights in a tensor of one expert, or of a stacked one; None: as many as elements."""
    if _SCALES.search(leaf):
        return 0
    if ref.dtype in _FLOATS or ref.dtype in _FLOAT8:
        return None
    elements = prod(ref.shape)
    if ref.dtype in ("I32", "U32"):
        return elements * 32 // packed_bits(config)
    if ref.dtype in ("U8", "I8") and leaf.endswith(("weight", "weight_packed", "_blocks")):
        return elements * 2  # two FP4 codes a byte
    if leaf.endswith("trellis") and len(ref.shape) == 3:
        return ref.shape[0] * ref.shape[1] * 256  # tiles of 16 x 16
    return None


def format_of(config: Mapping[str, object], tensors: Iterable[ModelTensor]) -> ExpertFormat:
    """The format of expert weights: a dense one, or `AS_STORED` with a label for people."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.role is Role.EXPERT_WEIGHT and tensor.values != 0:
            sizes[tensor.stored.dtype] += tensor.nbytes
    ordered = [dtype for dtype, _ in sizes.most_common()]
    dense = format_of_dtype(ordered[0]) if len(ordered) == 1 else None
    if dense is not None:
        return dense
    method = _method(config)
    return AS_STORED._replace(label=" and ".join(ordered) + (f" ({method})" if method else ""))


def _quantization(config: Mapping[str, object]) -> Mapping[str, object]:
    for _, holder in holders(config):
        value = holder.get("quantization_config")
        if isinstance(value, Mapping):
            return value
    return {}


def _method(config: Mapping[str, object]) -> str | None:
    quantization = _quantization(config)
    names = [quantization.get(key) for key in ("quant_method", "format", "quant_algo")]
    shown = [printable(name)[:40] for name in names if isinstance(name, str)]
    return ", ".join(dict.fromkeys(shown)) or None


def packed_bits(config: Mapping[str, object]) -> int:
    """Bits of a weight packed in 32-bit words: 4 unless config.json says otherwise."""
    quantization = _quantization(config)
    found = [quantization.get("bits"), quantization.get("w_bit")]
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping):
        found += [
            g["weights"].get("num_bits")
            for g in groups.values()
            if isinstance(g, Mapping) and isinstance(g.get("weights"), Mapping)
        ]
    return next((b for b in found if type(b) is int and 1 <= b <= 16), 4)
