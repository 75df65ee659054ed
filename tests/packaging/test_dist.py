"""What `make dist` builds: the files in it, and what works where only it and the core's dependencies are installed.

Run by `make dist`, which puts a source distribution and a wheel into dist/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from moe_surgery import load_plan
from tests.support.checkpoints import (
    assert_same_tensors,
    decode_transposed,
    kept_tensors,
    load_config,
    load_tensors,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "moe_surgery/examples/tiny-gpt-oss"

JOBS = (
    "inspect example:tiny",
    "plan example:tiny --random --experts 8 --seed 1 -o plan.json",
    "prune example:tiny mxfp4 --plan plan.json",
    "prune example:tiny bf16 --plan plan.json --store bf16",
    "prune bf16 mxfp4-again --keep all --store mxfp4",
    "verify mxfp4 --source example:tiny",
    "verify bf16 --source example:tiny",
    "export bf16 model.gguf --store mxfp4",
    "doctor",
)
API = """
import importlib.util, sys
from moe_surgery import inspect, load_plan, plan_from_ranking, plan_keeping, prune, verify

assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("transformers") is None
inspect("example:tiny")
prune("example:tiny", "from-python", load_plan("plan.json"))
assert verify("from-python", source="example:tiny").ok
"""


def only(pattern: str) -> Path:
    result = list((ROOT / "dist").glob(pattern))
    if not result:
        pytest.skip("nothing built in dist/: run `make dist`")
    assert len(result) == 1, result
    return result[0]


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(listed.stdout.splitlines())


def test_the_source_distribution_holds_what_is_tracked() -> None:
    with tarfile.open(only("*.tar.gz")) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert tracked() - names == {".gitignore"}
    added = {name for name in names - tracked() if ".egg-info/" not in name}
    assert added == {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_package_its_data_and_the_extension() -> None:
    with zipfile.ZipFile(only("*.whl")) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    native = {name for name in names if name.startswith("moe_surgery/_native.") and name.endswith(".so")}
    assert len(native) == 1
    assert names - metadata - native == tracked("moe_surgery")
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


class Installed:
    """An environment with moe-surgery and the core's dependencies, and a folder where its commands run."""

    def __init__(self, folder: Path, package: Path, **env: str) -> None:
        venv.create(folder / "env")
        self.bin, self.work = folder / "env/bin", folder / "work"
        self.work.mkdir()
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet"]
        constraints = str(ROOT / "constraints.txt")
        # Not from a wheel that an earlier build left in pip's cache.
        pinned = ["--constraint", constraints, "--build-constraint", constraints]
        command = [*pip, "--no-cache-dir", *pinned, str(package)]
        subprocess.run(command, check=True, env={**os.environ, **env}, cwd=folder)
        for job in JOBS:
            ran = self.run("moe-surgery", *job.split())
            assert ran.returncode == 0, f"{job}: {ran.stderr}"
        self.doctor = ran.stdout

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.bin / program), *arguments]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MOE_SURGERY"))}
        return subprocess.run(command, cwd=self.work, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"), only("*.whl"))


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("sdist"), only("*.tar.gz"), CC="/bin/false", CXX="/bin/false")


@pytest.fixture(params=["from_wheel", "without_compiler"])
def installed(request: pytest.FixtureRequest) -> Installed:
    environment = request.getfixturevalue(request.param)
    assert isinstance(environment, Installed)
    return environment


def test_the_extension_is_there_where_a_compiler_was(
    from_wheel: Installed, without_compiler: Installed
) -> None:
    assert "native extension" in from_wheel.doctor
    assert len(list(from_wheel.bin.parent.rglob("moe_surgery/_native*.so"))) == 1
    assert not list(without_compiler.bin.parent.rglob("moe_surgery/_native*.so"))


def test_commands_give_the_bytes_that_safetensors_and_the_formula_give(installed: Installed) -> None:
    plan = load_plan(installed.work / "plan.json")
    expected = kept_tensors(load_tensors(TINY), plan.layers)
    assert_same_tensors(load_tensors(installed.work / "mxfp4"), expected)
    assert_same_tensors(load_tensors(installed.work / "mxfp4-again"), expected)
    decoded = load_tensors(installed.work / "bf16")
    for name in [name for name in expected if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        bits = decode_transposed(expected[name], expected[f"{base}_scales"])
        assert decoded[base].tobytes() == bits.tobytes(), name
    assert load_config(installed.work / "mxfp4")["num_local_experts"] == 8


def test_a_build_without_compiler_exports_the_same_file(
    from_wheel: Installed, without_compiler: Installed
) -> None:
    file = "model.gguf"
    assert (from_wheel.work / file).read_bytes() == (without_compiler.work / file).read_bytes()


def test_the_python_api_works_without_torch(installed: Installed) -> None:
    ran = installed.run("python", "-I", "-c", API)
    assert ran.returncode == 0, ran.stderr
    assert_same_tensors(load_tensors(installed.work / "from-python"), load_tensors(installed.work / "mxfp4"))


def test_a_command_that_needs_torch_names_the_extra(installed: Installed) -> None:
    ran = installed.run("moe-surgery", "generate", "mxfp4", "--prompt", "The")
    assert ran.returncode == 2
    assert "pip install 'moe-surgery[torch]'" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_every_extra_that_a_message_names_exists(from_wheel: Installed) -> None:
    code = "import json; from importlib.metadata import metadata; print(json.dumps(metadata('moe-surgery').json))"
    extras = json.loads(from_wheel.run("python", "-I", "-c", code).stdout)["provides_extra"]
    named = set()
    for path in sorted((ROOT / "moe_surgery").rglob("*.py")):
        for part in path.read_text().split("moe-surgery[")[1:]:
            named.update(part.partition("]")[0].split(","))
    assert named
    assert named <= set(extras)
