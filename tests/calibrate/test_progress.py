"""Oracle: the same walk in memory, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from epmq_cli.calibrate.block_refinement import Chunks
from epmq_cli.calibrate.passes import run_passes
from epmq_cli.calibrate.progress import WalkProgress, WalkResult
from epmq_cli.calibrate.student import Student
from epmq_cli.calibrate.weight_sink import WeightSink
from epmq_cli.errors import RunError
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.progress import RunProgress
from epmq_cli.quantize.formats.format import QuantizedWeight
from tests.helpers.hubs import config
from tests.helpers.tiers import only

OPTIONS = {
    "symmetric": (),
    "zero points, float16": ("quant.symmetric=false", "pack.dtype=float16"),
    "dense": ("quant=none", "pack.dtype=bfloat16"),
    "two widths": ("bits=3.5",),
    "folded": ("quant=awq", "quant.alpha=0.5"),
}


def run_walk(hub: Path, progress: RunProgress, *options: str) -> tuple[WalkResult, dict[str, torch.Tensor]]:
    """The result of a walk of the miniature BERT, and the student's tensors after it."""
    job = make_job(config(hub, "guidance=feature", *options))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    merged = LazyMerge(models.source, job.merge, dtype)
    copy_into(model, merged)
    student = Student(model, job.family, guide.references(job, model, merged), job.guidance, dtype)
    result = run_passes(student, Chunks(batches), job.quantizer, progress_for=progress.of_walk)
    return result, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(
    one: tuple[WalkResult, dict[str, torch.Tensor]], other: tuple[WalkResult, dict[str, torch.Tensor]]
) -> None:
    assert one[0].records == other[0].records
    assert list(one[0].weights) == list(other[0].weights)
    for name, weight in one[0].weights.items():
        others = other[0].weights[name]
        assert torch.equal(weight.dequantize(), others.dequantize())
        if isinstance(weight, QuantizedWeight):
            assert isinstance(others, QuantizedWeight)
            assert (weight.format, weight.dtype) == (others.format, others.dtype)
            assert torch.equal(weight.codes.view(torch.uint8), others.codes.view(torch.uint8))
            assert torch.equal(weight.grid.scale, others.grid.scale)
            assert torch.equal(weight.grid.zeros, others.grid.zeros)
    assert all(torch.equal(one[1][name], tensor) for name, tensor in other[1].items())


@pytest.mark.parametrize("kind", only(("folded",), OPTIONS))
def test_a_walk_in_files_equals_one_in_memory_and_resumes_from_any_entry(
    kind: str, bert_hub: Path, tmp_path: Path
) -> None:
    options = OPTIONS[kind]
    memory = run_walk(bert_hub, RunProgress(), *options)
    files = run_walk(bert_hub, RunProgress(tmp_path), *options)
    assert list(memory[0].weights.in_memory()) == list(memory[0].weights)
    assert not files[0].weights.in_memory()
    assert_same(files, memory)
    again = run_walk(bert_hub, RunProgress(tmp_path), *options)  # every entry exists
    assert_same(again, memory)
    entries = sorted((tmp_path / "last").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for entry in reversed(entries):
        entry.unlink()
        if entry in entries[1:3]:
            assert_same(run_walk(bert_hub, RunProgress(tmp_path), *options), memory)
            break


def test_weights_in_files_take_no_memory_of_their_own(bert_hub: Path, tmp_path: Path) -> None:
    """The address of the tensor is mapped to the file."""
    result, _ = run_walk(bert_hub, RunProgress(tmp_path))
    weight = next(iter(result.weights.values()))
    assert isinstance(weight, QuantizedWeight)
    address, maps = weight.codes.data_ptr(), Path("/proc/self/maps").read_text().splitlines()
    spans = [(line, *(int(end, 16) for end in line.split()[0].split("-"))) for line in maps]
    assert [line for line, start, end in spans if start <= address < end and str(tmp_path) in line]


def test_a_damaged_entry_is_refused_in_a_sentence(bert_hub: Path, tmp_path: Path) -> None:
    run_walk(bert_hub, RunProgress(tmp_path))
    entry = next((tmp_path / "last").iterdir())
    entry.write_bytes(entry.read_bytes()[:20])
    with pytest.raises(RunError, match="is damaged .*; start from the beginning with resume=never"):
        run_walk(bert_hub, RunProgress(tmp_path))


def test_progress_without_a_folder_restores_nothing(bert_hub: Path) -> None:
    job = make_job(config(bert_hub))
    models, model, dtype = steps.open_models(job)
    merged = LazyMerge(models.source, job.merge, dtype)
    student = Student(model, job.family, guide.references(job, model, merged), replace(job.guidance), dtype)
    progress, result = WalkProgress(), WalkResult(WeightSink(), [])
    progress.write("0000", student, result)
    assert not progress.restore("0000", student, result)
    assert not progress.restore_all(["0000"], student, result)
