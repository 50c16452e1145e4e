"""Oracle: for each section, whole forward passes through a model whose earlier sections are merged and whose section
has the expert's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.input_sums import merged_groups
from epmq_cli.calibrate.merge_data import ExpertMeasurements
from epmq_cli.data.batching import ALL
from epmq_cli.merge.method import Group, InputMoments
from epmq_cli.merge.regmean_pp import RegMeanPP
from tests.calibrate.test_merge_data import measurements
from tests.helpers.minihub import hub_of
from tests.helpers.tiers import only, slow

ALPHA = 0.9


def reference(data: ExpertMeasurements) -> dict[str, Tensor]:
    """The merged tensors, with normal equations in float64."""
    source, masks = data.source, {name: mask for names, mask in data._inputs() for name in names}
    merged = {name: torch.stack([*source.experts(name).values()]).mean(0) for name in source.names}
    for stack in data.family.stacks(data.model):
        for section in stack.sections:
            own = {section.name(local) for local in section.module.state_dict()} & {*source.names}
            groups = [group for group, _ in merged_groups(section, source.names)]
            left, right = dict[str, Tensor](), dict[str, Tensor]()
            for task in source.tasks if groups else []:
                data.put(merged.items())
                data.put((name, source.expert(task, name)) for name in own)
                with torch.inference_mode():
                    moments = data._moments(
                        data.batches[task], {name: masks[name] for group in groups for name in group}, ALL
                    )
                for name, G in moments.items():
                    shrunk = ALPHA * G + (1 - ALPHA) * G.diagonal().diag()
                    W = source.expert(task, f"{name}.weight").double()
                    left[name], right[name] = left.get(name, 0) + shrunk, right.get(name, 0) + shrunk @ W.T
            for name, G in left.items():
                merged[f"{name}.weight"] = torch.linalg.solve(G, right[name]).T.float()
    return merged


@pytest.mark.parametrize("kind", only(("bert", "t5"), ["clip", "bert", "deberta", "t5", "llama"]))
def test_inputs_come_from_merged_sections_and_activations_inside_from_the_expert(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub = hub_of(kind, request, tmp_path / "hub")
    data = measurements(hub, "merge=regmean_pp", "calib.samples=24", "calib.batch_size=8")
    rule = RegMeanPP(ALPHA, False).fit(data.source, data)
    source = data.source
    found = {name: rule.merge(name, source.base(name), source.experts(name)) for name in source.names}
    for name, tensor in reference(data).items():
        scale = float(tensor.abs().max()) or 1.0
        assert float((found[name] - tensor).abs().max()) < 1e-3 * scale, name


@pytest.mark.parametrize("kind", only(("bert", "t5"), ["clip", "bert", "deberta", "t5", "llama"]))
def test_samples_held_out_and_others_are_all(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data = measurements(hub_of(kind, request, tmp_path / "hub"), "merge=regmean_pp")
    source, seen = data.source, list[str]()

    def merge(groups: Sequence[Group], moments: InputMoments) -> dict[str, Tensor]:
        for task in source.tasks:
            names = [group[0] for group in groups]
            whole, fitted, held = (moments(task, names, subset) for subset in ("all", "fitted", "held"))
            for name in names:
                torch.testing.assert_close(fitted[name] + held[name], whole[name], rtol=1e-5, atol=1e-6)
                assert 0.05 < float(held[name].trace() / whole[name].trace()) < 0.5
        seen.extend(name for group in groups for name in group)
        return {f"{name}.weight": source.expert("first", f"{name}.weight") for group in groups for name in group}

    data.merge_sections(lambda: source.model("first"), merge)
    assert sorted(seen) == sorted(name for group in data.linear_groups() for name in group)


@pytest.mark.parametrize("fallback", [False, slow(True)])
def test_smaller_micro_batches_and_files_give_the_same_bytes(fallback: bool, bert_hub: Path) -> None:
    data = measurements(bert_hub, "merge=regmean_pp")
    source, name = data.source, "encoder.layer.1.output.dense.weight"

    def found(data: ExpertMeasurements) -> Tensor:
        return RegMeanPP(ALPHA, fallback).fit(source, data).merge(name, source.base(name), source.experts(name))

    whole = found(data)
    data.micro.samples = 1
    assert torch.equal(found(data), whole)
    assert torch.equal(found(ExpertMeasurements(**{**vars(data), "memory": 1})), whole)
