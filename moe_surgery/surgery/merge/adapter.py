"""A PEFT adapter as saved: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from moe_surgery.checkpoint.additions import ADAPTER_CONFIG
from moe_surgery.checkpoint.checkpoint import TensorRef, open_folder
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.shard import Shard
from moe_surgery.checkpoint.source import Folder, read_small
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import printable
from moe_surgery.engine.chunks import plain_chunks
from moe_surgery.engine.digest import FileDigest, digest_chunks
from moe_surgery.errors import InvalidInputError, OutputError
from moe_surgery.formats.expert_format import ExpertFormat, format_of_dtype
from moe_surgery.surgery.merge.config import LoraConfig, parse_config

__all__ = ["Adapter", "Pair"]

WEIGHTS_NAME: Final = "adapter_model.safetensors"
SHARD: Final = "adapter:" + WEIGHTS_NAME
"""The adapter's file among the shards that a program reads; no file of a checkpoint is called that."""
MAX_CONFIG_BYTES: Final = 10_000_000
_PREFIXES: Final = ("base_model.model.", "base_model.")
_LORA: Final = re.compile(
    r"(?P<module>.+?)\.lora_(?P<factor>A|B|embedding_A|embedding_B)(?P<name>\.[^.]+)??(?P<leaf>\.weight|\.bias)?"
)
_SAVED: Final = re.compile(r"\.modules_to_save(\.[^.]+(?=\.))?|\.base_layer|\.original_module")


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one LoRA layer on `module`: a [rank, inputs] and b [outputs, rank], of all experts together where
    it is on a stacked parameter.

    `depth` counts the layers around it on the same module: PEFT wraps a module once for each parameter, the first
    one innermost. Of an `embedding` a is [rank, vocabulary] and b [hidden, rank]. `bias` is that of the second factor.
    """

    module: str
    depth: int
    a: TensorRef
    b: TensorRef
    bias: TensorRef | None = None
    embedding: bool = False


class Adapter:
    """An open adapter: `pairs` of factors, and `saved` tensors, by name, that replace the model's. Close it, or use it
    as a context manager."""

    def __init__(self, name: str, path: Path, config: LoraConfig, config_digest: str, shard: Shard) -> None:
        self.name = name
        self.path = path
        self.config = config
        self.config_digest = config_digest
        self.shard = shard
        self.pairs, self.saved = _entries(self._refs(), self.where)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Folder) -> Adapter:
        """Open the adapter in a folder, or one on the hub (owner/name, with @revision if not the latest).

        Reads the configuration and the header. Raises OutputError where there is no adapter, InvalidInputError for
        one that is malformed or no plain LoRA adapter.
        """
        if not isinstance(path, Folder) and Path(path).name in (ADAPTER_CONFIG, WEIGHTS_NAME):
            path = Path(path).parent
        files = path if isinstance(path, Folder) else open_folder(path)
        with ExitStack() as stack:
            stack.callback(files.close)
            listing = files.listing()
            for name in (ADAPTER_CONFIG, WEIGHTS_NAME):
                if name not in listing:
                    raise OutputError(
                        f"{printable_path(files.path / name)}: not found; pass the folder of a PEFT adapter"
                        + _other_weights(listing)
                    )
            with files.open(ADAPTER_CONFIG) as source:
                where, raw = (
                    source.where,
                    read_small(source, limit=MAX_CONFIG_BYTES, what="an adapter's config"),
                )
            config = parse_json(raw, where=where, allow_floats=True)
            if not isinstance(config, dict):
                raise InvalidInputError(f"{where}: not a JSON object")
            parsed = parse_config(config, where)
            shard = stack.enter_context(Shard(WEIGHTS_NAME, files.open(WEIGHTS_NAME)))
            known = files.hub_model
            name = known[0].rpartition("/")[2] if known else Path(os.path.abspath(files.path)).name
            adapter = cls(name, files.path, parsed, xxhash.xxh3_128_hexdigest(raw), shard)
            stack.pop_all()
        return adapter

    def _refs(self) -> dict[str, TensorRef]:
        start = self.shard.header.data_start
        return {
            info.name: TensorRef(info.name, SHARD, info.dtype, info.shape, start + info.begin, info.nbytes)
            for info in self.shard.header.tensors.values()
        }

    @property
    def where(self) -> str:
        return self.shard.where

    def digest(self) -> str:
        """xxh3_128 of the file of weights; reads all of it."""
        chunks = plain_chunks(self.shard.nbytes)
        return digest_chunks(self.shard.source, chunks, FileDigest(), lambda _: None).whole

    def format_of(self, ref: TensorRef) -> ExpertFormat:
        """The number format of a tensor. Raises InvalidInputError for one that is not BF16, F16 or F32."""
        stored = format_of_dtype(ref.dtype)
        if stored is None:
            raise self.error(ref, f"is stored as {ref.dtype}; BF16, F16 or F32 is needed")
        return stored

    def error(self, ref: TensorRef, problem: str) -> InvalidInputError:
        return InvalidInputError(f"{self.where}: tensor '{printable(ref.name)}' {problem}")

    def close(self) -> None:
        self.shard.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _other_weights(listing: object) -> str:
    if isinstance(listing, dict) and "adapter_model.bin" in listing:
        return "; adapter_model.bin is a PyTorch file (pickle): load it with PEFT and save it again"
    return ""


def _entries(refs: dict[str, TensorRef], where: str) -> tuple[tuple[Pair, ...], dict[str, TensorRef]]:
    """Pairs of factors and saved tensors, with the names that modules have in the model."""
    factors: dict[tuple[str, int, bool], dict[str, TensorRef]] = {}
    saved: dict[str, TensorRef] = {}
    for key, ref in refs.items():
        name = next((key.removeprefix(p) for p in _PREFIXES if key.startswith(p)), key)
        if ".lora_" not in name:
            plain = _SAVED.sub("", name)
            if plain in saved:
                raise InvalidInputError(
                    f"{where}: tensors '{printable(saved[plain].name)}' and '{printable(key)}' stand for the same "
                    "weight"
                )
            saved[plain] = ref
            continue
        match = _LORA.fullmatch(name)
        if match is None or (match["leaf"] == ".bias" and match["factor"] != "B"):
            what = (
                "is part of a DoRA adapter"
                if "magnitude" in name
                else "is not a known part of a LoRA adapter"
            )
            raise InvalidInputError(
                f"{where}: tensor '{printable(key)}' {what}; merge it with PEFT's merge_and_unload"
            )
        module = match["module"]
        plain, depth, factor = module.replace(".base_layer", ""), module.count(".base_layer"), match["factor"]
        slot = "bias" if match["leaf"] == ".bias" else factor[-1]
        entry = factors.setdefault((plain, depth, len(factor) > 1), {})
        if slot in entry:
            raise InvalidInputError(f"{where}: tensor '{printable(key)}': a second adapter's; save only one")
        entry[slot] = ref
    pairs = []
    for (module, depth, embedding), entry in factors.items():
        if "A" not in entry or "B" not in entry:
            lone = next(iter(entry.values()))
            raise InvalidInputError(
                f"{where}: tensor '{printable(lone.name)}' has no counterpart lora_A or lora_B"
            )
        a, b = entry["A"], entry["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise InvalidInputError(
                f"{where}: tensors '{printable(a.name)}' {list(a.shape)} and '{printable(b.name)}' {list(b.shape)} are "
                "not [rank, inputs] and [outputs, rank]; a sharded training run may have saved a part only"
            )
        pairs.append(Pair(module, depth, a, b, entry.get("bias"), embedding))
    return tuple(pairs), saved
