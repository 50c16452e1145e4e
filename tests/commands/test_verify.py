"""Oracles: checkpoints pass as written; each kind of damage is applied to a copy and must be named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from epmq_cli.commands.merge import merge
from epmq_cli.commands.verify import verify
from epmq_cli.errors import CheckpointError
from epmq_cli.pipeline.verify import tensor_problems
from epmq_cli.store.manifest import MANIFEST, file_problems, write_manifest
from tests.conftest import Run
from tests.helpers.hubs import merge_config, run_in
from tests.helpers.minihub import build
from tests.helpers.tiers import every, first, slow

MODEL = "model.safetensors"
LINEAR = "vision_model.encoder.layers.0.mlp.fc1"


def check(checkpoint: Path, scores: bool = False) -> None:
    verify(checkpoint, scores, "cpu", None)


def edit(checkpoint: Path, change: Callable[[dict[str, Tensor]], object], file: str = MODEL) -> None:
    """Writes changed tensors and a matching manifest, like a writer with a bug."""
    tensors = load_file(checkpoint / file)
    change(tensors)
    save_file(tensors, checkpoint / file, {"format": "pt"})
    write_manifest(checkpoint, {})


def test_the_manifest_has_size_and_sha256_of_every_file(checkpoint: Path) -> None:
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert files.keys() == there - {MANIFEST}
    assert "heads/heads.safetensors" in files
    for name, entry in files.items():
        content = (checkpoint / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    "options",
    [
        slow(pytest.param(("bits=2",))),
        ("bits=3", "quant.symmetric=false"),
        slow(pytest.param(("bits=8", "group_size=-1"))),
        slow(pytest.param(("bits=3.5",))),
        ("quant=none",),
        ("pack.shard_size=40KB",),
    ],
    ids=" ".join,
)
def test_the_checkpoint_of_a_run_is_sound(options: tuple[str, ...], clip_hub: Path, tmp_path: Path) -> None:
    check(run_in(tmp_path, clip_hub, "eval.stages=[]", "calib.samples=8", *options))


@pytest.mark.parametrize("kind", first(2, ["vit", "t5-tied", "llama", "roberta", "distilbert", "t5", "gemma3"]))
def test_checkpoints_of_every_family_are_sound(kind: str, tmp_path: Path) -> None:
    hub = build(tmp_path / "hub", kind)
    check(run_in(tmp_path / "run", hub, "eval.stages=[]", "calib.samples=8"))
    (tmp_path / "merge").mkdir()
    merge(merge_config(hub), tmp_path / "merge", [])
    check(tmp_path / "merge" / "checkpoint")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def link_away(path: Path) -> None:
    checkpoint = next(folder for folder in path.parents if (folder / MANIFEST).exists())
    elsewhere = checkpoint.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("name", [MODEL, "heads/heads.safetensors", "config.json", "README.md"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "{} has another sha256; fetch it again"),
        (truncate, r"{} has \d+ bytes instead of \d+; fetch"),
        (Path.unlink, "{} is missing; fetch"),
        (link_away, "{} is a link that leads out of the folder; fetch"),
    ],
)
def test_damaged_files_are_named(damage: Callable[[Path], None], message: str, name: str, checkpoint: Path) -> None:
    check(checkpoint)
    damage(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"is not what epmq wrote: {message.format(name)}") as raised:
        check(checkpoint)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["heads/more.safetensors", "processors/first/manifest.json", "prompts"])
def test_files_added_in_a_sub_folder_are_named(name: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    if name == "prompts":
        (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    else:
        (checkpoint / name).write_text("")
    assert f"{name} is not listed in manifest.json" in file_problems(checkpoint)


@pytest.mark.parametrize("name", ["../x", "/x", "heads/../x", "heads//x", "heads/.x", "./x", ""])
def test_a_manifest_that_leads_out_of_the_folder_is_refused(name: str, checkpoint: Path) -> None:
    content = json.loads((checkpoint / MANIFEST).read_text())
    content["files"][name] = content["files"]["config.json"]
    (checkpoint / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lists names that are not files of that folder"):
        check(checkpoint)


def test_heads_in_the_location_of_earlier_versions_are_read(checkpoint: Path) -> None:
    """Oracle: the same checkpoint with its heads in the folder heads/."""
    before = tensor_problems(checkpoint)
    (checkpoint / "heads" / "heads.safetensors").rename(checkpoint / "heads.safetensors")
    (checkpoint / "heads").rmdir()
    write_manifest(checkpoint, {})
    assert tensor_problems(checkpoint) == before == []
    check(checkpoint)


def test_files_outside_the_manifest_are_named_unless_hidden(checkpoint: Path) -> None:
    (checkpoint / ".gitattributes").write_text("")
    check(checkpoint)
    (checkpoint / "pytorch_model.bin").write_text("")
    with pytest.raises(CheckpointError, match=r"wrote: pytorch_model.bin is not listed in manifest.json; fetch"):
        check(checkpoint)


def test_a_snapshot_of_the_hubs_cache_is_sound(checkpoint: Path, tmp_path: Path) -> None:
    """In a snapshot every file, including those in sub-folders, is a link into the blobs beside the snapshots."""
    snapshot, blobs = tmp_path / "models--me--it/snapshots/abc", tmp_path / "models--me--it/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(checkpoint.rglob("*")) if path.is_file()):
        link = snapshot / path.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(Path(os.path.relpath(blobs, link.parent)) / str(number))
    check(snapshot)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "has no readable manifest.json; give"),
        ("[]", "has no readable manifest.json; give"),
        ('{"files": {"a": {"size": 1}}}', "has no readable manifest.json; give"),
        (
            '{"files": {"../a": {"size": 1, "sha256": "' + "0" * 64 + '"}}}',
            "lists names that are not files of that folder",
        ),
        ('{"files": {"/etc/passwd": {"size": 1, "sha256": "' + "0" * 64 + '"}}}', "lists names that are not files of"),
        (
            '{"files": {"..": {"size": 1, "sha256": "' + "0" * 64 + '"}}}',
            "lists names that are not files of that folder",
        ),
        ('{"files": {"a": {"size": 1, "sha256": "0"}}}', "lists names that are not files of that folder"),
        ("[" * 100_000, "has no readable manifest.json; give"),
        (
            '{"files": {"a\\ud800": {"size": 1, "sha256": "' + "0" * 64 + '"}}}',
            "lists names that are not files of that folder",
        ),
    ],
    ids=range(9),
)
def test_a_bad_manifest_is_refused(content: str, message: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        check(checkpoint)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def scaled(name: str, factor: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].flatten()[:1].mul_(factor)


WRONG_TENSORS = {
    "extra": (put("extra", torch.ones(1)), "extra is not a tensor of the model"),
    "missing": (lambda t: t.pop("logit_scale"), "logit_scale is missing"),
    "shape": (
        put("vision_model.post_layernorm.weight", torch.ones(31)),
        r"vision_model.post_layernorm.weight is \[31\], config.json implies \[32\]",
    ),
    "packed shape": (
        put(f"{LINEAR}.weight_packed", torch.zeros(64, 5, dtype=torch.int32)),
        rf"{LINEAR}.weight_packed is \[64, 5\], config.json implies \[64, 4\]",
    ),
    "packed type": (
        put(f"{LINEAR}.weight_packed", torch.zeros(64, 4)),
        f"{LINEAR}.weight_packed is of type F32, config.json implies I32",
    ),
    "scales' shape": (put(f"{LINEAR}.weight_scale", torch.ones(64, 1)), rf"{LINEAR}.weight_scale is \[64, 1\]"),
    "recorded shape": (
        put(f"{LINEAR}.weight_shape", torch.tensor([64, 31])),
        rf"{LINEAR}.weight_shape is \[64, 31\], config.json implies \[64, 32\]",
    ),
    "NaN scale": (scaled(f"{LINEAR}.weight_scale", float("nan")), f"{LINEAR}.weight_scale holds NaN or infinity"),
    "zero scale": (scaled(f"{LINEAR}.weight_scale", 0), f"{LINEAR}.weight_scale holds scales that are not above 0"),
    "negative scale": (scaled(f"{LINEAR}.weight_scale", -1), f"{LINEAR}.weight_scale holds scales that are not above"),
    "infinite bias": (scaled(f"{LINEAR}.bias", float("inf")), f"{LINEAR}.bias holds NaN or infinity"),
}


@pytest.mark.parametrize("case", every(2, WRONG_TENSORS))
def test_wrong_tensors_are_named(case: str, checkpoint: Path) -> None:
    edit(checkpoint, lambda tensors: None)
    check(checkpoint)
    change, message = WRONG_TENSORS[case]
    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=f"is not what epmq wrote: {message}") as raised:
        check(checkpoint)
    assert "\n" not in str(raised.value)


def test_heads_must_be_finite(checkpoint: Path) -> None:
    edit(checkpoint, scaled("first.weight", float("nan")), "heads/heads.safetensors")
    with pytest.raises(CheckpointError, match=r"first.weight holds NaN or infinity \(heads/heads.safetensors\)"):
        check(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("first.weight", torch.ones(3, 5)), r"first.weight is \[3, 5\], config.json implies \[3, \d+\]"),
        (put("first.weight", torch.tensor(1.0)), r"first.weight is \[\], config.json implies another shape"),
        (lambda tensors: tensors.update(first=tensors.pop("first.weight")), "first.weight is missing"),
        (put("third.weight", torch.ones(1)), "third.weight is not a part of a head"),
        (lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}), "is of type F16, epmq writes F32"),
    ],
    ids=["width", "no dimension", "no weight", "another task", "half"],
)
def test_heads_must_match_the_tasks_and_the_model(
    change: Callable[[dict[str, Tensor]], object], message: str, checkpoint: Path
) -> None:
    edit(checkpoint, change, "heads/heads.safetensors")
    with pytest.raises(CheckpointError, match=rf"{message}.*\(heads/heads.safetensors\)"):
        check(checkpoint)


def test_missing_heads_are_named(checkpoint: Path) -> None:
    (checkpoint / "heads/heads.safetensors").unlink()
    write_manifest(checkpoint, {})
    with pytest.raises(CheckpointError, match="is not what epmq wrote: heads/heads.safetensors is missing; fetch"):
        check(checkpoint)


def test_scales_of_the_hessian_search_may_be_negative_but_not_zero(clip_hub: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path, clip_hub, "eval.stages=[]", "calib.samples=8")
    scales = [tensor for name, tensor in load_file(checkpoint / MODEL).items() if name.endswith("weight_scale")]
    assert any((scale < 0).any() for scale in scales)
    check(checkpoint)
    edit(checkpoint, scaled(f"{LINEAR}.weight_scale", 0))
    with pytest.raises(CheckpointError, match=f"{LINEAR}.weight_scale holds scales of 0"):
        check(checkpoint)


def test_a_merge_with_a_wrong_shape_or_a_nan_is_named(clip_hub: Path, tmp_path: Path) -> None:
    merge(merge_config(clip_hub), tmp_path, [])
    checkpoint = tmp_path / "checkpoint"
    edit(checkpoint, put("vision_model.post_layernorm.weight", torch.ones(31)))
    with pytest.raises(CheckpointError, match=r"post_layernorm.weight is \[31\], config.json implies \[32\]"):
        check(checkpoint)
    edit(checkpoint, put("vision_model.post_layernorm.weight", torch.full((32,), torch.nan)))
    with pytest.raises(CheckpointError, match="post_layernorm.weight holds NaN or infinity"):
        check(checkpoint)


def test_scores_are_those_of_the_run(checkpoint: Path) -> None:
    check(checkpoint, scores=True)
    path = checkpoint.parent / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["scores"]["tasks"]["first"]["quantized"] += 0.05
    path.write_text(json.dumps(metrics))
    with pytest.raises(CheckpointError, match=r"wrote: first scores 0\.\d+, metrics.json has 0\.\d+; fetch"):
        check(checkpoint, scores=True)
    metrics["scores"]["tasks"] = {}
    path.write_text(json.dumps(metrics))
    with pytest.raises(CheckpointError, match=r"has no scores of the stage quantized; omit --scores"):
        check(checkpoint, scores=True)
    metrics["scores"]["tasks"] = {"first": {"quantized": 1.0}}
    metrics["config"]["eval"]["_target_"] = "tests.evil.Evaluation"
    path.write_text(json.dumps(metrics))
    with pytest.raises(
        CheckpointError, match="names tests.evil.Evaluation, which is not a class of epmq; if you trust it, score"
    ):
        check(checkpoint, scores=True)
    for odd in (3, None, "x", [1]):
        path.write_text(json.dumps(metrics | {"config": {"eval": odd}}))
        with pytest.raises(CheckpointError, match=r"metrics.json is not a readable metrics.json of epmq run; give"):
            check(checkpoint, scores=True)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"metrics.json is not a readable metrics.json of epmq run; give"):
        check(checkpoint, scores=True)


def test_the_command_prints_every_problem_and_exits_with_1(checkpoint: Path, epmq_inside: Run) -> None:
    sound = epmq_inside("verify", str(checkpoint), "--scores", "--device", "cpu")
    assert sound.returncode == 0
    assert "epmq:" not in sound.stderr
    assert sound.stdout == f"{checkpoint}: files, tensors and scores are what epmq wrote\n"
    flip(checkpoint / MODEL)
    (checkpoint / "README.md").unlink()
    broken = epmq_inside("verify", str(checkpoint))
    assert broken.returncode == 1
    assert broken.stdout.splitlines() == ["README.md is missing", "model.safetensors has another sha256"]
    assert broken.stderr.startswith(
        f"epmq: {checkpoint} is not what epmq wrote: README.md is missing and 1 more (above)"
    )
    assert epmq_inside("verify", "nowhere").stderr.startswith("epmq: nowhere is not a folder; give the checkpoint")
