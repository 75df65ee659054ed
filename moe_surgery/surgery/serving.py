"""Known limits of serving engines for a pruned checkpoint."""

from __future__ import annotations

from moe_surgery.formats.expert_format import MXFP4, ExpertFormat

__all__ = ["LLAMA_CPP_COUNTS", "fast_counts", "llama_cpp_notes", "serving_notes"]

# Expert counts for which vLLM and SGLang build their fused routers (vLLM issues 50982 and 51521,
# SGLang issues 5461 and 6946); other counts take an unfused path or fail.
FUSED_ROUTER_COUNTS = frozenset({1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512})
PARALLEL_SIZES = (2, 4, 8)
# vLLM's router of DeepSeek-V4 refuses other counts (vLLM issue 50982).
ONLY_COUNTS = {
    "deepseek_v4": frozenset({1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576}),
}
# What llama.cpp's CUDA kernels were built for (topk-moe.cu, mmid.cu); its Metal ones (mul_mm.metal) for other top-k.
LLAMA_CPP_COUNTS = frozenset({1, 2, 4, 8, 16, 32, 64, 128, 256, 288, 512, 576})
LLAMA_CPP_CUDA_TOP_K = frozenset({2, 4, 6, 8, 10, 16, 32})
LLAMA_CPP_METAL_TOP_K = frozenset({1, 2, 4, 5, 6, 8, 10, 16, 22})


def fast_counts(
    model_type: str, experts: int, most: int, fused: frozenset[int] | None = None
) -> tuple[int, ...]:
    """The numbers of experts next to `experts`, below and above, that serving engines have fused routers for.

    Empty where `experts` is one; none is above `most`, the model's number. `fused` are those numbers where they are
    not vLLM's and SGLang's.
    """
    counts = ONLY_COUNTS.get(model_type, FUSED_ROUTER_COUNTS) if fused is None else fused
    if experts in counts or experts == most:
        return ()
    below, above = (
        max((n for n in counts if n < experts), default=0),
        min((n for n in counts if n > experts), default=0),
    )
    return tuple(n for n in (below, above) if 0 < n <= most)


def serving_notes(
    experts: int,
    top_k: int,
    source_top_k: int,
    plan_top_k: int | None = None,
    *,
    expert_format: ExpertFormat = MXFP4,
    gpt_oss: bool = True,
    model_type: str = "gpt_oss",
) -> list[str]:
    """One line for each limit that applies to the checkpoint.

    `plan_top_k` is the top-k that the plan sets, None for the source's; `expert_format` is that of the
    checkpoint. `gpt_oss` is whether it is a gpt-oss model, some of whose kernels have further limits.
    """
    notes = []
    if gpt_oss and top_k & (top_k - 1):
        notes.append(
            f"top-k {top_k} is not a power of two: vLLM's gpt-oss kernels do not compile for it "
            "(vLLM issue 46406); transformers and llama.cpp support it"
        )
    notes += _top_k_notes(experts, top_k, source_top_k, plan_top_k)
    uneven = [size for size in PARALLEL_SIZES if experts % size]
    if uneven:
        sizes = ", ".join(map(str, uneven))
        some = "1 expert does" if experts == 1 else f"{experts} experts do"
        notes.append(
            f"{some} not divide by {sizes}: expert-parallel serving over that many devices "
            "refuses it (vLLM issue 52435); one device or tensor parallelism works"
        )
    if model_type in ONLY_COUNTS:
        if experts not in ONLY_COUNTS[model_type]:
            notes.append(
                f"vLLM refuses {model_type} with {experts} experts (vLLM issue 50982); it takes "
                + ", ".join(map(str, sorted(ONLY_COUNTS[model_type])))
            )
    elif experts not in FUSED_ROUTER_COUNTS:
        notes.append(
            f"no fused router supports {experts} experts: vLLM and SGLang route slower, and llama.cpp falls back "
            "silently to its unfused top-k (llama.cpp issue 25267)"
        )
    if gpt_oss and not expert_format.packed:
        notes.append(
            f"mlx-lm does not load gpt-oss experts stored as {expert_format.label} (tried with 0.32.2): "
            "store them as MXFP4 for it"
        )
    return notes


def llama_cpp_notes(
    experts: int, top_k: int, source_top_k: int, plan_top_k: int | None = None, *, grouped: bool = False
) -> list[str]:
    """One line for each limit of llama.cpp that applies to a GGUF file with so many experts; `grouped` as routed."""
    notes = _top_k_notes(experts, top_k, source_top_k, plan_top_k)
    if not grouped and experts not in LLAMA_CPP_COUNTS:
        notes.append(
            f"llama.cpp has no fused CUDA router for {experts} experts and falls back silently to a slower one "
            "(llama.cpp issue 25267)"
        )
    slow = [
        name
        for name, fast in (("CUDA", LLAMA_CPP_CUDA_TOP_K), ("Metal", LLAMA_CPP_METAL_TOP_K))
        if top_k not in fast
    ]
    if slow and top_k != source_top_k:
        notes.append(
            f"llama.cpp has no fast {' or '.join(slow)} kernel for top-{top_k} when it reads a prompt"
        )
    return notes


def _top_k_notes(experts: int, top_k: int, source_top_k: int, plan_top_k: int | None) -> list[str]:
    requested = plan_top_k or source_top_k
    if top_k < requested:
        whose = "the plan's" if plan_top_k else "the source's"
        left = "1 expert is" if experts == 1 else f"{experts} experts are"
        return [f"top-k is {top_k} instead of {whose} {requested}: only {left} left in each layer"]
    if top_k != source_top_k:
        than = "fewer" if top_k < source_top_k else "more"
        return [
            f"top-k is {top_k} instead of the source's {source_top_k}, as the plan sets it: a token passes through "
            f"{than} experts of each layer than the source was trained with"
        ]
    return []
