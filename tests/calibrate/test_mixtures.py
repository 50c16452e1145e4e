"""Mixtures of experts. Oracles: the lone expert, rounding to nearest, and the same walk in memory, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from epmq_cli.calibrate.activations.hidden_state import HiddenState
from epmq_cli.calibrate.activations.pausable_forward import pause_hooks
from epmq_cli.calibrate.activations.routing import Router
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.errors import ModelError
from epmq_cli.models.routed_experts import unpacked
from epmq_cli.pipeline.progress import RunProgress
from epmq_cli.pipeline.record import events
from epmq_cli.quantize.rtn import rtn
from tests.calibrate.test_progress import assert_same, run_walk
from tests.families.test_decoder import distances
from tests.helpers.architectures import GROUPED, MIXED, TAKEN, built
from tests.helpers.hubs import run_in, walk
from tests.helpers.minihub import decoder_files
from tests.helpers.tiers import only

AUTO = "suite.family=auto"
PADDED = ("+suite.tasks.first.packing=false", "+suite.tasks.second.packing=false")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return decoder_files(tmp_path / "hub", built(TAKEN["mixtral"]))


@pytest.mark.parametrize("kind", only(("mixtral",), MIXED))
def test_a_lone_expert_with_the_routers_of_the_base_is_reproduced(kind: str, tmp_path: Path) -> None:
    """One task, no anchor, no quantizer: the student starts from another model and ends as the expert."""
    folder = decoder_files(tmp_path, built(TAKEN[kind]))
    base, expert = (load_file(folder / name / "model.safetensors") for name in ("base", "first"))
    expert |= {name: tensor for name, tensor in base.items() if name.endswith((".gate.weight", ".router.weight"))}
    save_file(expert, folder / "first" / "model.safetensors", {"format": "pt"})
    far, near = distances(folder, AUTO, *PADDED[:1])
    assert near < 0.02 * far


def test_a_teacher_is_routed_as_the_student() -> None:
    """Oracle: the teacher's own experts with the student's choice and factors, in one call."""
    blocks = [unpacked(built(TAKEN["mixtral"])).model.layers[0].mlp for _ in range(2)]
    blocks[1].gate.weight.neg_()
    hidden, store, names = torch.randn(2, 5, 32), ActivationStore(1e9), ["experts.1.w1", "experts.1.w2"]
    student = HiddenState(hidden, [], None, store)
    teacher = HiddenState(2 * hidden, [], None, store, router=Router(student.router))
    for block in blocks:
        block.requires_grad_(False)
    with pause_hooks(blocks[0], names, ["gate"]), pause_hooks(blocks[1], names, ["gate"]):
        rows, others = (
            stream.run_until(block, names[:1]) for stream, block in zip((student, teacher), blocks, strict=True)
        )
        assert torch.equal(others, 2 * rows)
        for stream, block in zip((student, teacher), blocks, strict=True):
            stream.finish(block)
    _, factors, chosen = blocks[0].gate(hidden.flatten(0, 1))
    wanted = blocks[1].experts(2 * hidden.flatten(0, 1), chosen, factors)
    assert torch.equal(teacher.hidden.flatten(0, 1), wanted)
    assert not torch.equal(teacher.hidden, blocks[1](2 * hidden))


def test_experts_without_tokens_keep_the_anchor_rounded_to_nearest(tmp_path: Path) -> None:
    many = t.MixtralConfig(**{**GROUPED, "num_hidden_layers": 1}, num_local_experts=16)
    folder = decoder_files(tmp_path, built(lambda: t.MixtralForCausalLM(many)))
    options = [AUTO, "guidance=expert", "calib.samples=1", "merge=none"]
    found = walk(folder, *options)
    unseen = [record for record in found.walked.records if record.tokens == 0]
    assert 0 < len(unseen) < 48
    assert events(found.walked)["unrouted"] == events(found.walked)["fallbacks"] == len(unseen)
    assert all((record.fallback, record.loss, "experts" in record.name) == ("rtn", None, True) for record in unseen)
    base = load_file(folder / "base" / "model.safetensors")
    for record in unseen:
        weight = found.walked.weights[record.name]
        wanted = rtn(base[f"{record.name}.weight"], weight.format, "mse", torch.float32)  # type: ignore[union-attr]
        assert torch.equal(weight.dequantize(), wanted.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("bits=3.5",), ("guidance=merged", "quant=rtn"), PADDED])
def test_walks_resume_from_any_block_with_the_same_bytes(options: tuple[str, ...], hub: Path, tmp_path: Path) -> None:
    memory = run_walk(hub, RunProgress(), AUTO, *options)
    assert_same(run_walk(hub, RunProgress(tmp_path), AUTO, "calib.memory=1KB", *options), memory)
    entries = sorted((tmp_path / "last").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for entry in reversed(entries[1:]):
        entry.unlink()
        assert_same(run_walk(hub, RunProgress(tmp_path), AUTO, *options), memory)


def test_merges_that_measure_inputs_are_refused(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"experts\.0\.w1 is in a mixture of experts, whose inputs merge methods do"):
        run_in(tmp_path / "run", hub, AUTO, "merge=regmean", "eval.stages=[]")


@pytest.mark.slow
def test_stacked_experts_in_files_are_refused(hub: Path, tmp_path: Path) -> None:
    """As save_pretrained writes them with save_original_format=False."""
    model = t.MixtralForCausalLM.from_pretrained(hub / "base")
    for name in ("base", "first", "second"):
        (hub / name / "model.safetensors").unlink()
        model.save_pretrained(hub / name, save_original_format=False)
    with pytest.raises(ModelError, match=r"experts of a mixture in one tensor, .*_proj, epmq reads one for each; save"):
        run_in(tmp_path / "run", hub, AUTO, "eval.stages=[]")
