"""Real quantised weights, by the gguf package: pruning before quantising and after it give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_surgery import prune

from .models import rows

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

EXPERTS, HIDDEN, WIDTH, BLOCKS = 8, 256, 256, 2
KEPT = ([6, 1, 3], [0, 4, 7])
FLOATS = {"F32": np.float32, "F16": np.float16}


def quantises(kind: Any) -> bool:
    try:
        quants.quantize(np.ones((1, 256), np.float32), kind)
    except NotImplementedError:
        return False
    return True


KINDS = [kind for kind in gguf.GGMLQuantizationType if kind.name not in FLOATS and quantises(kind)]


def weights(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    made = {"token_embd.weight": values(4, HIDDEN), "output_norm.weight": values(HIDDEN)}
    for block in range(BLOCKS):
        prefix = f"blk.{block}."
        made[prefix + "ffn_gate_inp.weight"] = values(EXPERTS, HIDDEN)
        made[prefix + "ffn_gate_exps.weight"] = values(EXPERTS, WIDTH, HIDDEN)
        made[prefix + "ffn_up_exps.weight"] = values(EXPERTS, WIDTH, HIDDEN)
        made[prefix + "ffn_down_exps.weight"] = values(EXPERTS, HIDDEN, WIDTH)
    return made


def cut(made: dict[str, Any]) -> dict[str, Any]:
    """The same weights with only the kept experts."""
    result = {}
    for name, values in made.items():
        block = name.split(".")[1] if name.startswith("blk.") else ""
        result[name] = values[KEPT[int(block)]] if block else values
    return result


def write(path: Path, made: dict[str, Any], kind: Any) -> Path:
    """With the gguf package's writer; experts as `kind`."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(BLOCKS)
    writer.add_expert_count(made["blk.0.ffn_gate_inp.weight"].shape[0])
    writer.add_expert_used_count(2)
    for name, values in made.items():
        if "_exps" in name:
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """With the gguf package's reader."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in tensors}


def test_the_package_quantises_several_types() -> None:
    assert {"Q4_0", "Q8_0", "TQ1_0", "BF16"} <= {kind.name for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_quantised_then_pruned_is_pruned_then_quantised(tmp_path: Path, kind: Any) -> None:
    made = weights(0)
    source = write(tmp_path / "full.gguf", made, kind)
    expected = write(tmp_path / "cut.gguf", cut(made), kind)
    prune(source, tmp_path / "out.gguf", rows(*KEPT))
    assert read(tmp_path / "out.gguf") == read(expected)


def test_the_package_reads_the_metadata(tmp_path: Path) -> None:
    source = write(tmp_path / "full.gguf", weights(0), gguf.GGMLQuantizationType.Q8_0)
    prune(source, tmp_path / "out.gguf", rows(*KEPT))
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["qwen3moe.expert_count"].contents() == 3
    assert fields["moe_surgery.kept_experts"].contents() == [*KEPT[0], *KEPT[1]]
