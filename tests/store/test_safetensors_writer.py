"""Oracle: safetensors reads the tensors that were written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from epmq_cli.store.hashing import Content
from epmq_cli.store.safetensors_writer import Entry, of, writable_types, write_file, write_model


def tensors() -> dict[str, Tensor]:
    """One of every type, odd numbers of items, a scalar, an empty tensor, a non-contiguous one, and one with a
    single item and the strides of a transposed tensor."""
    rows = 10 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = {f"part.{name}": rows.to(dtype) for name, dtype in writable_types().items()}
    return {
        **found,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "turned": rows.T,
        "single": rows[:1].T[:1],
    }


def test_tensors_of_every_type_are_read_back(tmp_path: Path) -> None:
    written = write_file(tmp_path / "model.safetensors", [of(name, tensor) for name, tensor in tensors().items()])
    content = (tmp_path / "model.safetensors").read_bytes()
    assert written == Content(len(content), hashlib.sha256(content).hexdigest())
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_shards_are_within_the_limit_and_the_index_has_every_tensor(tmp_path: Path) -> None:
    write_model(tmp_path, [of(name, tensor) for name, tensor in tensors().items()], 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    shards = {file: load_file(tmp_path / file) for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors().values())
    assert index["weight_map"].keys() == tensors().keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(shards[file][name], tensors()[name])
    for shard in shards.values():
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 100


def test_tensors_within_the_limit_are_one_file_without_index(tmp_path: Path) -> None:
    write_model(tmp_path, [of("weight", torch.ones(3))], 12)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_each_tensor_is_computed_once_and_in_order(tmp_path: Path) -> None:
    made: list[str] = []

    def entry(name: str) -> Entry:
        def make() -> Tensor:
            made.append(name)
            return torch.ones(2)

        return Entry(name, torch.float32, (2,), make)

    write_model(tmp_path, [entry(name) for name in "abc"], 16)
    assert made == ["a", "b", "c"]
