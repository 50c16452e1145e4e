"""Oracles: the folders that other tools write, and the printed conversion commands, which the tests run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open import open_base, open_expert
from epmq_cli.models.state_dict import open_file
from tests.helpers.minihub import IDS, SIZE, tokenizer


def saved(folder: Path, shards: bool = False) -> LlamaForCausalLM:
    """Saves a model and its tokenizer in the format of transformers 4."""
    model = LlamaForCausalLM(LlamaConfig(**SIZE, **IDS))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    tokenizer(folder, end=False)
    state = model.state_dict()
    names = list(state)
    if not shards:
        torch.save(state, folder / "pytorch_model.bin")
        return model
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: files[index % 2] for index, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return model


@pytest.mark.parametrize("shards", [False, True])
def test_the_command_for_a_folder_of_pickles_makes_a_model_folder(shards: bool, tmp_path: Path) -> None:
    """Oracle: the saved tensors. The folder name contains a space and a quote."""
    folder = tmp_path / "it's mine"
    model = saved(folder, shards)
    with pytest.raises(ModelError, match="base: .* stores its weights as a pickle .*; convert it and give") as raised:
        open_base(folder, "base")
    code = shlex.split(str(raised.value).partition("new folder: ")[2])
    assert code[:2] == ["python", "-c"]
    assert len(code) == 3
    exec(code[2], {})
    made = tmp_path / "it's mine-safetensors"
    base = open_base(made, "base")
    assert all(torch.equal(base.tensor(name), tensor) for name, tensor in model.state_dict().items())
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in made.iterdir()}


def test_an_expert_may_be_given_as_the_file_and_a_base_may_not(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ModelError) as of_base:
        open_base(tmp_path, "base")
    assert "give the file" not in str(of_base.value)
    base = ModelFolder(tmp_path, "base", {}, open_expert_tensors(tmp_path))
    with pytest.raises(ModelError, match=r"or give the file .*pytorch_model.bin itself"):
        open_expert(tmp_path, "expert of task a", base, ())
    assert open_expert(tmp_path / "pytorch_model.bin", "expert of task a", base, ()).infos


def open_expert_tensors(folder: Path) -> ModelFolder:
    return ModelFolder(folder, "base", {}, open_file(folder / "pytorch_model.bin", "base"))


def test_the_error_for_a_trainers_folder_names_the_folders_inside(tmp_path: Path) -> None:
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_text("")
    with pytest.raises(ModelError, match=r"give one of them: .*checkpoint-500, .*checkpoint-1000$"):
        open_base(tmp_path, "base")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.Q4_K_M.gguf"], "contains llama.cpp weights"),
        (["consolidated.00.pth", "params.json"], "their authors' own format"),
        (["config.json", "tf_model.h5"], "transformers 4 .*from_tf=True"),
        (["config.json", "flax_model.msgpack"], "transformers 4 .*from_flax=True"),
        (["config.json", "model.onnx"], "an ONNX export"),
        (["config.json", "__0_0.distcp"], "accelerate merge-weights"),
        (["config.json", "zero_to_fp32.py", "latest"], r"zero_to_fp32.py . OUT"),
        (["config.json", "optimizer.pt", "trainer_state.json"], "the state of a trainer"),
        (["model.safetensors"], "has no config.json"),
        (["config.json"], r"has no \*.safetensors"),
        ([], "has no config.json"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_the_error_names_the_actual_contents_of_a_folder(files: list[str], message: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=f"base: .*{message}") as raised:
        open_base(tmp_path, "base")
    assert "\n" not in str(raised.value)
