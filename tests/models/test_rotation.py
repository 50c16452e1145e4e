"""Oracle: the model itself, because a rotation changes no output."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from epmq_cli.commands.verify import verify
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.rotation import MODEL_TYPES, hadamard, rotated, rotation
from epmq_cli.pipeline.job import make_job
from tests.conftest import TASKS
from tests.helpers.byte_level import MODELS
from tests.helpers.encoders import MODELS as ENCODERS
from tests.helpers.hubs import config, run_in
from tests.helpers.minihub import decoder_hub, hub_of

TOKENS = torch.arange(24).reshape(2, 12)


def written(folder: Path, kind: str) -> Any:
    """A random decoder with random norms and biases, in a folder."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", [*MODEL_TYPES, "llama3"])
def test_a_rotated_model_computes_the_same(kind: str, tmp_path: Path) -> None:
    """Heads are tied in llama3, and have biases in qwen2."""
    model = written(tmp_path, kind)
    found = rotated(ModelFolder(tmp_path, "base"), None)
    own = copy.deepcopy(model.config)
    own.tie_word_embeddings = False
    other = type(model)(own).eval()
    other.load_state_dict({name: found.tensor(name) for name in found.infos})
    wanted, logits = model(TOKENS).logits, other(TOKENS).logits
    torch.testing.assert_close(logits, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=0)
    moved = found.tensor("model.layers.1.mlp.down_proj.weight") - model.model.layers[1].mlp.down_proj.weight
    assert float(moved.abs().max()) > 0.1
    assert torch.equal(found.tensor("model.norm.weight"), torch.ones(64))


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "modernbert"])
def test_an_encoder_with_rotated_values_computes_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, family = ENCODERS[kind]().eval(), FAMILIES[kind]
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    model.save_pretrained(tmp_path)
    folder = ModelFolder(tmp_path, "base")
    heads = family.value_heads(folder)
    assert heads is not None and len(heads.values) == 2 * len(heads.outputs) == 2
    found, batch = rotated(folder, heads), {"input_ids": TOKENS}
    if kind in ("clip", "vit", "deit"):
        batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    wanted = family.features(model, batch)
    own = {name: found.tensor(stored) for name, stored in family.all_names(folder).items() if stored in folder.infos}
    changed = {name for name, tensor in own.items() if not torch.equal(tensor, model.get_parameter(name))}
    model.load_state_dict(own, strict=False)
    assert len(changed) == 3
    torch.testing.assert_close(family.features(model, batch), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def test_encoders_without_separate_values_are_refused(tmp_path: Path) -> None:
    ENCODERS["modernbert"]().save_pretrained(tmp_path)
    folder = ModelFolder(tmp_path, "base")
    with pytest.raises(ConfigError, match="the values of CLIP, .*, got modernbert in base; use transform=none"):
        rotated(folder, FAMILIES["modernbert"].value_heads(folder))


@pytest.mark.parametrize("width", [1, 12, 48, 64, 576])
def test_rotations_are_orthogonal_and_spread_every_channel(width: int) -> None:
    R = rotation(width).double()
    torch.testing.assert_close(R @ R.T, torch.eye(width, dtype=torch.float64), atol=1e-6, rtol=0)
    power = width & -width
    spread: Tensor = R.square().reshape(width, power, -1).sum(2)
    torch.testing.assert_close(spread, torch.full_like(spread, 1 / power))
    assert hadamard(12).shape == (1, 1)


def test_models_that_no_rotation_keeps_are_refused(tmp_path: Path, llama: Path) -> None:
    written(tmp_path, "gemma2")
    with pytest.raises(ConfigError, match="rotates decoders of the types llama, .*, got gemma2 in base"):
        rotated(ModelFolder(tmp_path, "base"), None)
    with pytest.raises(ConfigError, match=re.escape("transform must be one of none, hadamard, got 'fourier'")):
        make_job(config(llama, "transform=fourier"))
    slices = f"merge.slices=[{{expert: {TASKS[0]}, layers: null}}]"
    with pytest.raises(ConfigError, match="which transform=hadamard does not rotate"):
        make_job(config(llama, "transform=hadamard", "merge=passthrough", slices, "guidance=merged"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_hub(tmp_path_factory.mktemp("llama"), "llama")


@torch.no_grad()
def test_a_run_writes_a_rotated_model_that_transformers_loads(llama: Path, tmp_path: Path) -> None:
    options = ("eval.samples=4", "pack.dtype=float32", "transform=hadamard")
    alone = ("merge=none", "quant=none", "guidance=merged")
    whole = run_in(tmp_path / "whole", llama, *alone, *options)
    plain = run_in(tmp_path / "plain", llama, *alone, *options[:2])
    models = [t.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (whole, plain)]
    assert not models[0].config.tie_word_embeddings
    one, other = (model(TOKENS).logits for model in models)
    torch.testing.assert_close(one, other, atol=2e-4 * float(other.abs().max()), rtol=0)
    verify(run_in(tmp_path / "feature", llama, *options, "bits=4"), True, "cpu", None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "bert", "deberta", "vit"])
def test_a_run_writes_an_encoder_with_rotated_values(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    hub = hub_of(kind, request, tmp_path / "hub")
    verify(run_in(tmp_path / "run", hub, "transform=hadamard", "guidance=feature", "eval.samples=4"), True, "cpu", None)
