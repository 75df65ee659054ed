"""A device is there and has the memory, or one line says what is missing and what would help."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from moe_surgery import Checkpoint, identify_model, load_model  # noqa: E402
from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.families.model_spec import ModelSpec  # noqa: E402
from moe_surgery.runtime.device import check_memory, free_memory, open_device  # noqa: E402
from tests.support.checkpoints import (  # noqa: E402
    Shape,
    gpt_oss_20b,
    tensor_shapes,
    write_checkpoint,
    write_sparse_checkpoint,
)
from tests.support.floats import in_dtype  # noqa: E402

CUDA = torch.device("cuda")
HEADROOM = 1 << 30

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
no_mps = pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    with Checkpoint.open(
        write_sparse_checkpoint(tmp_path_factory.mktemp("device") / "20b", gpt_oss_20b())
    ) as c:
        return identify_model(c)


def nbytes(experts: int) -> int:
    """Bytes of gpt-oss-20b's tensors with `experts` kept."""
    shape = gpt_oss_20b()
    total = 0
    for name, dims in tensor_shapes(shape).items():
        kept = (experts, *dims[1:]) if ".mlp." in name else dims
        total += prod(kept) * (1 if name.endswith(("_blocks", "_scales")) else 2)
    return total


def test_the_sizes_are_the_real_models(full_size: ModelSpec) -> None:
    assert nbytes(32) == 13_761_264_768
    check_memory(CUDA, full_size, free=nbytes(32) + HEADROOM)


@pytest.mark.parametrize("most", [1, 2, 8, 16, 31])
@pytest.mark.parametrize("spare", [0, 1_000_000])
def test_too_little_memory_names_the_largest_expert_count_that_fits(
    full_size: ModelSpec, most: int, spare: int
) -> None:
    free = nbytes(most) + HEADROOM + spare
    with pytest.raises(UsageError) as caught:
        check_memory(CUDA, full_size, free=free)
    assert str(caught.value) == (
        f"`device` cuda: the model needs 14.8 GB with headroom, {free / 1e9:.1f} GB are free; "
        f"pruned to {most} experts it fits"
    )


def test_one_byte_too_little_is_too_little(full_size: ModelSpec) -> None:
    with pytest.raises(UsageError, match="pruned to 31 experts it fits"):
        check_memory(CUDA, full_size, free=nbytes(32) + HEADROOM - 1)
    with pytest.raises(UsageError, match=r"no expert count fits$"):
        check_memory(CUDA, full_size, free=nbytes(1) + HEADROOM - 1)


@pytest.mark.parametrize(("dtype", "times"), [("bf16", "four"), ("f16", "four"), ("f32", "seven")])
def test_experts_in_a_float_dtype_are_advised_to_convert(dtype: str, times: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "wide", Shape(), "bf16", edit_tensors=in_dtype(dtype))
    with Checkpoint.open(folder) as checkpoint:
        model = identify_model(checkpoint)
    with pytest.raises(
        UsageError, match=f"no expert count fits; converted to MXFP4, experts are {times} times"
    ):
        check_memory(CUDA, model, free=0)


def test_the_cpu_needs_no_memory_for_mapped_weights(full_size: ModelSpec) -> None:
    assert free_memory(torch.device("cpu")) is None
    check_memory(torch.device("cpu"), full_size)


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_is_there(name: str | torch.device) -> None:
    assert open_device(name).type == "cpu"


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cuda:-1", "tpu:0", "1 2"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_device(name)
    assert str(caught.value) == f"`device` {name}: unknown device; choose cpu, cuda, cuda:N or mps"


@pytest.mark.parametrize("name", ["meta", "xpu", "vulkan"])
def test_a_device_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(
        UsageError, match=f"`device` {name}: unsupported device; choose cpu, cuda, cuda:N or mps"
    ):
        open_device(name)


@no_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_cuda_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"`device` {name}: torch finds no CUDA device here"):
        open_device(name)


@no_mps
def test_mps_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="`device` mps: MPS is not available here"):
        open_device("mps")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64])
def test_a_dtype_that_is_not_offered_is_refused(small: Path, dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=f"`dtype` {dtype}: choose one of torch.float32, torch.bfloat16"):
        load_model(small, dtype=dtype)
