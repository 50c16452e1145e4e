"""Oracles: the outputs of transformers, the files that save_pretrained writes, and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from epmq_cli.checkpoint.engine import Base
from epmq_cli.checkpoint.engines import check_engine_model
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.models.conv1d import as_stored, with_linears
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open import open_base, open_expert
from epmq_cli.store.safetensors_writer import of
from tests.helpers.architectures import TAKEN, built
from tests.helpers.formats import ints
from tests.helpers.packs import exporter_of
from tests.models.lora.test_adapter import adapter

IDS = torch.tensor([[1, 5, 6, 7, 8, 9], [3, 2, 1, 5, 9, 9]])
FC = "transformer.h.0.mlp.c_fc.weight"


def test_linears_compute_what_conv1d_does_under_the_names_of_files(tmp_path: Path) -> None:
    model = built(TAKEN["gpt2"])
    model.save_pretrained(tmp_path)
    names, wanted = [*model.state_dict()], model(IDS).logits
    own = with_linears(model)
    assert own is model
    assert isinstance(own.transformer.h[0].mlp.c_fc, nn.Linear)
    torch.testing.assert_close(own(IDS).logits, wanted)
    assert [*own.state_dict()] == names
    folder = ModelFolder(tmp_path, "base")
    for name in folder.infos:
        tensor = own.state_dict()[name]
        assert folder.infos[name].shape == tuple(tensor.shape)
        assert torch.equal(folder.tensor(name), tensor)
    entries = as_stored("gpt2", (of(name, own.state_dict()[name]) for name in folder.infos))
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        [entry] = [entry for entry in entries if entry.name == name]
        assert entry.shape == tuple(tensor.shape)
        assert torch.equal(entry.make(), tensor)


def test_a_state_dict_in_one_file_is_read_alike(tmp_path: Path) -> None:
    model = built(TAKEN["gpt2"])
    model.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "expert.pt")
    base = open_base(tmp_path / "base", "base")
    expert = open_expert(tmp_path / "expert.pt", "expert", base, ())
    assert expert.infos[FC] == base.infos[FC]
    assert torch.equal(expert.tensor(FC), base.tensor(FC))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["c_fc"]}], ids=str)
def test_adapters_match_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model = built(TAKEN["gpt2"])
    model.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj"] if "modules_to_save" in options else ["c_attn", "c_proj", "c_fc"]
    wanted = adapter(model, tmp_path / "adapter", target_modules=targets, r=4, fan_in_fan_out=True, **options)
    base = open_base(tmp_path / "base", "base")
    expert = open_expert(tmp_path / "adapter", "expert", base, [*base.infos])
    changed = 0
    for name in base.infos:
        turned = name.endswith("weight") and wanted[name].ndim == 2 and ".h." in name
        torch.testing.assert_close(expert.tensor(name), wanted[name].T if turned else wanted[name], rtol=0, atol=1e-6)
        changed += not torch.equal(expert.tensor(name), base.tensor(name))
    assert changed == (10 if "modules_to_save" in options else 8)  # with biases


def test_packed_weights_need_an_engine_that_takes_them() -> None:
    """transformers would put random numbers in their place."""
    gpt2, family = Base({"model_type": "gpt2"}, None), FAMILIES["causal_lm"]
    for engine in (None, "transformers"):
        with pytest.raises(ConfigError, match="^pack.*: transformers loads models of type gpt2 with dense weights"):
            check_engine_model(exporter_of("compressed_tensors", engine=engine), family, {}, [ints(4, 64)], gpt2)
        check_engine_model(exporter_of("dense", engine=engine), family, {}, [ints(4, 64)], gpt2)
    check_engine_model(exporter_of("compressed_tensors", engine="vllm"), family, {}, [ints(4, 64)], gpt2)
