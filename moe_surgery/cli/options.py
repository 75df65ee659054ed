"""Options and argument types that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from moe_surgery.cli.terminal import Terminal
from moe_surgery.errors import UsageError
from moe_surgery.selection.arguments import parse_size

if TYPE_CHECKING:
    import torch

__all__ = [
    "BACKEND_HELP",
    "COUNT",
    "DOMAIN_HELP",
    "EXPERT_COUNTS",
    "EXPERT_LIST",
    "OUTPUT",
    "SIZE",
    "Compute",
    "base_model_option",
    "batch_tokens_option",
    "check_new_output",
    "common",
    "compute_options",
    "computed_by",
    "dense_option",
    "device_option",
    "dtype_name",
    "ignore_unlisted",
    "metric_option",
    "needs_torch",
    "plans_option",
    "ranked",
    "router_top_k",
    "terminal_of",
    "write_options",
]

Command = TypeVar("Command", bound=Callable[..., Any])

BACKEND_HELP = "Kernel backend by name (see moe-surgery doctor)"
DOMAIN_HELP = "Domain of the texts"
_DTYPES = {"bf16": "bfloat16", "f32": "float32", "f16": "float16"}


def terminal_of(context: click.Context) -> Terminal:
    """The terminal of this run (made here when a command is called without `main`)."""
    return context.find_root().ensure_object(Terminal)


def check_new_output(output: Path | None, inputs: Iterable[Path | None]) -> None:
    """Raise UsageError where `-o` names a folder or one of the inputs."""
    if output is None or not output.exists():
        return
    if output.is_dir():
        raise UsageError(f"-o {output}: is a folder; name a file")
    if any(i is not None and i.exists() and output.samefile(i) for i in inputs):
        raise UsageError(f"-o {output}: is an input; name another file")


def needs_torch(command: str) -> None:
    """Raise UsageError that says what to install if torch is missing."""
    if find_spec("torch") is None:
        raise UsageError(
            f"{command} needs torch: pip install 'moe-surgery[torch]', or '.[torch]' in a checkout"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of `dtype` for --dtype."""
    return next(name for name, full in _DTYPES.items() if str(dtype) == f"torch.{full}")


def computed_by(settings: Mapping[str, object]) -> str:
    """One line with backend, device and dtype, from the settings of statistics, a ranking or an evaluation."""
    backend, device, dtype = (settings.get(key) or "unknown" for key in ("backend", "device", "dtype"))
    return f"computed by backend {backend} on device {device} in {dtype}"


def dense_option(command: Command) -> Command:
    """--dense, for commands that decode."""
    return click.option(
        "--dense",
        type=click.Choice(["keep", "q8_0"]),
        default="keep",
        show_default=True,
        help="Format of dense matrices (attention, unembedding) in memory; q8_0 takes half the bytes of BF16, and a "
        "step reads as much less.",
    )(command)


def device_option(command: Command) -> Command:
    """--device, for commands that run kernels."""
    return click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or mps.")(
        command
    )


@dataclass(frozen=True, slots=True)
class Compute:
    """What `compute_options` reads from the command line."""

    device: str
    dtype: str | None
    backend: str | None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `load_model`, and of the jobs that call it. Imports torch."""
        import torch

        dtype = None if self.dtype is None else getattr(torch, _DTYPES[self.dtype])
        return {"device": self.device, "dtype": dtype, "backend": self.backend}


def compute_options(command: Command) -> Command:
    """--device, --dtype and --backend as one argument `compute`, for commands that run a model."""

    @wraps(command)
    def run(*args: Any, device: str, dtype: str | None, backend: str | None, **kwargs: Any) -> Any:
        return command(*args, compute=Compute(device, dtype, backend), **kwargs)

    for option in (
        click.option(
            "--backend",
            help=f"{BACKEND_HELP}; default: triton on CUDA and native on the CPU if they work, else reference.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(list(_DTYPES)),
            help="Compute dtype; default: f32 with the native backend (which rounds activations to 16-bit integers in "
            "products with MXFP4 weights), bf16 with the others.",
        ),
        device_option,
    ):
        option(run)
    return cast(Command, run)


def plans_option(effect: str) -> Callable[[Command], Command]:
    """--plan, repeated, for commands that compare plans; `effect` says what it does."""
    return click.option(
        "--plan",
        "plan_files",
        type=click.Path(path_type=Path),
        multiple=True,
        help=f"Plan file; {effect}; repeat for more.",
    )


def router_top_k(command: Command) -> Command:
    """--top-k, for commands that can override the plan's or the model's."""
    return click.option(
        "--top-k",
        "top_k",
        type=int,
        metavar="N",
        help="Experts per token, at most as many as are kept; default: the plan's or the model's.",
    )(command)


def ignore_unlisted(command: Command) -> Command:
    """--ignore-unlisted, for commands that read whole checkpoints."""
    return click.option(
        "--ignore-unlisted",
        is_flag=True,
        help="Skip tensors and a model.safetensors that the index does not list.",
    )(command)


def write_options(command: Command) -> Command:
    """--dry-run, --ignore-free-space and --ignore-unlisted, for commands that write a model."""
    for option in (
        ignore_unlisted,
        click.option(
            "--ignore-free-space",
            is_flag=True,
            help="Start even if the output may not fit on the disk.",
        ),
        click.option("--dry-run", is_flag=True, help="Show what would be read and written, and stop."),
    ):
        command = option(command)
    return command


def base_model_option(command: Command) -> Command:
    """--base-model, for commands that write a model card."""
    return click.option(
        "--base-model", metavar="ID", help="Hub id of the source, for the card; default: as recorded."
    )(command)


def batch_tokens_option(command: Command) -> Command:
    """--batch-tokens, for commands that go through a model layer by layer."""
    return click.option(
        "--batch-tokens",
        type=int,
        help="Tokens per batch; weights are read once per batch; default: 8192.",
    )(command)


def metric_option(command: Command) -> Command:
    """--metric, for commands that rank."""
    return click.option(
        "--metric",
        metavar="NAME",
        help="How to score experts: reap, frequency, gate, ... (all in rank --help).",
    )(command)


def ranked(command: Command) -> Command:
    """--metric, --domain and --protect-super-experts, for commands that rank statistics."""
    for option in (
        click.option(
            "--protect-super-experts",
            is_flag=True,
            help="Rank experts with outlier activations first, regardless of their score (REAP's rule).",
        ),
        click.option(
            "--domain",
            "domains",
            metavar="NAME",
            multiple=True,
            help=f"{DOMAIN_HELP}: use only this one; repeat for more; default: all.",
        ),
        metric_option,
    ):
        command = option(command)
    return command


def common(command: Command) -> Command:
    """--json, -v, -q and --debug. While the command runs, what the library warns of is printed as notes."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with terminal_of(click.get_current_context()).notes():
            return command(*args, **kwargs)

    def switch(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
        def apply(context: click.Context, _: click.Parameter, value: bool) -> None:
            terminal = terminal_of(context)
            terminal.command = context.command
            if value:
                setattr(terminal, name, True)

        return apply

    def verbosity(step: int) -> Callable[[click.Context, click.Parameter, bool], None]:
        def apply(context: click.Context, _: click.Parameter, value: bool) -> None:
            if value:
                terminal_of(context).verbosity = step

        return apply

    flags: tuple[tuple[tuple[str, ...], Any, str], ...] = (
        (("--debug",), switch("debug"), "Show a traceback on errors."),
        (("-q", "--quiet"), verbosity(-1), "No progress and no notes."),
        (("-v", "--verbose"), verbosity(1), "More detail on stderr."),
        (("--json",), switch("json"), "Print the result as JSON on stdout."),
    )
    for names, callback, text in flags:
        click.option(*names, is_flag=True, expose_value=False, callback=callback, help=text)(run)
    return cast(Command, run)


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.2
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Count(click.ParamType):  # type: ignore[type-arg]
    """ "6.6B" -> 6_600_000_000."""

    name = "COUNT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMBT]?)\s*", value)
        if not match:
            self.fail(f"{value!r} is not a number; write 6.6B (10^9), 600M or 21500000000", param, ctx)
        return int(float(match[1]) * 1000 ** " KMBT".index(match[2].upper() or " "))


class _ExpertCounts(click.ParamType):  # type: ignore[type-arg]
    """ "4,8-11" -> [4, 8, 9, 10, 11]."""

    name = "LIST"
    what, examples = "a number of experts", "numbers and ranges such as 4,8,16-24"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        kept: list[int] = []
        for item in value.split(","):
            match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5}))?\s*", item)
            if not match:
                self.fail(
                    f"{item!r} is not {self.what}; write {self.examples}",
                    param,
                    ctx,
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"{item!r} runs backwards; write {last}-{first}, or list the experts", param, ctx)
            kept.extend(range(first, last + 1))
        return kept


class _ExpertList(_ExpertCounts):
    """ "all" stays, "0,3,8-11" -> [0, 3, 8, 9, 10, 11]."""

    name = "LIST|all"
    what, examples = "an expert number", "all, or numbers and ranges such as 0,3,8-11"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.strip() == "all":
            return "all"
        return super().convert(value, param, ctx)


class _Output(click.Path):
    """A path to write. Refuses names of sources (example:tiny, owner/model@revision)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from moe_surgery.checkpoint.resolve import check_is_path

        try:
            check_is_path(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return super().convert(value, param, ctx)


SIZE = _Size()
COUNT = _Count()
OUTPUT = _Output(path_type=Path)
EXPERT_LIST = _ExpertList()
EXPERT_COUNTS = _ExpertCounts()
