"""Oracles: each option, file and byte that a result depends on, one by one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from epmq_cli.data.hub import Pictures
from epmq_cli.data.images import ArrayImages, ImageFiles
from epmq_cli.data.samples import Samples
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.cached_steps import CachedSteps
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.keys import differences, hash_model, hash_samples, run_key, scores_key, short
from epmq_cli.store.cache import FileHashes
from tests.helpers.hubs import config
from tests.helpers.tiers import first, slow


def key_of(hub: Path, *overrides: str) -> dict[str, Any]:
    cfg = config(hub, *overrides)
    job = make_job(cfg)
    models, _, dtype = steps.open_models(job)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    drawn = steps.calibration_batches(job, models.base.path)
    return run_key(resolved, CachedSteps(None, job, models, dtype).files, drawn, job.device)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("bits=3", "bits"),
        slow(("guidance.lam=0.5", "guidance lam")),
        ("merge.scale=0.1", "merge scale"),
        slow(("pack.dtype=float16", "pack dtype")),
        slow(("calib.batch_size=4", "calib batch_size")),
        slow(("seed=1", "seed")),
    ],
)
def test_options_that_change_the_result_change_the_key(option: str, named: str, bert_hub: Path) -> None:
    one, other = key_of(bert_hub), key_of(bert_hub, option)
    assert short(one) != short(other)
    assert named in list(differences(one, other))


@pytest.mark.parametrize(
    "option",
    first(
        1, ["eval.samples=3", "out=elsewhere", "resume=never", "calib.memory=1KB", "calib.student=disk", "cache=1MB"]
    ),
)
def test_other_options_keep_the_key(option: str, bert_hub: Path) -> None:
    assert short(key_of(bert_hub)) == short(key_of(bert_hub, option))


def test_keys_depend_on_the_number_of_threads(bert_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = key_of(bert_hub)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert list(differences(one, key_of(bert_hub))) == ["machine threads"]


def test_keys_depend_on_the_code(bert_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = key_of(bert_hub)
    monkeypatch.setattr("epmq_cli.pipeline.keys.hash_code", lambda: "edited")
    assert list(differences(one, key_of(bert_hub))) == ["versions of epmq's code"]


def test_keys_depend_on_the_bytes_of_the_models(bert_hub: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    shutil.copytree(bert_hub, hub)
    suite = hub / "configs" / "suite" / "mini.yaml"
    suite.write_text(suite.read_text().replace(str(bert_hub), str(hub)))
    before, file = key_of(hub), hub / "first" / "model.safetensors"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    os.utime(file)
    assert short(key_of(hub)) == short(before)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # same size, and later the same date
    file.write_bytes(content)
    os.utime(file, ns=times)
    assert list(differences(before, key_of(hub))) == ["models expert of first model.safetensors"]


def test_a_key_is_json(bert_hub: Path) -> None:
    found = key_of(bert_hub)
    assert short(json.loads(json.dumps(found))) == short(found)


def test_scores_depend_on_the_evaluation_and_on_the_samples(bert_hub: Path) -> None:
    one, other = (make_job(config(bert_hub, option)).evaluation for option in ("eval.samples=3", "eval.samples=4"))
    keys = {scores_key(one, ["a", "b"]), scores_key(one, ["a", "c"]), scores_key(other, ["a", "b"])}
    assert len(keys) == 3
    assert scores_key(one, ["a", "b"]) in keys
    assert scores_key(one, ["a", None]) is None, "what the samples hold is not known"


def test_keys_depend_only_on_model_files_that_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "merges.txt", ".hidden.json", "optimizer.pt", "README.md"):
        (folder / name).write_text(name)
    hashes = FileHashes(None)
    found = hash_model(folder, hashes)
    assert set(found) == {"model.safetensors", "config.json", "merges.txt"}
    shutil.copytree(folder, tmp_path / "copy")
    assert hash_model(tmp_path / "copy", hashes) == found
    assert list(hash_model(folder / "optimizer.pt", hashes)) == ["optimizer.pt"]


def _samples(inputs: Any, labels: int = 0) -> Samples:
    return Samples(inputs, torch.full((len(inputs),), labels))


def _recoloured(image: Image.Image) -> Image.Image:
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    return image


def test_hashes_of_samples_depend_on_inputs_order_and_labels(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    images = [Image.fromarray(each) for each in pixels]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    stored = [{"bytes": (tmp_path / f"{index}.png").read_bytes(), "path": None} for index in range(2)]
    samples = [
        _samples(["red film", "blue"]),
        _samples(["blue", "red film"]),
        _samples(["red film", "blue"], 1),
        _samples(["red film"]),
        _samples([("red", "film"), ("blue", "")]),
        _samples(images),
        _samples(images[::-1]),
        _samples([image.convert("P") for image in images]),
        _samples([image.convert("P") for image in images[:1]]),
        _samples([_recoloured(image.convert("P")) for image in images[:1]]),
        _samples(ArrayImages(pixels)),
        _samples(ImageFiles([tmp_path / "0.png", tmp_path / "1.png"])),
        _samples(ImageFiles([tmp_path / "1.png", tmp_path / "0.png"])),
        _samples([torch.arange(5)]),
        _samples([torch.arange(6)]),
    ]
    found = [hash_samples(each) for each in samples]
    assert None not in found
    assert len(set(found)) == len(samples)
    assert hash_samples(_samples(Pictures(stored, "here"))) == found[11]  # both are hashed by the contents of the files
    assert hash_samples(samples[6].take([1, 0])) == found[5]
    assert hash_samples(_samples([object()])) is None
