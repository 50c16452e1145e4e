"""Oracle: the same transformers class with the dense weights, codes times scales in closed form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epmq_cli.checkpoint.compressed_tensors import CompressedTensorsExporter
from epmq_cli.checkpoint.load import kernels, load
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.families.family import load_model
from epmq_cli.pipeline.verify import tensor_problems
from epmq_cli.quantize.formats.fp8 import Fp8Format
from tests.checkpoint.conftest import Made
from tests.helpers.formats import ints
from tests.helpers.tiers import only

FP8 = ("bits=8", "quant.format=fp8")
MIXED = ("bits=5", "quant.format=[int4,fp8]")


def dense_twin(checkpoint: Path, folder: Path) -> nn.Module:
    """The model with the dequantized weights, saved as a plain checkpoint and loaded with its class."""
    config, tensors = json.loads((checkpoint / "config.json").read_text()), load_file(checkpoint / "model.safetensors")
    del config["quantization_config"]
    for name in [name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")]:
        scale, packed = tensors.pop(f"{name}_scale"), tensors.pop(f"{name}_packed", None)
        if packed is None:
            assert tensors[name].dtype == torch.float8_e4m3fn
            codes = tensors[name].float()
        else:
            shape = torch.Size(tensors.pop(f"{name}_shape").tolist())
            codes = unpack_from_int32(packed, 4, shape).float()
        tensors[name] = codes * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return class_of(checkpoint).from_pretrained(folder).eval()


def class_of(checkpoint: Path) -> Any:
    """The class that config.json names."""
    return getattr(transformers, json.loads((checkpoint / "config.json").read_text())["architectures"][0])


def output(model: Any) -> Tensor:
    """The output of the whole model for a few tokens, and for an image if the model takes one."""
    vision, text = getattr(model.config, "vision_config", None), getattr(model.config, "text_config", model.config)
    ids = torch.arange(1, 13).reshape(2, 6) % text.vocab_size
    given: dict[str, Tensor] = {"input_ids": ids}
    if vision is not None:
        size = (2, 3, vision.image_size, vision.image_size)
        given["pixel_values"] = torch.rand(size, generator=torch.Generator().manual_seed(0))
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :3]
    with torch.inference_mode():
        found: Tensor = model(**given)[0]
    return found


CASES = [(kind, FP8) for kind in ("bert", "clip", "t5", "llama")]
CASES += [(kind, MIXED) for kind in ("bert", "clip", "llama")]


@pytest.mark.parametrize(("kind", "options"), only([("clip", MIXED)], CASES), ids=str)
def test_plain_transformers_has_the_outputs_of_the_dequantized_model(
    kind: str, options: tuple[str, ...], made: Made, tmp_path: Path
) -> None:
    checkpoint, _ = made(kind, *options)
    plain = class_of(checkpoint).from_pretrained(checkpoint).eval()
    assert torch.equal(output(plain), output(dense_twin(checkpoint, tmp_path / "twin")))


def test_a_mix_that_transformers_cannot_load_is_refused_first() -> None:
    """Oracle: transformers, which cannot initialize T5 if linears have no weight."""
    exporter, formats = CompressedTensorsExporter("auto", "5GB", None, False), [ints(4, -1), Fp8Format(-1)]
    exporter.check(FAMILIES["causal_lm"], formats)
    exporter.check(FAMILIES["t5"], formats[:1])
    with pytest.raises(ConfigError, match="cannot load this family with two formats in one checkpoint, got int4 and"):
        exporter.check(FAMILIES["t5"], formats)


def test_a_class_with_a_pooler_that_the_checkpoint_lacks_loads_fp8(made: Made) -> None:
    """transformers initializes the pooler at random, which is not possible in FP8."""
    checkpoint, scene = made("vit", *FP8)
    plain = transformers.ViTModel.from_pretrained(checkpoint).eval()
    batch = scene.batches[0]["pixel_values"]
    own = load_model(scene.family, checkpoint, torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(plain(batch).last_hidden_state, own(batch).last_hidden_state)


@pytest.mark.parametrize(
    ("options", "format", "kinds"),
    [
        (FP8, "float-quantized", [("float", 8, None)]),
        (MIXED, "mixed-precision", [("int", 4, "pack-quantized"), ("float", 8, "float-quantized")]),
    ],
)
def test_the_config_names_the_formats_and_no_activation_format(
    options: tuple[str, ...], format: str, kinds: list[tuple[Any, ...]], made: Made
) -> None:
    checkpoint, _ = made("llama", *options)
    found = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    groups = list(found["config_groups"].values())
    assert found["format"] == format
    assert [(g["weights"]["type"], g["weights"]["num_bits"], g.get("format")) for g in groups] == kinds
    assert all("input_activations" not in group for group in groups)


def test_verify_finds_tensors_that_are_not_fp8(made: Made, tmp_path: Path) -> None:
    """The checkpoint as written, with one code set to NaN, and with codes of another type."""
    checkpoint, _ = made("llama", *MIXED)
    assert tensor_problems(checkpoint) == []
    shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(checkpoint / "model.safetensors")
    one, other = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn][:2]
    tensors[one].view(torch.uint8)[0, 0] = 0x7F
    tensors[other] = tensors[other].view(torch.int8)
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    assert sorted(tensor_problems(tmp_path / "copy")) == sorted(
        [f"{one} holds NaN or infinity", f"{other} is of type I8, config.json implies F8_E4M3"]
    )


def test_load_dequantizes_fp8_and_refuses_the_int4_kernel(made: Made) -> None:
    checkpoint, scene = made("llama", *FP8)
    dense = load(checkpoint, "cpu")
    assert kernels(dense)["int4"] == 0
    assert torch.equal(output(dense), output(load_model(scene.family, checkpoint, torch.device("cpu"))))
    with pytest.raises(ConfigError, match=r"kernel=int4 cannot take model\.layers\.0\..*: its format is fp8"):
        load(checkpoint, "cpu", "int4")


def test_load_packs_the_int4_linears_of_a_mix_and_dequantizes_the_others(made: Made) -> None:
    """Oracle: the groups of config.json."""
    checkpoint, _ = made("llama", *MIXED)
    groups = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["config_groups"]
    assert kernels(load(checkpoint, "cpu"))["int4"] == len(groups["group_0"]["targets"]) > 0
