"""Surgery on mixture-of-experts checkpoints: remove experts without ever loading the model.

    from moe_surgery import plan_from_ranking, prune, verify

    plan = plan_from_ranking("published:law", 8)
    prune("openai/gpt-oss-20b", "gpt-oss-20b-law-8", plan)
    verify("gpt-oss-20b-law-8")

Names are imported on first use, so that importing the package is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_surgery.version import __version__

if TYPE_CHECKING:
    from moe_surgery.card.card import make_card
    from moe_surgery.card.write import write_card
    from moe_surgery.checkpoint.checkpoint import Checkpoint
    from moe_surgery.families import identify_model
    from moe_surgery.pipeline.exporting import export_gguf
    from moe_surgery.pipeline.merging import merge_adapter
    from moe_surgery.pipeline.planning import inspect, make_plan
    from moe_surgery.pipeline.pruning import prune
    from moe_surgery.pipeline.sweep.run import sweep
    from moe_surgery.progress import Progress
    from moe_surgery.quality.evaluate import evaluate
    from moe_surgery.quality.job import profile
    from moe_surgery.quality.routing_trace import Trace
    from moe_surgery.quality.search import search
    from moe_surgery.quality.text_files import TextFile
    from moe_surgery.quality.trace import trace
    from moe_surgery.repairing import repair
    from moe_surgery.runtime.generate import generate, stream
    from moe_surgery.runtime.load import load_model
    from moe_surgery.runtime.speculation.speculate import speculate
    from moe_surgery.runtime.view import view
    from moe_surgery.selection.imatrix.models import rank_imatrix
    from moe_surgery.selection.importers.importing import import_statistics
    from moe_surgery.selection.plan import Plan, load_plan, plan_from_ranking, plan_keeping, plan_random
    from moe_surgery.selection.rank import rank
    from moe_surgery.selection.ranking import Ranking, load_ranking
    from moe_surgery.selection.statistics import Statistics, load_statistics
    from moe_surgery.surgery.verify import verify_checkpoint as verify

__all__ = [
    "AdaptiveLength",
    "Checkpoint",
    "Plan",
    "Progress",
    "Ranking",
    "Sampling",
    "Statistics",
    "TextFile",
    "Trace",
    "__version__",
    "evaluate",
    "export_gguf",
    "generate",
    "identify_model",
    "import_statistics",
    "inspect",
    "load_model",
    "load_plan",
    "load_ranking",
    "load_statistics",
    "make_card",
    "make_plan",
    "merge_adapter",
    "plan_from_ranking",
    "plan_keeping",
    "plan_random",
    "profile",
    "prune",
    "rank",
    "rank_imatrix",
    "repair",
    "search",
    "speculate",
    "stream",
    "sweep",
    "trace",
    "verify",
    "view",
    "write_card",
]

_HOMES = {
    "AdaptiveLength": ("moe_surgery.runtime.speculation.draft_length", "AdaptiveLength"),
    "Checkpoint": ("moe_surgery.checkpoint.checkpoint", "Checkpoint"),
    "Plan": ("moe_surgery.selection.plan", "Plan"),
    "Progress": ("moe_surgery.progress", "Progress"),
    "Ranking": ("moe_surgery.selection.ranking", "Ranking"),
    "Sampling": ("moe_surgery.runtime.sampling", "Sampling"),
    "Statistics": ("moe_surgery.selection.statistics", "Statistics"),
    "TextFile": ("moe_surgery.quality.text_files", "TextFile"),
    "Trace": ("moe_surgery.quality.routing_trace", "Trace"),
    "identify_model": ("moe_surgery.families", "identify_model"),
    "evaluate": ("moe_surgery.quality.evaluate", "evaluate"),
    "export_gguf": ("moe_surgery.pipeline.exporting", "export_gguf"),
    "generate": ("moe_surgery.runtime.generate", "generate"),
    "import_statistics": ("moe_surgery.selection.importers.importing", "import_statistics"),
    "inspect": ("moe_surgery.pipeline.planning", "inspect"),
    "load_model": ("moe_surgery.runtime.load", "load_model"),
    "load_plan": ("moe_surgery.selection.plan", "load_plan"),
    "load_ranking": ("moe_surgery.selection.ranking", "load_ranking"),
    "load_statistics": ("moe_surgery.selection.statistics", "load_statistics"),
    "make_card": ("moe_surgery.card.card", "make_card"),
    "make_plan": ("moe_surgery.pipeline.planning", "make_plan"),
    "merge_adapter": ("moe_surgery.pipeline.merging", "merge_adapter"),
    "plan_from_ranking": ("moe_surgery.selection.plan", "plan_from_ranking"),
    "plan_keeping": ("moe_surgery.selection.plan", "plan_keeping"),
    "plan_random": ("moe_surgery.selection.plan", "plan_random"),
    "profile": ("moe_surgery.quality.job", "profile"),
    "prune": ("moe_surgery.pipeline.pruning", "prune"),
    "rank": ("moe_surgery.selection.rank", "rank"),
    "rank_imatrix": ("moe_surgery.selection.imatrix.models", "rank_imatrix"),
    "repair": ("moe_surgery.repairing", "repair"),
    "search": ("moe_surgery.quality.search", "search"),
    "speculate": ("moe_surgery.runtime.speculation.speculate", "speculate"),
    "stream": ("moe_surgery.runtime.generate", "stream"),
    "sweep": ("moe_surgery.pipeline.sweep.run", "sweep"),
    "trace": ("moe_surgery.quality.trace", "trace"),
    "verify": ("moe_surgery.surgery.verify", "verify_checkpoint"),
    "view": ("moe_surgery.runtime.view", "view"),
    "write_card": ("moe_surgery.card.write", "write_card"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_surgery' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
