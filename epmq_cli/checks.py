"""What is refused before the work begins: models that are not what their configs say, and options that do not suit a
model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from epmq_cli.config import Evaluation, Harness
from epmq_cli.errors import ConfigError, ModelError, check_choice
from epmq_cli.families.family import Family, LanguageModel
from epmq_cli.inference.int4 import obstacle
from epmq_cli.inference.load import refuse
from epmq_cli.linalg import is_finite
from epmq_cli.merge.apply import Models
from epmq_cli.quantize.grid import GridSpec
from epmq_cli.quantize.result import Quantizer
from epmq_cli.suites import Suite


def check_scoring(suite: Suite, family: Family, evaluation: Evaluation) -> None:
    """ConfigError where models of the family cannot be scored as tasks or evaluation say."""
    for task in suite.members:
        check_choice(f"suite.tasks.{task.name}.metric", task.metric, family.metrics)
        family.check_task(task)
        if task.heads == "expert" and family.heads == "none":
            raise ConfigError(
                f"suite.tasks.{task.name}.heads must be base, as its family has no heads, got {task.heads!r}"
            )
    if isinstance(evaluation, Harness) and not isinstance(family, LanguageModel):
        raise ConfigError(
            f"eval=lm_eval scores language models, and those of family {suite.family} are none; use eval=default"
        )


def check_described(model: nn.Module, family: Family, models: Models) -> None:
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


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the base as the type has it, in float32; ModelError where it holds a NaN or an infinity then."""
    found = tensor.to(dtype).float()
    if not is_finite(found):
        if is_finite(tensor):
            kind = str(dtype).removeprefix("torch.")
            raise ModelError(f"base: {name} does not fit into {kind}; choose another pack.dtype, such as bfloat16")
        raise ModelError(f"base: {name} holds a NaN or an infinity; train or fetch the model again")
    return found


def check_groups(student: nn.Module, family: Family, spec: GridSpec | None) -> None:
    """Refuses a group size that does not divide the inputs of every linear that is to be quantized."""
    if spec is None:
        return
    for name, (_, width) in linear_shapes(student, family):
        if width % spec.columns(width):
            raise ConfigError(
                f"group_size={spec.group_size} must divide the {width} inputs of {name}; "
                "use a divisor, or group_size=-1 for one group a row"
            )


def check_kernel(
    model: nn.Module, family: Family, quantizer: Quantizer, wanted: Evaluation, device: torch.device
) -> None:
    """Refuses, before anything is calibrated, to score on the int4 kernel what it will not take."""
    if wanted.kernel != "int4" or "quantized" not in wanted.stages:
        return
    obstacles = {}
    if quantizer.spec is not None:
        widest = replace(quantizer.spec, bits=max(quantizer.widths))
        obstacles = {name: obstacle(widest, shape, device) for name, shape in linear_shapes(model, family)}
    refuse(obstacles)


def linear_shapes(student: nn.Module, family: Family) -> Iterator[tuple[str, torch.Size]]:
    """The linears that are to be quantized."""
    for block in family.blocks(student):
        for name in block.linears:
            yield block.name(name), block.module.get_parameter(f"{name}.weight").shape
