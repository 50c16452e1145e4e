"""What is refused before the work begins: models that are not what their configs say, and options that do not suit a
model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from epmq_cli.checkpoint.int4_linear import GROUPS, kernel_group, obstacle
from epmq_cli.checkpoint.load import refuse
from epmq_cli.config.schema import Evaluation, Harness
from epmq_cli.config.validate import check_choice
from epmq_cli.data.suite import Suite, Task
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.evaluate.metrics import PERPLEXITY
from epmq_cli.families.family import Family
from epmq_cli.families.refusal import refused, unknown_tensor
from epmq_cli.families.structure import Table
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.merge.engine import SuiteModels
from epmq_cli.merge.method import MergeMethod, method_name
from epmq_cli.quantize.formats.format import NumberFormat, group_columns
from epmq_cli.quantize.linalg import is_finite

SMALLEST_GROUP = 8  # that a message offers


def check_gradients(method: MergeMethod, family: Family) -> None:
    """ConfigError where a merge method needs gradients of what heads say and the family has no heads."""
    if "gradients" in method.needs and family.heads == "none":
        raise ConfigError(
            f"merge={method_name(method)} takes gradients of the heads' class probabilities, and models of family "
            f"{family.name} have no heads; use another merge method"
        )


def check_scoring(suite: Suite, family: Family, evaluation: Evaluation, scored: bool) -> None:
    """ConfigError where models of the family cannot be scored as tasks or evaluation say. `scored`: whether tasks are
    scored on their test samples."""
    for task in suite.members:
        check_choice(f"suite.tasks.{task.name}.metric", task.metric, family.metrics)
        family.check_task(task)
        check_metric(task, scored)
        if task.heads == "expert" and family.heads == "none":
            raise ConfigError(
                f"suite.tasks.{task.name}.heads must be base, as its family has no heads, got {task.heads!r}"
            )
    if isinstance(evaluation, Harness) and not isinstance(family.tasks, LanguageModel):
        raise ConfigError(
            f"eval=lm_eval scores language models, and those of family {suite.family} are none; use eval=default"
        )


def check_metric(task: Task, scored: bool) -> None:
    """ConfigError where a task's metric is not one of the kind of labels that its data says to have."""
    where, regression = f"suite.tasks.{task.name}", getattr(task.data, "regression", None)
    if task.metric == PERPLEXITY:
        return
    if regression is True and task.metric != "spearman":
        raise ConfigError(
            f"{where}.metric must be spearman where data.regression is true, got {task.metric}, which compares "
            "classes; for labels that are classes set data.regression: false"
        )
    if regression is False and task.metric == "spearman":
        raise ConfigError(
            f"{where}.metric is spearman, which ranks numbers, and data.regression is false, which makes labels "
            "classes; set data.regression: true, or metric: accuracy"
        )
    if scored and getattr(task.data, "label", "") is None:
        raise ConfigError(
            f"{where}.data.label is null, and {task.metric} needs labels; name their column, or set eval.stages=[] to "
            "merge and calibrate without scoring"
        )


def check_lengths(suite: Suite, family: Family, folder: Path) -> None:
    """ConfigError where a task's texts or sequences may be longer than the model in the folder can read."""
    most = family.positions(folder)
    for task in suite.members:
        if most is not None and task.max_length > most:
            raise ConfigError(
                f"suite.tasks.{task.name}.max_length must be at most {most}, the positions of the model in {folder}, "
                f"got {task.max_length}"
            )


def check_described(model: nn.Module, family: Family, models: SuiteModels) -> None:
    """ModelError where the base's config describes another model than its files hold, such as one of fewer blocks."""
    own, read = model.state_dict(), set(models.source.names)
    where = f"base: {models.base.path / 'config.json'} describes"
    for name in models.source.names:
        if name not in own:
            raise ModelError(f"{where} a model without {name}, which its files have; fetch it again")
    for section in (block for stack in family.stacks(model) for block in stack.blocks):
        for name in map(section.name, section.module.state_dict()):
            if own[name].is_floating_point() and name not in read:
                raise ModelError(f"{where} a model with {name}, which its files have not; fetch it again")


def check_parts(model: nn.Module, family: Family) -> None:
    """ModelError where the model has a tensor that the family neither solves nor knows to be right as merged."""
    modules, tables = set[str](), set[str]()
    for stack in family.stacks(model):
        modules |= {section.name(name) for section in stack.sections for name in section.modules}
        modules |= {stack.first_norm} if stack.first_norm else set()
        for part in stack.stem:
            if isinstance(part, Table):
                tables |= {f"{name}.weight" for name in (part.name, part.reader) if name}
            else:
                tables |= {f"{name}.weight" for name in (part.convolution, part.positions)} | {str(part.class_token)}
    rest = [name for name in model.state_dict() if name not in tables]
    if (name := unknown_tensor(rest, modules, family.kept)) is not None:
        raise refused(family, f"{type(model).__name__} has {name}, which no step of the family knows")


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the base as the type has it, in float32; ModelError where it holds a NaN or an infinity then."""
    found = tensor.to(dtype).float()
    if not is_finite(found):
        if is_finite(tensor):
            kind = str(dtype).removeprefix("torch.")
            raise ModelError(f"base: {name} does not fit into {kind}; choose another pack.dtype, such as bfloat16")
        raise ModelError(f"base: {name} holds a NaN or an infinity; train or fetch the model again")
    return found


def check_groups(student: nn.Module, family: Family, formats: Sequence[NumberFormat]) -> None:
    """Refuses a group size that does not divide the inputs of every linear that is to be quantized."""
    widths = {name: width for name, (_, width) in linear_shapes(student, family)}
    for format, (name, width) in product(formats, widths.items()):
        if width % group_columns(format, width):
            raise ConfigError(
                f"group_size={format.group_size} must divide the {width} inputs of {name}; {_possible(widths.values())}"
            )


def _possible(widths: Iterable[int]) -> str:
    """The group sizes that divide all these numbers of inputs, and which of them the kernels take."""
    common = math.gcd(*widths)
    sizes = [size for size in range(SMALLEST_GROUP, common + 1) if common % size == 0]
    fast = [size for size in sizes if kernel_group(size) is not None]
    row = "-1 (one group a row)"
    if not sizes:
        return f"no group size divides the inputs of all linears of this model; use {row}"
    kernels = (
        f"the int4 kernels take {_listed(fast)}" if fast else f"the int4 kernels take multiples of {GROUPS[-1]} alone"
    )
    return f"use one that divides the inputs of all linears of this model, {_listed(sizes)}, or {row}; {kernels}"


def _listed(sizes: Sequence[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, sizes[:-1])), str(sizes[-1]))))


def check_kernel(
    model: nn.Module, family: Family, formats: Sequence[NumberFormat], wanted: Evaluation, device: torch.device
) -> None:
    """Refuses to score on the int4 kernel what it does not take, before anything is calibrated. `formats`: those that
    the checkpoint stores packed."""
    if wanted.kernel != "int4" or "quantized" not in wanted.stages:
        return
    obstacles: dict[str, str | None] = {}
    for format, (name, shape) in product(formats, linear_shapes(model, family)):
        obstacles[name] = obstacles.get(name) or obstacle(format, shape, device)
    refuse(obstacles)


def linear_shapes(student: nn.Module, family: Family) -> Iterator[tuple[str, torch.Size]]:
    """The linears that are to be quantized."""
    for block in family.blocks(student):
        for name in block.linears:
            yield block.name(name), block.module.get_parameter(f"{name}.weight").shape
