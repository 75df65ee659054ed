"""What llama.cpp calls the tensors of a block with experts, for all architectures: data, and one function.

Names are those after `blk.N.`. Names decide, never sizes: with 128 experts, Qwen3's attn_q_norm of head size 128
looks like a tensor of experts. Source: llama-arch.cpp, llama-model.cpp and models/ of ggml-org/llama.cpp (0c1e570).
"""

from __future__ import annotations

import re
from typing import Final

from moe_surgery.families.base import Role

__all__ = [
    "BLOCK",
    "CHUNKS",
    "EXPERTS",
    "ROUTER",
    "ROUTER_SLICES",
    "TABLE",
    "expert_role",
    "is_numbered_expert",
    "looks_like_experts",
    "whole_role",
]

BLOCK: Final = re.compile(r"blk\.([0-9]{1,6})\.(.+)")

PROJECTIONS: Final = ("gate", "up", "down", "gate_up")
ROUTER: Final = "ffn_gate_inp.weight"
"""A block with this tensor has experts."""

EXPERTS: Final = {
    **{f"ffn_{p}_exps.weight": Role.EXPERT_WEIGHT for p in PROJECTIONS},
    **{
        f"ffn_{p}_exps.{leaf}": Role.EXPERT_BIAS
        for p in PROJECTIONS
        for leaf in ("bias", "scale", "input_scale")
    },
}
"""Tensors with an entry for every expert along the slowest axis, which are parts of the experts."""

ROUTER_SLICES: Final = (ROUTER, "ffn_gate_inp.bias", "exp_probs_b.bias", "exp_probs_b", "exp_probs_b_vl.bias")
"""Tensors with an entry for every expert along the slowest axis, which choose among them."""

CHUNKS: Final = tuple(f"ffn_{p}_chexps.weight" for p in ("gate", "up", "down"))
"""Grovemoe's: an expert for every group of `experts_per_group` neighbours."""

TABLE: Final = "ffn_gate_tid2eid.weight"
"""DeepSeek-V4's: the values, [vocabulary, top-k], are numbers of experts."""

# Names with "exp" in them, or of the router, that have no entry for every expert.
_WHOLE: Final = re.compile(
    r"ffn_(gate|up|down|gate_up)_shexp\..+|ffn_gate_inp_shexp\..+|ffn_gate_inp\.(scale|input_scale)|"
    r"ffn_norm_exps\..+|(ssm|indexer|attn|vis)_.+"
)
_NUMBERED: Final = re.compile(r"ffn_(gate|up|down)\.[0-9]+\.(weight|bias)")
_LIKE_EXPERTS: Final = re.compile(r"exp(?!and)|^ffn_gate_inp|tid2eid")

_ROLES: Final = (
    (re.compile(r"(token_embd|per_layer_token_embd)\."), Role.EMBEDDING),
    (re.compile(r"output\.(weight|bias)"), Role.UNEMBEDDING),
    (re.compile(r".*_shexp\."), Role.SHARED_EXPERT),
    (re.compile(r".*norm(_[a-z0-9]+)*\.(weight|bias)"), Role.NORM),
    (re.compile(r"(attn|ssm|indexer|shortconv|vis_attn)[_.]"), Role.ATTENTION),
)


def expert_role(rest: str) -> Role | None:
    """The role of a tensor with an entry for every expert; None for any other. `rest` is its name after `blk.N.`."""
    if rest in ROUTER_SLICES:
        return Role.ROUTER
    if rest == TABLE:
        return Role.ROUTING_TABLE
    return Role.EXPERT_WEIGHT if rest in CHUNKS else EXPERTS.get(rest)


def whole_role(name: str) -> Role:
    """The role of a tensor that is copied whole, for sums by part; `name` is the whole one or that in its block."""
    return next((role for pattern, role in _ROLES if pattern.match(name)), Role.OTHER)


def is_numbered_expert(rest: str) -> bool:
    """Whether this tensor holds a single expert, as in Mixtral files before April 2024."""
    return _NUMBERED.fullmatch(rest) is not None


def looks_like_experts(rest: str) -> bool:
    """Whether a tensor that is not known may count experts, so that it is neither cut nor copied."""
    return _LIKE_EXPERTS.search(rest) is not None and _WHOLE.fullmatch(rest) is None
