"""Build of the native extension; everything else about the project is in pyproject.toml.

Build switches, read from the environment:

    MOE_SURGERY_BUILD_NATIVE   1 (default) builds the extension; 0 skips it
    MOE_SURGERY_SANITIZE       0 (default); 1 builds with AddressSanitizer and UBSan, for tests
    MOE_SURGERY_BUILD_JOBS     compilers run at once (default: the number of processors)

Without a C++17 compiler (GCC or Clang) or without nanobind the installation still succeeds, with one
warning, and the package runs on numpy alone. `-march=native` and `-ffast-math` are never used: the
kernels choose their instructions at run time and promise the same bits everywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

Compile = Callable[..., list[str]]

CORE = (
    Path("csrc"),
    Path("csrc/isa"),
    Path("csrc/mxfp4"),
    Path("csrc/q8_0"),
    Path("csrc/cpu"),
    Path("csrc/residency"),
)
FLAGS = [
    "-std=c++17",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-ffunction-sections",
    "-fdata-sections",
]
RELEASE = ["-O3", "-g0", "-DNDEBUG", "-DNB_COMPACT_ASSERTIONS"]
SANITIZE = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


def switch(name: str, default: str) -> bool:
    return os.environ.get(name, default).strip() not in ("", "0")


def warn_numpy_only(reason: object) -> None:
    text = " ".join(str(reason).split()) or type(reason).__name__
    shown = text if len(text) <= 120 else f"{text[:120]}..."
    print(
        f"warning: moe-surgery: native extension not built ({shown}); "
        "the package works without it, slower, on numpy",
        file=sys.stderr,
    )


def native_extension() -> Extension:
    """Describe the extension. What comes from nanobind is added when it is built."""
    sanitize = switch("MOE_SURGERY_SANITIZE", "0")
    link = ["-fsanitize=address,undefined"] if sanitize else []
    if sys.platform == "linux" and not sanitize:
        link = ["-Wl,-s", "-Wl,--gc-sections"]
    return Extension(
        "moe_surgery._native",
        sources=[str(path) for folder in CORE for path in sorted(folder.glob("*.cpp"))],
        depends=[
            str(path) for folder in CORE for kind in ("*.hpp", "*.inl") for path in sorted(folder.glob(kind))
        ],
        extra_compile_args=[*FLAGS, *(SANITIZE if sanitize else RELEASE)],
        extra_link_args=link,
        language="c++",
    )


def in_parallel(compile_files: Compile, more_sources: list[str], jobs: int) -> Compile:
    """Wrap a compiler's `compile(sources, **options)`: more sources, compiled side by side."""

    def compile_all(sources: list[str], **options: Any) -> list[str]:
        with ThreadPoolExecutor(jobs) as pool:
            # The additional ones first: nanobind takes longest.
            objects = pool.map(lambda source: compile_files([source], **options), [*more_sources, *sources])
            return [name for names in objects for name in names]

    return compile_all


class OptionalBuild(build_ext):
    """Build the extension side by side, and go on without it when that fails."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            warn_numpy_only(error)
            # What follows (copying, recording outputs) must not look for the missing file.
            self.extensions = []

    def build_extensions(self) -> None:
        # Not among the sources of the extension: those must lie in the project, to be packed with it.
        import nanobind

        if self.compiler.compiler_type == "msvc":
            raise RuntimeError("the sources need GCC or Clang")
        root = Path(nanobind.__file__).parent
        for extension in self.extensions:
            extension.include_dirs += [str(root / "include"), str(root / "ext/robin_map/include")]
        jobs = int(os.environ.get("MOE_SURGERY_BUILD_JOBS", "0")) or os.cpu_count() or 1
        nanobind_sources = [str(root / "src/nb_combined.cpp")]
        self.compiler.compile = in_parallel(self.compiler.compile, nanobind_sources, jobs)
        super().build_extensions()


native = switch("MOE_SURGERY_BUILD_NATIVE", "1")
setup(ext_modules=[native_extension()] if native else [], cmdclass={"build_ext": OptionalBuild})
