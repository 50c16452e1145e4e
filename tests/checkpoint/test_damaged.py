"""Oracle: a merge of undamaged files. Damage to an expert or the base is refused in one sentence; damage that leaves
all numbers finite cannot be detected without a manifest, and the merge contains finite numbers."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from epmq_cli.data.images import Npz
from epmq_cli.data.suite import Suite
from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.merge.task_arithmetic import TaskArithmetic
from tests.helpers.counts import FUZZED, TRIED
from tests.helpers.edited import copied
from tests.helpers.tiers import first, slow

FEW_OR_MANY = pytest.mark.parametrize("count", [60, slow(1500)])


def merge(hub: Path) -> dict[str, torch.Tensor]:
    """Reads all tensors that a run reads from the models."""
    values: Any = OmegaConf.to_container(OmegaConf.load(hub / "configs/suite/mini.yaml"))
    tasks = {name: {**task, "data": Npz("unread.npz")} for name, task in values["tasks"].items()}
    models = SuiteModels(Suite("mini", "clip", str(hub / "base"), tasks), FAMILIES["clip"])
    return dict(LazyMerge(models.source, TaskArithmetic(0.3), torch.float32))


def outcome(hub: Path) -> str:
    """Whether a merge is refused or done."""
    TRIED[FUZZED] += 1
    try:
        found = merge(hub)
    except ModelError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(("base", "expert of task first", "the merge of "))
        return "refused"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    return "merged"


@FEW_OR_MANY
@pytest.mark.parametrize("model", first(1, ["base", "first"]))
def test_truncated_files_are_refused_at_any_length(model: str, count: int, clip_hub: Path, tmp_path: Path) -> None:
    hub = copied(clip_hub, tmp_path / "hub")
    path = hub / model / "model.safetensors"
    content, generator = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    ends = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1]
    ends += [generator.randrange(len(content)) for _ in range(count - len(ends))]
    for end in ends:
        path.write_bytes(content[:end])
        assert outcome(hub) == "refused", end


@FEW_OR_MANY
@pytest.mark.parametrize("model", first(1, ["base", "first"]))
def test_flipped_bits_are_refused_or_leave_the_numbers_finite(
    model: str, count: int, clip_hub: Path, tmp_path: Path
) -> None:
    """Half of the flipped bits lie in the header, where most are detected; half lie in the data, where only NaN and
    infinity are."""
    hub = copied(clip_hub, tmp_path / "hub")
    path = hub / model / "model.safetensors"
    content, generator, found = path.read_bytes(), random.Random(1), []
    header = 8 + int.from_bytes(content[:8], "little")
    for number in range(count):
        place = generator.randrange(header) if number % 2 else generator.randrange(header, len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        found.append((number % 2, outcome(hub)))
    assert {(1, "refused"), (0, "merged")} <= set(found)


def test_undamaged_files_are_merged(clip_hub: Path, tmp_path: Path) -> None:
    hub = copied(clip_hub, tmp_path / "hub")
    assert outcome(hub) == "merged"
    shutil.rmtree(hub / "first")
    assert outcome(hub) == "refused"
