from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_surgery.formats import mxfp4, native

ROOT = Path(__file__).resolve().parents[2]


def test_status_names_the_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_SURGERY_NATIVE", raising=False)
    module = native.native_module()
    if module is None:
        assert native.native_status().startswith("not available (")
    else:
        names = module.instruction_sets()
        assert names[-1] == "scalar"
        assert native.native_status() == f"{names[0]} (available: {', '.join(names)})"


def test_the_variable_disables_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SURGERY_NATIVE", "0")
    assert native.native_module() is None
    assert native.native_status() == "disabled by MOE_SURGERY_NATIVE=0; numpy is used"
    assert mxfp4.instruction_sets() == ("numpy",)
    zeros = mxfp4.decode(np.zeros((1, 1, 16), np.uint8), np.zeros((1, 1), np.uint8))
    assert not zeros.any()


def test_a_missing_extension_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_SURGERY_NATIVE", raising=False)
    monkeypatch.setitem(sys.modules, "moe_surgery._native", None)
    native._load.cache_clear()
    try:
        assert native.native_module() is None
        assert native.native_status().startswith("not available (")
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


def test_importing_the_formats_does_not_import_torch() -> None:
    check = (
        "import sys, moe_surgery.formats.mxfp4 as m; m.instruction_sets(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


@pytest.mark.slow  # `make sanitize` runs the same
@pytest.mark.skipif(os.name != "posix" or shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_core_without_python(tmp_path: Path) -> None:
    """All implementations against the scalar one, with the address and undefined sanitizers."""
    core = ROOT / "csrc"
    units = ("tests/selftest", "scalar", "avx2", "avx512", "neon", "dispatch")
    sources = [core / "isa/isa.cpp", *(core / "mxfp4" / f"{unit}.cpp" for unit in units)]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    linked = subprocess.run(["c++", *sanitize, probe, "-o", tmp_path / "probe"], capture_output=True)
    flags = ["-std=c++17", "-O1", f"-I{core}", *(sanitize if linked.returncode == 0 else [])]
    program = tmp_path / "selftest"
    subprocess.run(["c++", *flags, *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout
