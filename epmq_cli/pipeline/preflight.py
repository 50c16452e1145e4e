"""Checks of the models before calibration: they must match their configs, and options must suit them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from epmq_cli.checkpoint.int4_linear import GROUPS, kernel_group, obstacle
from epmq_cli.checkpoint.load import refuse
from epmq_cli.config.schema import Evaluation
from epmq_cli.data.suite import TEXT_METRICS, Suite
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.families.family import Family, linear_shapes
from epmq_cli.families.refusal import refused, unknown_tensor
from epmq_cli.families.structure import Table
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.models.mixtures import STACKED
from epmq_cli.quantize.formats.format import NumberFormat, group_columns
from epmq_cli.quantize.linalg import is_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SMALLEST_GROUP = 8  # the smallest group size that a message suggests


def check_lengths(suite: Suite, family: Family, folder: Path) -> None:
    """Raises ConfigError if the lengths of a task's texts exceed the positions of the model in the folder."""
    most = family.positions(folder)
    for task in suite.members:
        lengths = {"max_length": task.max_length, **({"answer_length": task.written} if family.answers else {})}
        if task.metric in TEXT_METRICS and not family.answers:  # a decoder reads prompt and answer
            lengths["max_length and answer_length together"] = task.max_length + task.written
        for name, length in lengths.items():
            if most is not None and length > most:
                raise ConfigError(
                    f"suite.tasks.{task.name}.{name} must be at most {most}, the positions of the model in {folder}, "
                    f"got {length}"
                )


def check_described(model: nn.Module, family: Family, models: SuiteModels) -> None:
    """Raises ModelError if the base's config and weight files describe different models, such as fewer blocks."""
    own, merged = model.state_dict(), set(models.source.names)
    where = f"base: {models.base.path / 'config.json'} describes"
    for name in models.source.names:
        if name not in own and name.endswith(STACKED):
            raise ModelError(
                f"base: {models.base.path} has the experts of a mixture in one tensor, {name}, epmq reads one for "
                "each; save base and experts with save_pretrained, without save_original_format=False"
            )
        if name not in own:
            raise ModelError(f"{where} a model without {name}, but its weight files contain it; fetch it again")
    for section in (block for stack in family.stacks(model) for block in stack.blocks):
        for name in map(section.name, section.module.state_dict()):
            if own[name].is_floating_point() and name not in merged:
                raise ModelError(f"{where} a model with {name}, but its weight files lack it; fetch it again")


def check_parts(model: nn.Module, family: Family) -> None:
    """Raises ModelError if the model has a tensor that the family neither solves nor keeps as merged."""
    modules, tables, left = set[str](), set[str](), tuple[str, ...]()
    for stack in family.stacks(model):
        left += tuple(f"{name}." for name in stack.bypassed)
        modules |= {section.name(name) for section in stack.sections for name in section.modules}
        modules |= {stack.first_norm} if stack.first_norm else set()
        for part in stack.stem:
            if isinstance(part, Table):
                tables |= {f"{name}.weight" for name in (part.name, part.reader) if name}
            else:
                tables |= {f"{name}.weight" for name in (part.convolution, part.positions)} | {str(part.class_token)}
    rest = [name for name in model.state_dict() if name not in tables and not name.startswith(left)]
    if (name := unknown_tensor(rest, modules, family.unsolved)) is not None:
        raise refused(family, f"{type(model).__name__} has {name}, which is not in any step of the family")


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds a tensor of the base to the type, in float32. Raises ModelError if the result has NaN or infinity."""
    result = tensor.to(dtype).float()
    if not is_finite(result):
        if is_finite(tensor):
            kind = str(dtype).removeprefix("torch.")
            raise ModelError(f"base: {name} does not fit into {kind}; choose another pack.dtype, such as bfloat16")
        raise ModelError(f"base: {name} holds a NaN or an infinity; train or fetch the model again")
    return result


def check_groups(student: nn.Module, family: Family, formats: Sequence[NumberFormat]) -> None:
    """Raises ConfigError if a group size does not divide the inputs of every linear that will be quantized."""
    widths = {name: width for name, (_, width) in linear_shapes(student, family)}
    for format, (name, width) in product(formats, widths.items()):
        if width % group_columns(format, width):
            raise ConfigError(
                f"group_size={format.group_size} must divide the {width} inputs of {name}; {_possible(widths.values())}"
            )


def _possible(widths: Iterable[int]) -> str:
    """Names the group sizes that divide all these numbers of inputs, and those that the kernels support."""
    common = math.gcd(*widths)
    sizes = [size for size in range(SMALLEST_GROUP, common + 1) if common % size == 0]
    fast = [size for size in sizes if kernel_group(size) is not None]
    row = "-1 (one group per row)"
    if not sizes:
        return f"no group size divides the inputs of all linears of this model; use {row}"
    kernels = (
        f"the int4 kernels take {_listed(fast)}" if fast else f"the int4 kernels take only multiples of {GROUPS[-1]}"
    )
    return f"use one that divides the inputs of all linears of this model, {_listed(sizes)}, or {row}; {kernels}"


def _listed(sizes: Sequence[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, sizes[:-1])), str(sizes[-1]))))


def check_kernel(
    model: nn.Module, family: Family, formats: Sequence[NumberFormat], evaluation: Evaluation, device: torch.device
) -> None:
    """Raises an error before calibration if `eval.kernel=int4` does not support the linears. `formats`: the formats
    that the checkpoint stores packed."""
    if evaluation.kernel != "int4" or "quantized" not in evaluation.stages:
        return
    obstacles: dict[str, str | None] = {}
    for format, (name, shape) in product(formats, linear_shapes(model, family)):
        obstacles[name] = obstacles.get(name) or obstacle(format, shape, device)
    refuse(obstacles)
