"""Oracle: the tensors that transformers and safetensors write. Error messages name corrupted files."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.resolve import SHIPPED, locate


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}, tmp_path / "model.safetensors"
    )
    return tmp_path


def test_reads_config_shapes_types_and_tensors(single: Path) -> None:
    folder = ModelFolder(single, "base")
    assert folder.config == {"model_type": "x"}
    assert {name: (info.shape, info.dtype) for name, info in folder.infos.items()} == {
        "a": ((2, 3), "F32"),
        "b": ((2,), "F16"),
    }
    assert torch.equal(folder.tensor("a"), torch.arange(6.0).reshape(2, 3))
    assert folder.tensor("b").dtype == torch.float16


def test_shards_are_read_through_their_index(clip_hub: Path, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(clip_hub / "base")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    folder = ModelFolder(tmp_path, "base")
    state = {name: tensor for name, tensor in model.state_dict().items() if "position_ids" not in name}
    assert folder.infos.keys() == state.keys()
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in state.items())


def test_a_single_file_of_another_name_is_read(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    assert set(ModelFolder(single, "base").infos) == {"a", "b"}


def test_a_single_file_beside_an_index_is_read_as_in_transformers(clip_hub: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_hub / "base", tmp_path / "base")
    single = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: 0 * tensor for name, tensor in single.items()}, tmp_path / "base" / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(single, "other.safetensors")}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    wanted = CLIPModel.from_pretrained(tmp_path / "base").visual_projection.weight
    assert torch.equal(ModelFolder(tmp_path / "base", "base").tensor("visual_projection.weight"), wanted)
    assert wanted.any()


def test_a_config_that_names_its_own_files_is_refused(single: Path) -> None:
    (single / "config.json").write_text('{"model_type": "x", "transformers_weights": "other.safetensors"}')
    with pytest.raises(ModelError, match="sets transformers_weights, which epmq does not support; rename the weights"):
        ModelFolder(single, "base")


@pytest.mark.parametrize("keep", [0, 4, 40, 100])
def test_truncated_files_are_named(single: Path, keep: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ModelError, match=r"base: .*model.safetensors is corrupted or not a safetensors file .*fetch it again"
    ):
        ModelFolder(single, "base")


def test_missing_parts_are_named(single: Path) -> None:
    (single / "model.safetensors").rename(single / "shard.safetensors")
    index = {"weight_map": {"a": "shard.safetensors", "c": "shard.safetensors"}}
    (single / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="the index of .* names the tensor 'c', which is not in its file; fetch"):
        ModelFolder(single, "base")
    (single / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    with pytest.raises(ModelError, match="the index of .* names 'other.safetensors', which is not in that folder"):
        ModelFolder(single, "base")


def test_an_index_cannot_name_files_outside_its_folder(single: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "model.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    (single / "model.safetensors").unlink()
    (single / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": f"../{outside.parent.name}/model.safetensors"}})
    )
    with pytest.raises(ModelError, match="is not in that folder"):
        ModelFolder(single, "base")


def test_folders_without_weights_or_config_say_what_to_do(single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.zip")
    with pytest.raises(ModelError, match="has no .*safetensors; give the folder that save_pretrained"):
        ModelFolder(single, "base")
    (single / "weights.zip").rename(single / "model.safetensors")
    (single / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json is not valid JSON"):
        ModelFolder(single, "base")
    (single / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config.json"):
        ModelFolder(single, "base")


def test_locate_finds_folders_and_shipped_models(tmp_path: Path) -> None:
    assert locate(str(tmp_path), "base") == tmp_path
    assert locate("shipped:tiny/base", "base") == SHIPPED / "tiny" / "base"
    with pytest.raises(ModelError, match="base: shipped:huge is not shipped with epmq"):
        locate("shipped:huge", "base")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere"])
def test_missing_paths_are_not_requested_from_the_hub(source: str) -> None:
    with pytest.raises(ModelError, match=r"is neither an existing folder or file .* nor a hub id .*; check the path"):
        locate(source, "base")


def test_the_error_for_an_id_that_is_unavailable_offline() -> None:
    with pytest.raises(
        ModelError, match="expert of task x: someone/something was not found locally and cannot be downloaded"
    ):
        locate("someone/something", "expert of task x")


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A mirror with owner/name, which has a folder and a file, and with one revision of it."""
    for folder in ("owner/name/sub", "owner/name@v1.0", "plain"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "owner/name/sub/expert.pt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("owner/name", "owner/name"),
        ("plain", "plain"),
        ("owner/name@v1.0", "owner/name@v1.0"),
        ("owner/name:sub", "owner/name/sub"),
        ("owner/name:sub/expert.pt", "owner/name/sub/expert.pt"),
    ],
)
def test_ids_are_looked_for_in_the_mirror(source: str, path: str, mirror: Path) -> None:
    assert locate(source, "base", str(mirror)) == mirror / path


@pytest.mark.parametrize("source", ["owner/other", "owner/name@v2", "owner/name:sub/none.pt"])
def test_ids_outside_the_mirror_are_requested_from_the_hub(source: str, mirror: Path) -> None:
    repo = source.partition("@")[0].partition(":")[0]
    with pytest.raises(ModelError, match=f"{repo} was not found locally or under {mirror} and cannot be downloaded"):
        locate(source, "base", str(mirror))


@pytest.mark.parametrize("name", ["../../..", "/etc", "tiny/../../shipped", ".."])
def test_shipped_models_are_inside_the_package(name: str) -> None:
    with pytest.raises(ModelError, match=f"base: shipped:{name} is not shipped with epmq"):
        locate(f"shipped:{name}", "base")


@pytest.mark.parametrize(
    "source",
    [
        "owner/name:../../secret.pt",
        "owner/name:/etc",
        "owner/name:sub/../../x",
        "x.pt",
        "owner/..",
        "owner/name@v1.0/../../..",
    ],
)
def test_paths_inside_an_id_stay_inside(source: str, mirror: Path) -> None:
    with pytest.raises(ModelError, match="is neither an existing folder or file .* nor a hub id"):
        locate(source, "base", str(mirror))


def test_only_files_that_are_read_are_requested_in_the_given_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, [fnmatch(file, p) for file in FILES for p in allow_patterns].count(True)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.pt").touch()
    assert locate("owner/name@main", "base") == tmp_path
    assert locate("owner/name@refs/pr/1:a/x.pt", "base") == tmp_path / "a/x.pt"
    assert locate("owner/name:a", "base") == tmp_path / "a"
    assert asked == [("owner/name", "main", 4), ("owner/name", "refs/pr/1", 2), ("owner/name", None, 2)]


FILES = (
    "model.safetensors",
    "adapter_config.json",
    "pytorch_model.bin",
    "a/x.pt",
    "a/config.json",
    "a/model.safetensors",
)
