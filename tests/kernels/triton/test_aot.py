"""Compilation ahead of time: one entry of each kernel for each architecture, and the tool's own rules."""

from __future__ import annotations

import json
from pathlib import Path
from runpy import run_path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks.kernels import aot, autotune
from benchmarks.kernels.entries import DEVICES, entries, samples
from moe_surgery.kernels.triton import tuning


# The oldest and the newest here; `make aot` compiles for all.
@pytest.mark.parametrize("arch", [min(DEVICES), max(DEVICES)])
def test_kernels_compile_without_spills_within_shared_memory(arch: int) -> None:
    wrong = [
        line
        for name, launch in samples(arch).items()
        for line in aot.problems(name, arch, aot.usage(launch, arch))
    ]
    assert not wrong


def test_every_kernel_of_the_package_is_sampled() -> None:
    kernels = {launch.kernel.fn for _, launch in entries(90)}
    assert {launch.kernel.fn for launch in samples(90).values()} == kernels


def test_checked_in_table_is_complete_and_within_limits() -> None:
    for version, architectures in json.loads(aot.TABLE.read_text()).items():
        assert set(architectures) == {str(arch) for arch in DEVICES}, version
        for arch, rows in architectures.items():
            assert set(rows) == {name for name, _ in entries(int(arch))}
            for name, row in rows.items():
                assert not aot.problems(name, int(arch), aot.Usage(*row))


def test_what_counts_as_a_problem() -> None:
    known = aot.Usage(100, 0, 1000)
    assert not aot.problems("k", 90, aot.Usage(100 + aot.REGISTER_SLACK, 0, 1000), known)
    assert not aot.problems("k", 90, aot.Usage(90, 0, 900), known)
    assert "109 registers, 100 before" in aot.problems("k", 90, aot.Usage(109, 0, 1000), known)[0]
    assert "1001 bytes of shared memory, 1000" in aot.problems("k", 90, aot.Usage(100, 0, 1001), known)[0]
    assert "spills 8" in aot.problems("k", 90, aot.Usage(100, 8, 1000))[0]
    assert "the device has" in aot.problems("k", 86, aot.Usage(100, 0, (99 << 10) + 1))[0]
    assert not aot.problems("k", 90, aot.Usage(100, 0, (99 << 10) + 1))


def test_autotune_rewrites_only_the_overrides(tmp_path: Path) -> None:
    """The table it writes is Python that holds what was found, and everything else as before."""
    copy = tmp_path / "tuning.py"
    copy.write_text(Path(tuning.__file__).read_text())
    autotune.write_overrides(copy, {90: {("down", "mxfp4", 0): (32, 256, 4, 2)}}, "one line")
    result = run_path(str(copy))
    assert result["OVERRIDES"] == {90: {("down", "mxfp4", 0): (32, 256, 4, 2)}}
    assert result["BLOCKS"] == tuning.BLOCKS
    assert "# Measured: one line" in copy.read_text()
    autotune.write_overrides(copy, {}, "")
    assert run_path(str(copy))["OVERRIDES"] == {}


def test_autotune_says_why_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    if aot.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert autotune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_candidates_hold_the_present_entry() -> None:
    for key, present in tuning.BLOCKS.items():
        assert present in autotune.candidates(key)
