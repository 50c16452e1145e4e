"""Oracles: unpacking returns the integers; the model from transformers' from_pretrained has the outputs of the
student."""

from __future__ import annotations

import errno
import hashlib
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import SafetensorError, safe_open
from transformers import AutoModel

from epmq_cli.checkpoint import write as written
from epmq_cli.checkpoint.compressed_tensors import CompressedTensorsExporter
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.errors import CheckpointError
from epmq_cli.families.family import load_model
from epmq_cli.families.structure import Linears
from epmq_cli.quantize.formats.format import QuantizedWeight
from epmq_cli.quantize.formats.int import BITS
from epmq_cli.quantize.formats.names import FIXED
from epmq_cli.quantize.rtn import rtn
from epmq_cli.store import atomic
from tests.helpers.formats import ints
from tests.helpers.hubs import Walk, run_in, walk
from tests.helpers.tiers import first, only, slow


def contents(hub: Path, found: Walk) -> written.Contents:
    return written.Contents(
        exporter=found.job.exporter,
        model=found.student,
        weights=found.walked.weights,
        dequantize=found.job.family.dequantize_on_load,
        heads={"first": {"weight": torch.ones(3, 4)}},
        base=hub / "base",
        texts={"x.txt": "y"},
        dtype=getattr(torch, found.job.exporter.dtype, torch.float32),
    )


def write(folder: Path, hub: Path, found: Walk, shard_bytes: int = 5 * 10**9) -> Path:
    written.write_checkpoint(folder, contents(hub, found), shard_bytes)
    return folder


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_packed_tensors_unpack_to_the_integers(bits: int, symmetric: bool, group_size: int) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))
    found = rtn(weight, ints(bits, group_size, symmetric), "mse", torch.float16)
    entries = CompressedTensorsExporter("auto", "5GB", None, False).entries("linear", found)
    tensors = {entry.name.removeprefix("linear."): entry.make() for entry in entries}
    assert all(tuple(entry.make().shape) == entry.shape for entry in entries)
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], bits, torch.Size((24, 48))), found.codes)
    assert tensors["weight_packed"].shape == (24, -(-48 * bits // 32))  # dense: no padding bits, even with 3-bit codes
    assert torch.equal(tensors["weight_scale"].float(), found.grid.scale)
    assert tensors["weight_shape"].tolist() == [24, 48]
    assert ("weight_zero_point" in tensors) == (not symmetric)
    if not symmetric:
        zero = unpack_from_int32(tensors["weight_zero_point"], bits, found.grid.zeros.shape, packed_dim=0)
        assert torch.equal(zero.float(), found.grid.zeros)


FAST = {
    "bits=3.5 group_size=16": "clip",
    "bits=3 group_size=-1 quant.symmetric=false": "bert",
    "bits=4 pack.dtype=bfloat16": "clip",
    "bits=8 quant.format=fp8 quant=rtn group_size=-1 pack.dtype=bfloat16": "bert",
    "bits=5 quant=rtn quant.format=[int2,fp8] pack.dtype=bfloat16": "clip",
    "bits=4 group_size=16 quant.format=nvfp4a16 pack.dtype=float16": "clip",
    "bits=6 group_size=32 quant.format=mxfp6a8 quant=rtn": "bert",
    "bits=8 group_size=-1 quant.format=fp8_static quant=rtn": "bert",
}
"""The default tier: options and the model that is written with them."""
OPTIONS = [
    *FAST,
    *(f"bits={bits} group_size=16 quant.symmetric={way}" for bits in BITS for way in ("true", "false")),
    "bits=7.5 quant=rtn",
    *(f"bits={o.bits} group_size={o.group_size} quant.format={n}" for n, o in FIXED.items() if o.group_size < 64),
    "group_size=16 quant.format=w4a8",
    "bits=4 group_size=16 quant.format=nvfp4a16 quant=awq",
    "bits=4 group_size=-1",
    "bits=2 group_size=16 quant.grid=mse",
    "bits=4 quant.act_order=true",
    "bits=4 pack.dtype=float16",
    "quant=rtn",
    "quant=none",
]


@pytest.mark.parametrize(("options", "hub_name"), only(FAST.items(), product(OPTIONS, ("clip", "bert"))))
def test_reloaded_outputs_equal_the_dequantized_models_exactly(
    hub_name: str,
    options: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    hub: Path = request.getfixturevalue(f"{hub_name}_hub")
    found = walk(hub, *options.split())
    dtype = contents(hub, found).dtype
    folder = write(tmp_path / "checkpoint", hub, found)
    reloaded = load_model(found.job.family, folder, torch.device("cpu"))
    assert torch.equal(found.features(reloaded), found.features(found.student))
    plain = AutoModel.from_pretrained(folder).eval()
    assert type(plain) is type(found.student)
    if len({weight.format.bits for weight in found.walked.weights.values() if isinstance(weight, QuantizedWeight)}) > 1:
        plain.hf_quantizer.compressor.decompress_model(plain)  # calling the whole model would work too
    assert plain.dtype == dtype
    assert torch.equal(found.features(plain), found.features(found.student.to(dtype)))
    assert {tensor.device.type for tensor in reloaded.to("meta").parameters()} == {"meta"}  # works on any device


def test_only_the_blocks_linears_are_packed(clip_hub: Path, tmp_path: Path) -> None:
    found = walk(clip_hub)
    folder = write(tmp_path / "checkpoint", clip_hub, found)
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        packed = {name.removesuffix(".weight_packed") for name in file.keys() if name.endswith("_packed")}  # noqa: SIM118
    linears = {name for name, module in found.student.named_modules() if isinstance(module, torch.nn.Linear)}
    assert packed == set(found.walked.weights)
    assert set(config["quantization_config"]["ignore"]) == linears - packed
    assert {"visual_projection", "text_projection"} < linears - packed


def test_shards_have_an_index_and_load(clip_hub: Path, tmp_path: Path) -> None:
    found = walk(clip_hub)
    folder = write(tmp_path / "checkpoint", clip_hub, found, shard_bytes=40_000)
    assert (folder / "model.safetensors.index.json").is_file()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(found.features(AutoModel.from_pretrained(folder)), found.features(found.student))
    assert written.weight_bytes(folder) == sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))


def test_linear_bytes_are_those_of_the_packed_tensors(clip_hub: Path, tmp_path: Path) -> None:
    found = walk(clip_hub)
    folder = write(tmp_path / "checkpoint", clip_hub, found)
    with safe_open(folder / "model.safetensors", "pt") as file:
        parts = [file.get_tensor(name) for name in file.keys() if name.split(".")[-1].startswith("weight_")]  # noqa: SIM118
    assert written.linear_bytes(contents(clip_hub, found)) == sum(part.nbytes for part in parts)


def test_the_same_run_gives_the_same_bytes(bert_hub: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        folder = run_in(tmp_path / name, bert_hub, "seed=3")
        digests.append(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
        )
    assert digests[0] == digests[1]
    other = run_in(tmp_path / "three", bert_hub, "seed=4", "calib.samples=10")
    assert hashlib.sha256((other / "model.safetensors").read_bytes()).hexdigest() != digests[0]["model.safetensors"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_write_that_fails_leaves_no_folder(
    error: Exception, clip_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = walk(clip_hub)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(CheckpointError, match=r"cannot be written to .*No space left.*choose another out"):
        write(tmp_path / "checkpoint", clip_hub, found)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_does_not_block_the_next_one(clip_hub: Path, tmp_path: Path) -> None:
    found = walk(clip_hub)
    (tmp_path / ".checkpoint.partial").mkdir()
    (tmp_path / ".checkpoint.partial" / "stale").write_text("")
    folder = write(tmp_path / "checkpoint", clip_hub, found)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert not (folder / "stale").exists()
    assert (folder / "x.txt").read_text() == "y"


def test_dequantizing_on_load_is_requested_only_if_needed(clip_hub: Path, bert_hub: Path, tmp_path: Path) -> None:
    for name, hub, options, asked in (
        ("clip", clip_hub, (), True),
        ("bert", bert_hub, (), False),
        ("zero", bert_hub, ("quant.symmetric=false",), True),
    ):
        folder = write(tmp_path / name, hub, walk(hub, *options))
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config.get("dequantize", False) == asked


@pytest.mark.parametrize("hub_name", first(1, ["clip", "bert"]))
def test_mixed_widths_keep_the_budget_and_are_equal_for_fused_linears(
    hub_name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub: Path = request.getfixturevalue(f"{hub_name}_hub")
    found = walk(hub, "bits=3.5", "guidance=feature", "guidance.heads=never")
    weights = {name: w for name, w in found.walked.weights.items() if isinstance(w, QuantizedWeight)}
    count = sum(weight.codes.numel() for weight in weights.values())
    assert {weight.format.bits for weight in weights.values()} == {3, 4}
    assert 3.2 < sum(weight.format.bits * weight.codes.numel() for weight in weights.values()) / count <= 3.5
    for block in found.job.family.blocks(found.student):
        for step in block.steps:
            if isinstance(step, Linears):
                assert len({weights[block.name(name)].format.bits for name in step.names}) == 1
    folder = write(tmp_path / "checkpoint", hub, found)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    for group in groups.values():
        assert {weights[name].format.bits for name in group["targets"]} == {group["weights"]["num_bits"]}
    assert sorted(name for group in groups.values() for name in group["targets"]) == sorted(weights)


def test_a_mixed_checkpoint_runs_in_plain_transformers(bert_hub: Path, tmp_path: Path) -> None:
    found = walk(bert_hub, "bits=2.5")
    plain = AutoModel.from_pretrained(write(tmp_path / "checkpoint", bert_hub, found)).eval()
    assert torch.equal(found.features(plain), found.features(found.student))


@pytest.mark.parametrize("hub_name", first(1, ["bert", "clip"]))
def test_groups_of_several_sizes_run_in_plain_transformers(
    hub_name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub: Path = request.getfixturevalue(f"{hub_name}_hub")
    budget = {"bert": "36KB", "clip": "146KB"}[hub_name]
    found = walk(hub, f"budget={budget}", "group_size=[8,16,32]", "quant.act_order=true")
    formats = {name: w.format for name, w in found.walked.weights.items() if isinstance(w, QuantizedWeight)}
    assert len({format.group_size for format in formats.values()}) > 1
    assert len({format.bits for format in formats.values()}) < len({*formats.values()})
    folder = write(tmp_path / "checkpoint", hub, found)
    own, plain = load_model(found.job.family, folder, torch.device("cpu")), AutoModel.from_pretrained(folder).eval()
    assert torch.equal(found.features(own), found.features(found.student))
    assert all(layout_of(folder).format_of(name) == format for name, format in formats.items())
    plain.hf_quantizer.compressor.decompress_model(plain)
    assert torch.equal(found.features(plain), found.features(found.student))


def test_a_mixed_clip_runs_in_plain_transformers(clip_hub: Path, tmp_path: Path) -> None:
    found = walk(clip_hub, "bits=2.5")
    plain = AutoModel.from_pretrained(write(tmp_path / "checkpoint", clip_hub, found)).eval()
    ids = torch.arange(12).reshape(2, 6) % found.student.config.text_config.vocab_size
    with torch.inference_mode():
        first, own = (
            model(input_ids=ids, pixel_values=found.batches["first"][0]["pixel_values"]).logits_per_image
            for model in (plain, found.student)
        )
    assert torch.equal(first, own)


@pytest.mark.parametrize(
    ("options", "widths", "text"),
    [
        (("bits=3.5",), {3, 4}, "{:.4g} bits on average (3 and 4), symmetric, groups of 16"),
        slow(
            (("quant=rtn", "quant.symmetric=false", "group_size=-1"), {4}, "{:.4g} bits, asymmetric, one scale a row")
        ),
        (("quant=none",), {None}, "dense"),
    ],
)
def test_metrics_and_model_card_name_the_widths(
    options: tuple[str, ...], widths: set[int | None], text: str, bert_hub: Path, tmp_path: Path
) -> None:
    card = (run_in(tmp_path, bert_hub, *options) / "README.md").read_text()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {layer["bits"] for layer in metrics["layers"]} == widths
    assert f"linears: {text.format(metrics['average_bits'])}\n" in card


def test_negative_scales_survive_packing(bert_hub: Path, tmp_path: Path) -> None:
    found = walk(bert_hub, "bits=2", "quant.grid=hessian")
    scales = [w.grid.scale for w in found.walked.weights.values() if isinstance(w, QuantizedWeight)]
    assert any((scale < 0).any() for scale in scales)
    plain = AutoModel.from_pretrained(write(tmp_path / "checkpoint", bert_hub, found)).eval()
    assert torch.equal(found.features(plain), found.features(found.student))
