"""Compile every Triton kernel for every architecture without a GPU, and keep a table of what it takes.

    python -m benchmarks.kernels.aot --compare   # fail where a kernel got worse than the table says
    python -m benchmarks.kernels.aot --write     # compile and write the table

Registers and spills come from `ptxas -v`, shared memory from Triton. Every run fails on a spill and on
shared memory past a device's limit. A row of the table belongs to one Triton version (and the ptxas it
brings), because either changes it; comparing under a version without rows only checks those two limits.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped,import-not-found,unused-ignore]
from triton.compiler import ASTSource  # type: ignore[import-untyped,import-not-found,unused-ignore]

from benchmarks.kernels.entries import DEVICES, entries
from moe_surgery.kernels.triton.launch import Launch

TABLE = Path(__file__).with_name("aot.json")
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
# Registers a thread may gain before it counts as worse: the allocator moves by a few for no reason.
REGISTER_SLACK = 8


@dataclass(frozen=True, slots=True)
class Usage:
    """Registers a thread, spilled bytes a thread (stores and loads), shared memory a block in bytes."""

    registers: int
    spills: int
    shared: int


def usage(launch: Launch, arch: int) -> Usage:
    """What `launch` takes on sm_`arch`. Raises triton's error if it does not compile."""
    compiled = triton.compile(
        source(launch),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    if re.search(r"\bmul\.(?:\w+\.)*ftz", compiled.asm["ptx"]):
        raise RuntimeError(
            f"{launch.kernel.fn.__name__} flushes subnormals, from which MXFP4 decoding starts"
        )
    registers, spills = _assemble(compiled.asm["ptx"], arch)
    return Usage(registers, spills, compiled.metadata.shared)


def source(launch: Launch) -> ASTSource:
    """The kernel specialised as a run would: sizes of 1 constant, pointers and sizes divisible by 16 marked."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialised and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
        if isinstance(value, torch.Tensor) or (specialised and type(value) is int and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def problems(name: str, arch: int, found: Usage, known: Usage | None = None) -> list[str]:
    """What is wrong with `found`, in words: limits of the device, and what is worse than `known`."""
    where, limit = f"sm_{arch} {name}", DEVICES[arch][1]
    wrong = []
    if found.spills:
        wrong.append(f"{where}: spills {found.spills} bytes")
    if found.shared > limit:
        wrong.append(f"{where}: {found.shared} bytes of shared memory, the device has {limit}")
    if known and found.registers > known.registers + REGISTER_SLACK:
        wrong.append(f"{where}: {found.registers} registers, {known.registers} before")
    if known and found.shared > known.shared:
        wrong.append(f"{where}: {found.shared} bytes of shared memory, {known.shared} before")
    return wrong


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """(registers, spilled bytes) by `ptxas -v`."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    tool = tool if tool.exists() else folder / "ptxas"
    target = re.search(r"^\.target (\S+?)(?:,|$)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError("the PTX names no target")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    if registers is None:
        raise RuntimeError(f"ptxas reported no registers: {report}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return int(registers[1]), sum(map(int, spills))


def _compile(arch: int, start: int, step: int) -> dict[str, Usage]:
    return {name: usage(launch, arch) for name, launch in list(entries(arch))[start::step]}


def compile_all(architectures: Iterable[int], jobs: int) -> dict[str, dict[str, Usage]]:
    """Usage by architecture and name, compiled by `jobs` processes."""
    table: dict[str, dict[str, Usage]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        for arch in architectures:
            pieces = pool.map(_compile, [arch] * jobs, range(jobs), [jobs] * jobs)
            result = {name: row for piece in pieces for name, row in piece.items()}
            table[str(arch)] = {name: result[name] for name, _ in entries(arch)}
            print(f"sm_{arch}: {len(result)} kernels", file=sys.stderr)
    return table


def read_table() -> dict[str, dict[str, Usage]]:
    """The checked-in rows of the installed Triton version: by architecture, then by name."""
    stored = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    rows = stored.get(triton.__version__, {})
    return {arch: {name: Usage(*row) for name, row in named.items()} for arch, named in rows.items()}


def write_table(found: dict[str, dict[str, Usage]]) -> None:
    """Put `found` in the place of the installed version's rows."""
    stored = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    version = stored.setdefault(triton.__version__, {})
    for arch, named in found.items():
        version[arch] = {name: list(asdict(row).values()) for name, row in named.items()}
    text = json.dumps(stored, indent=1)
    text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text)  # a row a line
    TABLE.write_text(text + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--compare", action="store_true")
    mode.add_argument("--write", action="store_true")
    parser.add_argument("--arch", type=int, nargs="*", choices=sorted(DEVICES), default=sorted(DEVICES))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    result = compile_all(options.arch, options.jobs)
    known = read_table() if options.compare else {}
    wrong = [
        line
        for arch, named in result.items()
        for name, row in named.items()
        for line in problems(name, int(arch), row, known.get(arch, {}).get(name))
    ]
    if options.compare and not known:
        print(f"no rows for Triton {triton.__version__}: only limits were checked", file=sys.stderr)
    if options.write and not wrong:
        write_table(result)
    print("\n".join(wrong) if wrong else f"{sum(map(len, result.values()))} kernels within limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
