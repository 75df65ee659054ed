"""The options that choose a draft, and loading it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.runtime.model import CausalLM
    from moe_surgery.runtime.speculation.draft_length import AdaptiveLength

__all__ = ["draft_length", "draft_options", "load_draft", "several_draft_options"]

Command = TypeVar("Command", bound=Callable[..., Any])
AUTO = "auto"


def draft_options(command: Command) -> Command:
    """--draft, --draft-plan and --draft-top-k."""
    return _options(command, several=False)


def several_draft_options(command: Command) -> Command:
    """The same; --draft and --draft-plan can repeat."""
    return _options(command, several=True)


def _options(command: Command, several: bool) -> Command:
    repeat = "; repeat for more" if several else ""
    options = (
        click.option(
            "--draft", metavar="CKPT", multiple=several, help=f"Checkpoint to use as the draft{repeat}."
        ),
        click.option(
            "--draft-plan",
            type=click.Path(path_type=Path),
            multiple=several,
            help=f"Plan file: the model itself drafts with these experts only, which adds no weights{repeat}.",
        ),
        click.option(
            "--draft-top-k", type=int, help="Experts per token in the draft; default: its plan's or model's."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def draft_length(value: str | None) -> int | AdaptiveLength | None:
    """The value of --draft-length; None without one. Raises UsageError."""
    from moe_surgery.runtime.speculation.draft_length import AdaptiveLength, check_length

    if value is None:
        return None
    if value == AUTO:
        return AdaptiveLength()
    try:
        length = int(value)
    except ValueError:
        raise UsageError(f"--draft-length {value}: give a number of tokens, or {AUTO}") from None
    check_length(length)
    return length


def load_draft(
    target: CausalLM, ckpt: str, draft: str | None, plan_file: Path | None, top_k: int | None
) -> CausalLM | None:
    """The draft for `target`, which was loaded from `ckpt`; None if no option names one.

    With --draft-top-k alone the target drafts for itself with fewer experts per token. Raises UsageError
    for conflicting options or a draft with another vocabulary.
    """
    from moe_surgery.runtime.load import load_model
    from moe_surgery.runtime.speculation.speculate import check_pair
    from moe_surgery.runtime.text import Text
    from moe_surgery.runtime.view import view
    from moe_surgery.selection.plan import check_top_k, load_plan

    if draft is not None and plan_file is not None:
        raise UsageError("choose one of --draft and --draft-plan")
    if top_k is not None and top_k < 1:
        raise UsageError(f"--draft-top-k {top_k}: must be at least 1")
    if draft is None and plan_file is None and top_k is None:
        return None
    if top_k is not None and top_k > (full := max(layer.top_k for layer in target.layers)):
        raise UsageError(f"--draft-top-k {top_k}: {ckpt} itself uses {full}; a draft must use fewer")
    if draft is None:
        plan = None if plan_file is None else load_plan(plan_file)
        if plan is not None and top_k is not None:
            check_top_k(top_k, max(map(len, plan.layers)), f"{plan_file} keeps", "draft_top_k")
        return view(target, plan, top_k, name=ckpt)
    model = load_model(draft, target.device, target.dtype, backend=target.backend.name, dense=target.dense)
    check_pair(target, model)
    if not Text(ckpt).same_tokens(Text(draft)):
        raise UsageError(f"--draft {draft}: its tokenizer has other token ids than that of {ckpt}")
    if top_k is None:
        return model
    check_top_k(top_k, model.config.num_local_experts, f"{draft} has", "draft_top_k")
    return view(model, None, top_k, name=draft)
