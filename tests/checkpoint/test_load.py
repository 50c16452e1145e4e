"""Oracles: the same checkpoint, read and dequantized by transformers; the refusals that a user would expect."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import epmq_cli
from epmq_cli.checkpoint.exact_linear import ExactLinear
from epmq_cli.checkpoint.int4_linear import Int4Linear
from epmq_cli.checkpoint.load import kernels, load
from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.families.family import load_model
from tests.checkpoint.conftest import Made
from tests.helpers.hubs import Scene
from tests.helpers.minihub import KINDS, T5S
from tests.helpers.tiers import first, only

FAMILIES = only(("clip", "deberta", "t5", "llama"), ("clip", "bert", *KINDS))


def features(scene: Scene, model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return torch.cat([scene.family.features(model, batch) for batch in scene.batches])


def relative_distance(found: Tensor, wanted: Tensor) -> float:
    """The distance, relative to the spread of `wanted`."""
    return float((found - wanted).norm() / (wanted - wanted.mean(0)).norm())


def dequantized(scene: Scene, checkpoint: Path) -> nn.Module:
    return load_model(scene.family, checkpoint, torch.device("cpu"))


@pytest.mark.parametrize("kind", only(("clip", "t5"), ("clip", "bert", *KINDS)))
def test_every_family_runs_on_packed_weights(kind: str, made: Made) -> None:
    checkpoint, scene = made(kind)
    model = dequantized(scene, checkpoint)
    wanted = features(scene, model)
    dense, packed = load(checkpoint, "cpu", "dequantize"), load(checkpoint, "cpu")
    torch.testing.assert_close(features(scene, dense), wanted)
    assert relative_distance(features(scene, packed), wanted) < 0.03
    config = json.loads((checkpoint / "config.json").read_text())
    assert kernels(packed)["int4"] > 0
    assert kernels(packed)["dense"] == len(config["quantization_config"]["ignore"])
    assert kernels(dense)["int4"] == 0
    assert type(packed) is type(model)
    assert not packed.training
    last = [module for module in packed.modules() if isinstance(module, Int4Linear)][-1]
    last.get_buffer("pairs").neg_()
    assert relative_distance(features(scene, packed), wanted) > 0.01  # the output depends on the buffer of the kernel


@pytest.mark.parametrize("kind", FAMILIES)
def test_everything_except_packed_weights_matches_transformers(kind: str, made: Made) -> None:
    """Includes tied weights, and buffers that are not stored, such as positions and rotary frequencies."""
    checkpoint, scene = made(kind)
    found, wanted = load(checkpoint, "cpu"), dequantized(scene, checkpoint)
    packed = {f"{name}.weight" for name, module in found.named_modules() if isinstance(module, Int4Linear)}
    for tensors in ("named_parameters", "named_buffers"):
        own, other = dict(getattr(found, tensors)()), dict(getattr(wanted, tensors)())
        missing = {name for name in other.keys() - own.keys() if not name.rpartition(".")[2].startswith("weight_")}
        assert missing <= packed
        assert all(torch.equal(own[name], other[name]) for name in own.keys() & other.keys())
    assert not hasattr(found.config, "quantization_config")


def test_an_output_layer_with_its_own_values_is_not_tied(made: Made, tmp_path: Path) -> None:
    """Oracle: transformers, which does so whatever config.json says about it."""
    checkpoint, scene = made("gemma3")
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    for model in (load(folder, "cpu"), dequantized(scene, folder)):
        assert torch.equal(model.get_parameter("lm_head.weight"), -model.get_parameter("model.embed_tokens.weight"))


@pytest.mark.parametrize("kind", first(1, ["clip", "t5", "llama"]))
def test_activations_may_be_bfloat16(kind: str, made: Made) -> None:
    checkpoint, scene = made(kind)
    model = load(checkpoint, "cpu", dtype=torch.bfloat16)
    narrow = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()} for b in scene.batches]
    with torch.inference_mode():
        found = torch.cat([scene.family.features(model, batch) for batch in narrow])
    assert found.dtype == torch.bfloat16
    assert relative_distance(found.float(), features(scene, dequantized(scene, checkpoint))) < 0.1


@pytest.mark.parametrize("kind", first(1, T5S))
def test_generation_settings_come_from_the_checkpoint(kind: str, made: Made, tmp_path: Path) -> None:
    checkpoint, scene = made(kind)
    shutil.copytree(checkpoint, tmp_path / "copy")
    options = {"max_length": 5, "do_sample": False, "decoder_start_token_id": 0, "pad_token_id": 0}
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps(options))
    given = {name: scene.batches[0][name] for name in ("input_ids", "attention_mask")}
    models: tuple[Any, Any] = load(tmp_path / "copy", "cpu", "dequantize"), dequantized(scene, tmp_path / "copy")
    found, wanted = (model.generate(**given) for model in models)
    assert found.shape[1] <= 5
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "options",
    first(
        4,
        [
            "bits=3.5",
            "bits=2 quant.symmetric=false group_size=-1",
            "pack.dtype=bfloat16",
            "pack.shard_size=20KB",
            "bits=3",
            "bits=2",
            "group_size=-1",
            "bits=3 quant.symmetric=false",
            "bits=2 quant.grid=hessian",
            "pack.dtype=float16",
        ],
    ),
)
def test_every_grid_and_every_layout_run_on_the_kernel(options: str, made: Made) -> None:
    checkpoint, scene = made("llama", *options.split())
    packed = load(checkpoint, "cpu", "int4")
    assert relative_distance(features(scene, packed), features(scene, dequantized(scene, checkpoint))) < 0.03
    assert kernels(packed)["dense"] == 1  # the output layer


@pytest.mark.parametrize(("options", "reason"), [("bits=8", "it has 8 bits"), ("group_size=16", "16 input columns")])
def test_unsupported_linears_are_dense_or_refused(options: str, reason: str, made: Made) -> None:
    checkpoint, scene = made("llama", options)
    model = load(checkpoint, "cpu")
    assert kernels(model)["int4"] == 0
    torch.testing.assert_close(features(scene, model), features(scene, dequantized(scene, checkpoint)))
    with pytest.raises(
        ConfigError, match=rf"kernel=int4 cannot take model\.layers\.0\..*: {reason}.*; use kernel=auto"
    ):
        load(checkpoint, "cpu", "int4")


def test_a_dense_checkpoint_is_loaded_unchanged(made: Made) -> None:
    checkpoint, scene = made("bert", "quant=none")
    assert torch.equal(features(scene, load(checkpoint, "cpu")), features(scene, dequantized(scene, checkpoint)))
    with pytest.raises(
        ConfigError, match="kernel=int4 needs quantized linears, but the model has none; use kernel=auto"
    ):
        load(checkpoint, "cpu", "int4")


class Shapes(TorchDispatchMode):
    """Records the shapes of all floating tensors that operations create and fill. New modules only reserve their
    parameters before these move to the meta device, so empty tensors do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            return found
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.seen.add(tuple(tensor.shape))
        return found


@pytest.mark.parametrize(("kernel", "dense"), [("int4", False), ("dequantize", True)])
def test_no_dense_weight_is_ever_created(kernel: str, dense: bool, made: Made) -> None:
    """Oracle: every operation of loading and calling. Only fc1 and fc2 have the shapes (64, 32) and (32, 64)."""
    checkpoint, scene = made("vit")
    with Shapes() as shapes, torch.inference_mode():
        scene.family.features(load(checkpoint, "cpu", kernel), scene.batches[0])
    assert ({(64, 32), (32, 64)} <= shapes.seen) == dense
    assert bool({(64, 32), (32, 64)} & shapes.seen) == dense


@pytest.mark.parametrize(
    ("kind", "options"),
    first(2, [("clip", ()), ("llama", ("bits=3.5",)), ("t5", ("bits=8",)), ("bert", ("quant.symmetric=false",))]),
)
def test_exact_packed_linears_give_the_outputs_of_dense_ones(kind: str, options: tuple[str, ...], made: Made) -> None:
    """Oracle: the dequantized model, bit for bit."""
    checkpoint, scene = made(kind, *options)
    exact, dense = load(checkpoint, "cpu", "exact"), load(checkpoint, "cpu", "dequantize")
    assert torch.equal(features(scene, exact), features(scene, dense))
    packed = [module for module in exact.modules() if isinstance(module, ExactLinear)]
    assert kernels(exact) == {"int4": 0, "exact": len(packed), "dense": kernels(dense)["dense"] - len(packed)}
    assert packed
    packed[-1].get_buffer("packed").bitwise_not_()
    assert not torch.equal(features(scene, exact), features(scene, dense))


@pytest.mark.parametrize(("kernel", "bound"), [("exact", 1e-5), ("int4", 0.1)])
def test_tokens_one_by_one_and_all_at_once(kernel: str, bound: float, made: Made) -> None:
    """Oracle: one forward pass over all tokens. Generation computes the prompt and then one token at a time."""
    checkpoint, _ = made("llama")
    model: Any = load(checkpoint, "cpu", kernel)
    lengths = list[int]()
    linear = next(module for module in model.modules() if isinstance(module, Int4Linear | ExactLinear))
    linear.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    options = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(torch.arange(1, 6)[None], **options, return_dict_in_generate=True, output_logits=True)
    assert lengths == [5, *[1] * 7]
    cached = torch.stack(found.logits, 1).log_softmax(-1)
    whole = model(found.sequences[:, :-1]).logits[:, 4:].log_softmax(-1)
    torch.testing.assert_close(cached, whole, atol=bound, rtol=0)


def test_bad_arguments_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kernel must be one of auto, int4, exact, dequantize, got 'marlin'"):
        load(tmp_path, "cpu", "marlin")
    with pytest.raises(CheckpointError, match="is not a checkpoint; give the checkpoint folder that epmq run wrote"):
        load(tmp_path, "cpu")


def test_epmq_load_exists_without_importing_torch() -> None:
    assert epmq_cli.load is load
    code = "import sys, epmq_cli; assert 'torch' not in sys.modules; assert not hasattr(epmq_cli, 'store')"
    subprocess.run([sys.executable, "-c", code], check=True)


def deeper(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["num_hidden_layers"] += 1
    config.pop("layer_types", None)


def ungrouped(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["quantization_config"]["config_groups"] = {}


def stray(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["model.stray.weight_packed"] = torch.zeros(1)


def longer(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deeper, r"has no tensor model.layers.2.\S+; run epmq run again"),
        (ungrouped, r"config\.json does not describe the packing of model\.layers\.\S+; run epmq run again"),
        (stray, r"has a tensor that its model lacks: model\.stray\.weight_packed; see epmq verify"),
        (longer, r"does not fit its config\.json \(size mismatch for model\.norm\.weight: .*\); see epmq verify"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None], message: str, made: Made, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made("llama")[0], folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(folder, "cpu")
