"""Oracles: the tensors in the model files, and invariants of swapping weights in a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from epmq_cli.calibrate.reference_weights import ReferenceWeights
from epmq_cli.merge.source import MergeSource
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config

NORM, PROJECTION = "vision_model.post_layernorm.weight", "visual_projection.weight"


def nothing(name: str) -> Tensor:
    raise AssertionError(f"the merged {name} was asked for")


@pytest.fixture(scope="module")
def source(clip_hub: Path) -> MergeSource:
    models, _, _ = steps.open_models(make_job(config(clip_hub)))
    return models.source


def test_tensors_of_base_and_experts_are_those_of_their_files(source: MergeSource, clip_hub: Path) -> None:
    found = ReferenceWeights(source, {}, nothing, False)
    base, expert = (load_file(clip_hub / name / "model.safetensors") for name in ("base", "second"))
    assert torch.equal(found.base(NORM), base[NORM])
    assert torch.equal(found.expert("second", NORM), expert[NORM.removeprefix("vision_model.")])
    assert not torch.equal(found.base(NORM), found.expert("second", NORM))


def test_shared_tensors_are_equal_in_all_models(source: MergeSource) -> None:
    projection, norm = torch.ones(3), torch.zeros(3)
    found = ReferenceWeights(source, {PROJECTION: projection, NORM: norm}, nothing, False)
    assert found.base(PROJECTION) is found.expert("first", PROJECTION) is projection
    assert found.base(NORM) is found.expert("first", NORM) is norm  # although base and experts have one too


def test_merged_tensors_stand_in_for_every_expert_but_not_for_the_base(source: MergeSource) -> None:
    merged, shared = torch.full((3,), 7.0), torch.ones(3)
    found = ReferenceWeights(source, {PROJECTION: shared}, lambda _: merged, True)
    assert found.expert("first", NORM) is found.expert("second", NORM) is merged
    assert torch.equal(found.base(NORM), source.base(NORM))
    assert found.expert("first", PROJECTION) is shared


def test_names_exclude_those_under_a_prefix(source: MergeSource) -> None:
    found = ReferenceWeights(source, {}, nothing, False).names(("vision_model.encoder.layers.0.", NORM))
    assert set(source.names) - set(found) == {
        name for name in source.names if name.startswith("vision_model.encoder.layers.0.") or name == NORM
    }
