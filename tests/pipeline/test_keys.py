"""Oracles: what a result depends on and what not, option by option and byte by byte."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from epmq_cli.data.table import Table
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.keys import differences, digest, identity, of_batches, of_scoring
from tests.hubs import config


def identity_of(hub: Path, *overrides: str) -> dict[str, Any]:
    cfg = config(hub, *overrides)
    job = make_job(cfg)
    models, _, _ = steps.open_models(job)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    drawn = steps.calibration_batches(job, models.base.path)
    return identity(resolved, models, drawn, job.device)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("bits=3", "bits"),
        ("guidance.lam=0.5", "guidance lam"),
        ("merge.scale=0.1", "merge scale"),
        ("pack.dtype=float16", "pack dtype"),
        ("calib.batch_size=4", "calib batch_size"),
        ("seed=1", "seed"),
    ],
)
def test_options_that_change_the_result_change_the_key(option: str, named: str, bert_hub: Path) -> None:
    one, other = identity_of(bert_hub), identity_of(bert_hub, option)
    assert digest(one) != digest(other)
    assert named in list(differences(one, other))


@pytest.mark.parametrize(
    "option", ["out=elsewhere", "resume=never", "eval.samples=3", "calib.memory=1KB", "calib.student=disk"]
)
def test_options_that_do_not_keep_it(option: str, bert_hub: Path) -> None:
    assert digest(identity_of(bert_hub)) == digest(identity_of(bert_hub, option))


def test_threads_count(bert_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = identity_of(bert_hub)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert list(differences(one, identity_of(bert_hub))) == ["machine threads"]


def test_the_code_counts(bert_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = identity_of(bert_hub)
    monkeypatch.setattr("epmq_cli.pipeline.keys.of_code", lambda: "edited")
    assert list(differences(one, identity_of(bert_hub))) == ["versions of epmq's code"]


def test_models_count_by_what_their_files_hold(bert_hub: Path, tmp_path: Path) -> None:
    import shutil

    hub = tmp_path / "hub"
    shutil.copytree(bert_hub, hub)
    suite = hub / "configs" / "suite" / "mini.yaml"
    suite.write_text(suite.read_text().replace(str(bert_hub), str(hub)))
    before, file = identity_of(hub), hub / "first" / "model.safetensors"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    os.utime(file)
    assert digest(identity_of(hub)) == digest(before)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of the same size, and below with the same date
    file.write_bytes(content)
    os.utime(file, ns=times)
    assert list(differences(before, identity_of(hub))) == ["models expert of first model.safetensors"]


def test_an_identity_is_json(bert_hub: Path) -> None:
    found = identity_of(bert_hub)
    assert digest(json.loads(json.dumps(found))) == digest(found)


def test_batches_count_by_names_types_shapes_and_values() -> None:
    batch = {"x": torch.arange(6)}
    others = [{"y": torch.arange(6)}, {"x": torch.arange(6).int()}, {"x": torch.arange(6).view(2, 3)}]
    others.append({"x": torch.arange(1, 7)})
    assert len({of_batches([found]) for found in [batch, *others]}) == 5
    assert of_batches([batch]) == of_batches([{"x": torch.arange(6)}])


def test_scores_are_of_the_test_data_as_they_are(bert_hub: Path, tmp_path: Path) -> None:
    job = make_job(config(bert_hub))
    table = tmp_path / "test.tsv"
    table.write_text("label\ttext\n0\tred\n")
    source = Table(str(table), str(table))
    before = of_scoring(job.evaluation, [], [source])
    assert of_scoring(job.evaluation, [], [source]) == before
    table.write_text("label\ttext\n0\tblue\n")
    assert of_scoring(job.evaluation, [], [source]) != before
