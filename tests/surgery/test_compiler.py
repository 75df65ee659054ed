"""The program, evaluated with numpy, gives the same tensors as slicing the source."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors import deserialize

from moe_surgery import Plan, identify_model
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.header import parse_header
from moe_surgery.engine.spans import Copy, Span
from moe_surgery.errors import PlanMismatchError, UsageError
from moe_surgery.surgery.compiler import compile_program
from moe_surgery.surgery.program import Decode, Encode, OutputShard, Part, Program
from tests.support.checkpoints import (
    INDEX,
    LAYOUTS,
    Shape,
    Tensors,
    decode_transposed,
    kept_tensors,
    make_config,
    make_tensors,
    to_bf16,
    write_checkpoint,
    write_folder,
)

WIDTH = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Job:
    """A source checkpoint and a pruning job."""

    shape: Shape
    layout: str
    shards: int
    seed: int
    widened: str | None
    plan: Plan
    store: str
    max_shard_size: int

    @property
    def storage(self) -> str:
        if self.store != "keep":
            return self.store
        return "mxfp4" if self.layout in ("mxfp4", "original") else "bf16"

    def source(self) -> Tensors:
        """The source's tensors by their names in its layout."""
        tensors = make_tensors(self.shape, self.layout, self.seed)
        if self.widened is not None:
            name = self.widened
            if self.layout == "original":
                name = {"model.norm.weight": "norm.scale", "lm_head.weight": "unembedding.weight"}[name]
            tensors[name] = tensors[name].astype(np.float32)
        return tensors

    def write(self, folder: Path) -> Path:
        config = make_config(self.shape, self.layout)
        return write_folder(folder, self.source(), config, shards=self.shards, seed=self.seed)

    def expected(self) -> Tensors:
        """Output tensors by numpy slicing; for an encoded weight, the BF16 values under its base name."""
        unchanged = self.storage == "mxfp4" and self.layout in ("mxfp4", "original")
        tensors = make_tensors(self.shape, "mxfp4" if unchanged else "bf16", self.seed)
        if self.widened is not None:
            tensors[self.widened] = tensors[self.widened].astype(np.float32)
        return kept_tensors(tensors, self.plan.layers)

    def compile(self, folder: Path) -> Program:
        with Checkpoint.open(folder) as checkpoint:
            return compile_program(
                checkpoint,
                identify_model(checkpoint),
                self.plan,
                store=self.store,
                max_shard_size=self.max_shard_size,
            )


def plans(shape: Shape) -> st.SearchStrategy[Plan]:
    order = st.permutations(range(shape.experts))
    rows = st.lists(order, min_size=shape.layers, max_size=shape.layers)
    counts = st.integers(1, shape.experts)
    top_k = st.none() | st.integers(1, 5)
    return st.builds(
        lambda rows, n, k: Plan("gpt_oss", shape.experts, tuple(tuple(r[:n]) for r in rows), k),
        rows,
        counts,
        top_k,
    )


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    layout = draw(st.sampled_from(LAYOUTS))
    dtype = draw(st.sampled_from(["keep", "bf16", "mxfp4"]))
    any_size = layout in ("bf16", "resaved") and dtype != "mxfp4"
    dimension = st.integers(1, 40) if any_size else st.sampled_from([32, 64, 96])
    experts = draw(st.integers(1, 6))
    shape = Shape(
        layers=draw(st.integers(1, 3)),
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        hidden=draw(dimension),
        intermediate=draw(dimension),
        heads=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 5)),
        vocabulary=draw(st.integers(1, 9)),
    )
    return Job(
        shape,
        layout,
        draw(st.integers(1, 6)),
        draw(st.integers(0, 100)),
        draw(st.sampled_from([None, "model.norm.weight", "lm_head.weight"])),
        draw(plans(shape)),
        dtype,
        draw(st.integers(1, 20).map(lambda bits: 2**bits) | st.integers(1, 200_000)),
    )


# --- resolving a program


def read(folder: Path, span: Span) -> bytes:
    with (folder / span.shard).open("rb") as file:
        file.seek(span.offset)
        data = file.read(span.nbytes)
    assert len(data) == span.nbytes
    return data


def resolve(folder: Path, part: Part) -> bytes:
    """The bytes of a part; zeros for one that encodes."""
    if isinstance(part, Copy):
        return read(folder, part.span)
    if isinstance(part, Decode):
        groups = part.columns // 32
        blocks = np.frombuffer(read(folder, part.blocks), np.uint8).reshape(part.rows, groups, 16)
        scales = np.frombuffer(read(folder, part.scales), np.uint8).reshape(part.rows, groups)
        return decode_transposed(blocks, scales).tobytes()
    return bytes(part.nbytes)


def is_dense(name: str) -> bool:
    return ".mlp." not in name


def tensor_bytes(shard: OutputShard) -> int:
    return sum(t.nbytes for t in shard.tensors)


# --- the rules


@given(jobs())
@examples(max_examples=75)
def test_every_output_byte_is_the_one_that_slicing_gives(job: Job) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = job.write(Path(temporary) / "in")
        program = job.compile(folder)
        expected = job.expected()
        encodes = job.storage == "mxfp4" and job.layout in ("bf16", "resaved")
        weights = {n for n in expected if n.endswith(("gate_up_proj", "down_proj"))} if encodes else set()
        names = {n for n in expected if n not in weights}
        names |= {n + suffix for n in weights for suffix in ("_blocks", "_scales")}
        result = [t for s in program.shards for t in s.tensors]
        assert sorted(t.name for t in result) == sorted(names)

        for shard in program.shards:
            data = [b"".join(resolve(folder, part) for part in t.parts) for t in shard.tensors]
            # The safetensors library reads the file that comes out, header and all.
            read_back = dict(deserialize(shard.header + b"".join(data)))
            assert sorted(read_back) == sorted(t.name for t in shard.tensors)
            for tensor, content in zip(shard.tensors, data, strict=True):
                entry = read_back[tensor.name]
                assert (entry["dtype"], tuple(entry["shape"])) == (tensor.dtype, tensor.shape)
                assert bytes(entry["data"]) == content
                base = tensor.name.removesuffix("_blocks").removesuffix("_scales")
                if base in weights:
                    check_encoded(folder, tensor.parts, expected[base], tensor.name.endswith("_scales"))
                    groups = (*expected[base].swapaxes(1, 2).shape[:2], expected[base].shape[1] // 32)
                    assert tensor.dtype == "U8"
                    assert tensor.shape == (groups if tensor.name.endswith("_scales") else (*groups, 16))
                else:
                    wanted = expected[tensor.name]
                    assert WIDTH[tensor.dtype] == wanted.dtype.itemsize
                    assert tensor.shape == wanted.shape
                    assert content == wanted.tobytes()


def check_encoded(folder: Path, parts: tuple[Part, ...], values: np.ndarray, scales: bool) -> None:
    """Each part encodes one kept expert's values, [columns, rows], in order."""
    assert len(parts) == len(values)
    for part, expert in zip(parts, values, strict=True):
        assert isinstance(part, Encode)
        assert part.scales == scales
        assert (part.columns, part.rows) == expert.shape
        assert read(folder, part.values) == expert.tobytes()


@given(jobs())
@examples(max_examples=75)
def test_shards_follow_their_rules(job: Job) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        program = job.compile(job.write(Path(temporary) / "in"))
    limit, shards = job.max_shard_size, program.shards

    for shard in shards:
        names = {t.name for t in shard.tensors}
        bases = {n.removesuffix("_blocks").removesuffix("_scales") for n in names}
        alone = len(shard.tensors) == 1 or (len(shard.tensors) == 2 and len(bases) == 1)
        assert tensor_bytes(shard) <= limit or alone
        for tensor in shard.tensors:
            if isinstance(tensor.parts[0], Encode):
                base = tensor.name.removesuffix("_blocks").removesuffix("_scales")
                assert {base + "_blocks", base + "_scales"} <= names

    kinds = [{is_dense(t.name) for t in s.tensors} for s in shards]
    if len(shards) == 1:
        assert shards[0].name == "model.safetensors"
        assert INDEX not in program.texts
    else:
        assert all(len(kind) == 1 for kind in kinds)
        assert kinds == sorted(kinds, key=lambda kind: True not in kind)
        assert sum(map(tensor_bytes, shards)) > limit
        expected = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        assert [s.name for s in shards] == expected
        index = json.loads(program.texts[INDEX])
        assert index["weight_map"] == {t.name: s.name for s in shards for t in s.tensors}
        assert index["metadata"]["total_size"] == sum(map(tensor_bytes, shards))
    # No two neighbours of a kind would have fit one shard.
    for (one, kind), (two, other) in pairwise(zip(shards, kinds, strict=True)):
        assert kind != other or tensor_bytes(one) + tensor_bytes(two) > limit


@given(jobs())
@examples(max_examples=50)
def test_every_tensor_is_aligned_to_its_dtype(job: Job) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        program = job.compile(job.write(Path(temporary) / "in"))
    for shard in program.shards:
        length = int.from_bytes(shard.header[:8], "little")
        assert len(shard.header) == 8 + length
        assert len(shard.header) % 8 == 0
        assert shard.header[8:9] == b"{"
        for name, entry in json.loads(shard.header[8:]).items():
            if name != "__metadata__":
                assert (len(shard.header) + entry["data_offsets"][0]) % WIDTH[entry["dtype"]] == 0


@given(jobs(), st.data())
@examples(max_examples=40)
def test_the_digest_is_the_same_for_the_same_job_and_another_for_another_plan(
    job: Job, data: st.DataObject
) -> None:
    other = data.draw(plans(job.shape).filter(lambda plan: plan != job.plan))
    with tempfile.TemporaryDirectory() as temporary:
        folder = job.write(Path(temporary) / "in")
        digest = job.compile(folder).digest()
        assert job.compile(folder).digest() == digest
        assert replace(job, plan=other).compile(folder).digest() != digest


def test_a_shard_may_be_exactly_full(tmp_path: Path) -> None:
    job = Job(Shape(), "mxfp4", 1, 0, None, Plan("gpt_oss", 4, ((0,), (2,))), "keep", 10**9)
    folder = job.write(tmp_path / "in")
    (whole,) = job.compile(folder).shards
    total = tensor_bytes(whole)
    assert len(replace(job, max_shard_size=total).compile(folder).shards) == 1
    assert len(replace(job, max_shard_size=total - 1).compile(folder).shards) == 2


def test_the_digest_changes_with_source_dtype_and_shard_size(tmp_path: Path) -> None:
    shape = Shape()
    plan = Plan("gpt_oss", 4, ((0, 2),) * 2)
    job = Job(shape, "mxfp4", 1, 0, None, plan, "keep", 10**6)
    jobs_apart = [
        job,
        replace(job, store="bf16"),
        replace(job, max_shard_size=10**4),
        replace(job, shards=2),
        replace(job, layout="bf16"),
    ]
    digests = [
        each.compile(each.write(tmp_path / str(number))).digest() for number, each in enumerate(jobs_apart)
    ]
    assert len(set(digests)) == len(digests)


def test_neighbouring_experts_are_read_as_one_run(tmp_path: Path) -> None:
    plan = Plan("gpt_oss", 8, ((1, 2, 3, 6, 5, 7), (0, 1, 2, 3, 4, 5)))
    job = Job(Shape(experts=8), "mxfp4", 3, 0, None, plan, "keep", 10**9)
    program = job.compile(job.write(tmp_path / "in"))
    runs = {t.name: len(t.parts) for s in program.shards for t in s.tensors}
    assert {n for name, n in runs.items() if ".layers.0.mlp." in name} == {4}
    assert {n for name, n in runs.items() if ".layers.1.mlp." in name} == {1}


def test_the_largest_copy_keeps_its_place_in_a_block_of_the_file_system(tmp_path: Path) -> None:
    shape = Shape(layers=1, hidden=512)
    plan = Plan("gpt_oss", 4, ((0, 1, 2, 3),))
    job = Job(shape, "mxfp4", 2, 0, None, plan, "keep", 10**9)
    (shard,) = job.compile(job.write(tmp_path / "in")).shards
    header = parse_header(shard.header, shard.nbytes, file="the shard")
    largest = max(shard.tensors, key=lambda t: t.nbytes)
    (part,) = largest.parts
    assert isinstance(part, Copy)
    assert (header.data_start + header.tensors[largest.name].begin - part.span.offset) % 4096 == 0


def test_an_expert_mapping_tells_old_numbers_from_new(tmp_path: Path) -> None:
    plan = Plan("gpt_oss", 4, ((3, 1), (0, 2)))
    job = Job(Shape(), "mxfp4", 1, 0, None, plan, "keep", 10**9)
    program = job.compile(job.write(tmp_path / "in"))
    assert json.loads(program.texts["expert_mapping.json"]) == {
        "0": {"3": 0, "1": 1},
        "1": {"0": 0, "2": 1},
    }


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan("gpt_oss", 4, ((0, 1), (2,))), "between 1 and 2 experts per layer"),
        (Plan("gpt_oss", 5, ((0,), (2,))), "the plan is for gpt_oss with 2 layers of 5 experts"),
        (Plan("gpt_oss", 4, ((0,),)), "the plan is for gpt_oss with 1 layers of 4 experts"),
        (Plan("mixtral", 4, ((0,), (2,))), "the plan is for mixtral"),
    ],
    ids=["uneven", "experts", "layers", "model type"],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Plan, expected: str, tmp_path: Path) -> None:
    job = Job(Shape(), "mxfp4", 1, 0, None, plan, "keep", 10**9)
    with pytest.raises(PlanMismatchError, match=expected):
        job.compile(job.write(tmp_path / "in"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"store": "fp8"}, "`store` fp8: choose one of keep, bf16, mxfp4"),
        ({"max_shard_size": 0}, "`max_shard_size` 0: must be at least one byte"),
        ({"max_shard_size": -5}, "`max_shard_size` -5: must be at least one byte"),
    ],
    ids=str,
)
def test_invalid_options_are_refused_meant_are_refused(
    change: dict[str, object], expected: str, tmp_path: Path
) -> None:
    job = Job(Shape(), "mxfp4", 1, 0, None, Plan("gpt_oss", 4, ((0,), (2,))), "keep", 10**9)
    with pytest.raises(UsageError, match=expected):
        replace(job, **change).compile(job.write(tmp_path / "in"))  # type: ignore[arg-type]


def test_weights_of_no_whole_blocks_cannot_become_mxfp4(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(hidden=48), "bf16")
    job = Job(Shape(hidden=48), "bf16", 1, 0, None, Plan("gpt_oss", 4, ((0,), (2,))), "mxfp4", 10**9)
    with pytest.raises(UsageError, match=r"gate_up_proj' has 48 columns, not a multiple of 32"):
        job.compile(source)


def test_bf16_source_gives_the_values_that_the_mxfp4_source_decodes_to() -> None:
    """The two kinds of source compared above hold the same model."""
    shape = Shape()
    assert sorted(to_bf16(make_tensors(shape))) == sorted(make_tensors(shape, "bf16"))
