"""Oracle: the same checkpoint read by transformers and dequantized, in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epmq_cli
from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.families.family import load_model
from epmq_cli.inference.int4 import Int4Linear
from epmq_cli.inference.load import kernels, load
from tests.hubs import Scene, run_in
from tests.minihub import KINDS, build

CPU = torch.device("cpu")
OPTIONS = ("group_size=32", "eval.stages=[]", "calib.samples=8")


def made(folder: Path, kind: str, *options: str) -> tuple[Path, Scene]:
    """A checkpoint and the scene it was made in."""
    hub = build(folder / "hub", kind)
    return run_in(folder / "run", hub, *OPTIONS, *options), Scene(hub, *OPTIONS, *options)


def features(scene: Scene, model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return torch.cat([scene.family.features(model, batch) for batch in scene.batches])


def apart(found: Tensor, wanted: Tensor) -> float:
    """The distance, relative to the spread of what is wanted."""
    return float((found - wanted).norm() / (wanted - wanted.mean(0)).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_runs_on_packed_weights(kind: str, tmp_path: Path) -> None:
    checkpoint, scene = made(tmp_path, kind)
    wanted = features(scene, load_model(scene.family, checkpoint, CPU))
    dense, packed = load(checkpoint, "cpu", "dequantize"), load(checkpoint, "cpu")
    torch.testing.assert_close(features(scene, dense), wanted)
    assert apart(features(scene, packed), wanted) < 0.03
    config = json.loads((checkpoint / "config.json").read_text())
    assert kernels(packed)["int4"] > 0
    assert kernels(packed)["dense"] == len(config["quantization_config"]["ignore"])
    assert kernels(dense)["int4"] == 0


@pytest.mark.parametrize("options", ["bits=3", "bits=2", "bits=3.5", "group_size=-1", "bits=3 quant.symmetric=false"])
def test_narrower_and_wider_grids_run_on_it_too(options: str, tmp_path: Path) -> None:
    checkpoint, scene = made(tmp_path, "llama", *options.split())
    packed = load(checkpoint, "cpu", "int4")
    assert apart(features(scene, packed), features(scene, load_model(scene.family, checkpoint, CPU))) < 0.03
    assert kernels(packed)["dense"] == 1  # the output layer


def test_what_the_kernel_does_not_take_is_dense_or_refused(tmp_path: Path) -> None:
    checkpoint, scene = made(tmp_path, "llama", "bits=8")
    model = load(checkpoint, "cpu")
    assert kernels(model)["int4"] == 0
    torch.testing.assert_close(features(scene, model), features(scene, load_model(scene.family, checkpoint, CPU)))
    wanted = r"model.layers.0.mlp.down_proj cannot run on int4: it has 8 bits; use kernel auto or dequantize"
    with pytest.raises(CheckpointError, match=wanted):
        load(checkpoint, "cpu", "int4")


def test_the_dense_weight_is_nowhere(tmp_path: Path) -> None:
    checkpoint, _ = made(tmp_path, "llama")
    packed = load(checkpoint, "cpu")
    for module in packed.modules():
        if isinstance(module, Int4Linear):
            sizes = sum(tensor.nbytes for tensor in (module.packed, module.grid, module.weight))
            assert sizes <= module.in_features * module.out_features * (0.5 + 4 / 32)


def test_bad_arguments_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kernel must be one of auto, int4, dequantize, got 'marlin'"):
        load(tmp_path, "cpu", "marlin")
    with pytest.raises(CheckpointError, match="is no checkpoint; give the checkpoint folder that epmq run wrote"):
        load(tmp_path, "cpu")


def test_epmq_load_is_there_without_importing_torch() -> None:
    assert epmq_cli.load is load
    code = "import sys, epmq_cli; assert 'torch' not in sys.modules; assert not hasattr(epmq_cli, 'store')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    checkpoint, _ = made(tmp_path, "llama")
    path = checkpoint / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["num_hidden_layers"] += 1
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has no tensor model.layers.2.\S+; run epmq run again"):
        load(checkpoint, "cpu")
