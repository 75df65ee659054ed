"""The engine's commands never import torch, each imports only what it runs, and help next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import moe_surgery
from tests.support.checkpoints import write_checkpoint

PROGRAM = """
import json, sys
from moe_surgery.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""
HEAVY = {"torch", "triton", "transformers", "accelerate", "huggingface_hub"}


def modules_after(*arguments: str | Path) -> set[str]:
    """Every module that a successful `moe-surgery ARGUMENTS` has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(moe_surgery.__file__).parent.parent,
        check=True,
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(modules)


def test_the_engines_commands_never_import_torch(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", shards=2)
    plan = tmp_path / "plan.json"
    commands: list[list[str | Path]] = [
        ["inspect", source],
        ["plan", "--random", "--experts", "2", source, "-o", plan],
        ["prune", source, tmp_path / "same", "--plan", plan],
        ["prune", source, tmp_path / "bf16", "--plan", plan, "--store", "bf16"],
        ["prune", tmp_path / "bf16", tmp_path / "mxfp4", "--keep", "all", "--store", "mxfp4"],
        ["verify", tmp_path / "bf16", "--source", source],
        ["export", "example:tiny", tmp_path / "tiny.gguf"],
    ]
    for command in commands:
        modules = modules_after(*command)
        assert "moe_surgery" in modules
        assert not modules & HEAVY, command


def test_what_only_moves_bytes_does_without_numpy(tmp_path: Path) -> None:
    """Importing it costs more memory than the whole job."""
    source, ranking, plan = (
        write_checkpoint(tmp_path / "in"),
        tmp_path / "ranking.json",
        tmp_path / "plan.json",
    )
    result = moe_surgery.inspect(source)
    ranking.write_text(json.dumps({f"layer_{i}": list(range(result.experts)) for i in range(result.layers)}))
    commands: list[list[str | Path]] = [
        ["inspect", source],
        ["plan", ranking, "--experts", "2", source, "-o", plan],
        ["prune", source, tmp_path / "out", "--plan", plan],
        ["verify", tmp_path / "out", "--source", source],
    ]
    for command in commands:
        assert "numpy" not in modules_after(*command), command


FAMILY = "moe_surgery.families"
# What a family has for running and exporting, for messages about checkpoints that none fits, and what only
# families known by tensor names need.
LATE = {
    f"{FAMILY}.gguf_architecture",
    f"{FAMILY}.gpt_oss.config",
    f"{FAMILY}.gpt_oss.gguf",
    f"{FAMILY}.gpt_oss.original",
    f"{FAMILY}.model_config",
    f"{FAMILY}.unsupported",
    f"{FAMILY}.catalog_config",
    f"{FAMILY}.catalog_spec",
    f"{FAMILY}.grouping",
    f"{FAMILY}.stored_weights",
    "moe_surgery.surgery.by_name",
    "moe_surgery.surgery.expert_names",
}
EXPORTING = {
    f"{FAMILY}.{name}" for name in ("gguf_architecture", "gpt_oss.config", "gpt_oss.gguf", "model_config")
}
COMPILING = {"moe_surgery.surgery.compiler", "moe_surgery.surgery.program"}
WRITING = {"moe_surgery.engine.run"}
CARD = {"moe_surgery.card.card", "moe_surgery.card.facts"}
INSPECTING = {"moe_surgery.surgery.inspect"}
PLANS = {"moe_surgery.selection.plan"}
RANKINGS = {"moe_surgery.selection.ranking"}
EXPORT = {"moe_surgery.export.compiler", "moe_surgery.export.run"}
COMPARING = {"moe_surgery.surgery.comparison"}
PARTS = EXPORTING | COMPILING | WRITING | CARD | INSPECTING | PLANS | RANKINGS | EXPORT | COMPARING


def test_each_command_imports_only_the_parts_that_it_runs(tmp_path: Path) -> None:
    source, ranking, plan = (
        write_checkpoint(tmp_path / "in"),
        tmp_path / "ranking.json",
        tmp_path / "plan.json",
    )
    sizes = moe_surgery.inspect(source)
    ranking.write_text(json.dumps({f"layer_{i}": list(range(sizes.experts)) for i in range(sizes.layers)}))
    out, by_plan = tmp_path / "out", tmp_path / "by-plan"
    commands: list[tuple[list[str | Path], set[str]]] = [
        (["inspect", source], INSPECTING),
        (["plan", ranking, "--experts", "2", source, "-o", plan], PLANS | RANKINGS),
        (["prune", source, out, "--keep", "0-1", "--no-card"], COMPILING | WRITING | PLANS),
        (["prune", source, by_plan, "--plan", plan], COMPILING | WRITING | PLANS | CARD),
        (["verify", out], PLANS),
        (["verify", out, "--source", source], PLANS | COMPILING | COMPARING),
        (["export", source, tmp_path / "out.gguf", "--no-tokenizer"], PLANS | EXPORT | EXPORTING),
    ]
    for command, needed in commands:
        modules = modules_after(*command)
        assert modules & PARTS == needed, command
        assert modules & LATE == needed & LATE, command


def test_the_parts_are_modules() -> None:
    assert [name for name in sorted(PARTS | LATE) if find_spec(name) is None] == []


@pytest.mark.parametrize("command", [[], ["inspect"], ["prune"], ["export"]], ids=str)
def test_help_imports_no_library_of_the_engine(command: list[str]) -> None:
    modules = modules_after(*command, "--help")
    assert "click" in modules
    assert not modules & (HEAVY | {"logging", "numpy", "rich", "safetensors", "statistics", "xxhash"})


def test_a_benchmark_imports_no_other() -> None:
    modules = {name for name in modules_after("bench", "kernels", "--help") if "cli.bench." in name}
    assert modules == {"moe_surgery.cli.bench.kernels", "moe_surgery.cli.bench.shared"}


def test_the_version_imports_no_command() -> None:
    modules = modules_after("--version")
    assert not modules & (HEAVY | {"logging", "numpy", "rich", "xxhash", "moe_surgery.cli.options"})


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, moe_surgery; print(*sys.modules)"
    root = Path(moe_surgery.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.append({str(root)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    modules = set(done.stdout.split())
    assert {name for name in modules if name.startswith("moe_surgery.")} == {"moe_surgery.version"}
    assert not {name.partition(".")[0] for name in modules} & (HEAVY | {"numpy", "click", "rich", "xxhash"})
