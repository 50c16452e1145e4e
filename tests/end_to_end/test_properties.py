"""Oracles: bounds and identities that hold for any numbers, and a naive TIES. The numbers come from hypothesis, with
fixed seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from epmq_cli.checkpoint import gptq
from epmq_cli.checkpoint.layouts import LAYOUTS
from epmq_cli.merge.average import Average
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.method import MergeMethod
from epmq_cli.merge.named_tensors import NamedTensors
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.task_arithmetic import TaskArithmetic
from epmq_cli.merge.ties import Ties
from epmq_cli.models.model_folder import ModelFolder, SafetensorsFiles, TensorInfo
from epmq_cli.quantize.formats.format import Grid, QuantizedWeight
from epmq_cli.quantize.formats.int import BITS, IntFormat
from epmq_cli.quantize.rtn import rtn
from epmq_cli.store.safetensors_writer import write_file
from tests.helpers.counts import CLAIMS, TRIED
from tests.helpers.packs import LINEAR, PACKS, exporter_of, model_of
from tests.helpers.tiers import slow

FEW_OR_MANY = pytest.mark.parametrize("examples", [40, slow(2000)])
CPU = torch.device("cpu")
FORMATS = st.builds(IntFormat, st.sampled_from(BITS), st.integers(1, 9), st.sampled_from(["none", "whole"]))
SEARCHES = st.sampled_from(["minmax", "mse"])
SEEDS = st.integers(0, 1 << 30)


def check_examples(examples: int, claim: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    """Checks the claim for this number of examples, the same ones each time."""
    options = settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )

    @wraps(claim)
    def counted(*values: Any, **named: Any) -> None:
        claim(*values, **named)
        TRIED[CLAIMS] += 1

    options(given(*strategies)(counted))()


@FEW_OR_MANY
def test_rounded_weights_lie_on_the_grid_within_half_a_step(examples: int) -> None:
    def claim(
        format: IntFormat, search: str, rows: int, groups: int, seed: int, exponent: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, groups * format.group_size, generator=generator) * 2.0**exponent
        found = rtn(weight, format, search, dtype)
        scale, zero = found.grid.scale, found.grid.zeros
        assert int(found.codes.min()) >= format.lowest
        assert int(found.codes.max()) <= format.highest
        assert torch.equal(scale, scale.to(dtype).float())
        step = scale.repeat_interleave(format.group_size, 1)
        points = zero.repeat_interleave(format.group_size, 1)
        assert bool((zero == zero.round()).all())
        error = ((found.codes - points) * step - weight).abs()
        if search == "minmax":  # a scale rounded down does not reach the ends of the range
            missed = (format.highest - format.lowest) * torch.finfo(dtype).eps
            assert bool((error <= (0.5 + missed + 1e-4) * step).all())
        else:
            plain = rtn(weight, format, "minmax", torch.float32)
            if dtype == torch.float32:
                assert float(error.square().sum()) <= 1.0001 * float((plain.dequantize() - weight).square().sum())

    types = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    check_examples(
        examples, claim, FORMATS, SEARCHES, st.integers(1, 5), st.integers(1, 3), SEEDS, st.integers(-8, 8), types
    )


@FEW_OR_MANY
def test_packed_weights_are_read_back_bit_for_bit(examples: int) -> None:
    def claim(format: IntFormat, rows: int, groups: int, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)

        def integers(*shape: int) -> Tensor:
            return torch.randint(format.lowest, format.highest + 1, shape, generator=generator, dtype=torch.int8)

        codes, scale = integers(rows, groups * format.group_size), torch.rand(rows, groups, generator=generator)
        zero = None if format.zero_points == "none" else integers(rows, groups).float()
        weight = QuantizedWeight(codes, Grid(scale.to(dtype).float(), zero), format, dtype)
        for exporter in filter(lambda exporter: exporter.packs, map(exporter_of, PACKS)):
            if "gptq" in exporter.tags and format.bits not in gptq.BITS:
                continue
            with tempfile.TemporaryDirectory() as name:
                path = Path(name) / "x.safetensors"
                write_file(path, exporter.entries(LINEAR, weight))
                quantization = exporter.config(model_of(codes.shape), {LINEAR: weight}, dequantize=False)
                layout = LAYOUTS[quantization["quant_method"]](Path(name), quantization)
                found = layout.read(SafetensorsFiles(path, "checkpoint"), LINEAR, codes.shape, CPU)
            assert torch.equal(found.codes, codes)
            assert torch.equal(found.grid.scale, weight.grid.scale)
            assert torch.equal(found.grid.zeros, weight.grid.zeros)
            assert found.dtype == dtype

    types = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    check_examples(examples, claim, FORMATS, st.integers(1, 40), st.integers(1, 4), SEEDS, types)


class InMemory:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.infos = {name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


Model = list[list[float]]
"""Tensors as rows of numbers."""
NUMBERS = st.integers(-16, 16).map(lambda number: number / 8)  # their sums are exact, and many cancel
MODELS = st.lists(st.integers(1, 9), min_size=1, max_size=3).flatmap(
    lambda sizes: st.lists(
        st.tuples(*(st.lists(NUMBERS, min_size=size, max_size=size) for size in sizes)), min_size=2, max_size=5
    )
)
"""A base and one to four experts of the same sizes."""
METHODS = st.one_of(
    st.just(Average()),
    st.builds(TaskArithmetic, st.sampled_from([0, 0.25, 1, 2])),
    st.builds(
        Ties, st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.sampled_from([0.5, 1, 2]), st.sampled_from(["sum", "mean"])
    ),
)


def merged(merge: MergeMethod, models: list[Model], piece: int = 1 << 18) -> Tensor:
    """The merge of a base and its experts, all tensors in one vector."""
    held = [InMemory({f"w{i}": torch.tensor(row) for i, row in enumerate(model)}) for model in models]
    folders = [ModelFolder(Path(f"m{i}"), f"m{i}", {}, tensors) for i, tensors in enumerate(held)]
    names = {name: name for name in held[0].infos}
    base, *experts = (NamedTensors(folder, names) for folder in folders)
    with patch("epmq_cli.merge.source.PIECE", piece), patch("epmq_cli.merge.engine.PIECE", piece):
        source = MergeSource(base, {expert.folder.role: expert for expert in experts})
        return torch.cat([tensor for _, tensor in LazyMerge(source, merge, torch.float32)])


def flat(model: Model) -> Tensor:
    return torch.tensor([number for row in model for number in row])


@FEW_OR_MANY
def test_the_order_of_experts_and_the_size_of_pieces_change_nothing(examples: int) -> None:
    def claim(merge: MergeMethod, models: list[Model], random: Any, piece: int) -> None:
        expected = merged(merge, models)
        others = models[1:]
        random.shuffle(others)
        torch.testing.assert_close(merged(merge, [models[0], *others]), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(merged(merge, models, piece), expected)

    check_examples(examples, claim, METHODS, MODELS, st.randoms(use_true_random=False), st.integers(1, 4))


@FEW_OR_MANY
def test_experts_that_are_the_base_give_the_base(examples: int) -> None:
    def claim(merge: MergeMethod, models: list[Model], count: int) -> None:
        assert torch.equal(merged(merge, [models[0]] * (1 + count)), flat(models[0]))

    check_examples(examples, claim, METHODS, MODELS, st.integers(1, 4))


def naive_ties(models: list[Model], ties: Ties) -> Tensor:
    """The paper's algorithm 1 on whole vectors in float64, with this tool's rule for cancelling signs."""
    base, vectors = flat(models[0]).double(), []
    for expert in models[1:]:
        vector = flat(expert).double() - base
        kept = max(1, int(ties.density * len(vector)))
        threshold = vector.abs().sort(descending=True).values[kept - 1]
        vectors.append(torch.where(vector.abs() >= threshold, vector, 0))
    stacked = torch.stack(vectors)
    signs = stacked.sum(0).sign()
    majority = 1.0 if signs.sum() >= 0 else -1.0
    signs = torch.where((signs == 0) & stacked.ne(0).any(0), majority, signs)
    agreeing = torch.where(stacked * signs > 0, stacked, 0)
    value = agreeing.sum(0)
    if ties.combine == "mean":
        value = value / agreeing.ne(0).sum(0).clamp(min=1)
    return (base + ties.scale * value).float()


@FEW_OR_MANY
def test_ties_equals_the_naive_version(examples: int) -> None:
    def claim(density: float, scale: float, combine: str, models: list[Model]) -> None:
        ties = Ties(density, scale, combine)
        torch.testing.assert_close(merged(ties, models), naive_ties(models, ties), rtol=1e-6, atol=1e-6)

    densities = st.floats(0.01, 1)
    check_examples(examples, claim, densities, st.sampled_from([0.3, 1.0]), st.sampled_from(["sum", "mean"]), MODELS)
