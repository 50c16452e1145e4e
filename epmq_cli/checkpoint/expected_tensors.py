"""The tensors that a checkpoint's config.json implies: names, shapes, types. pipeline/verify.py checks their values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from epmq_cli.checkpoint.calibrated_scales import expected_cache
from epmq_cli.checkpoint.exporter import ExpectedTensor
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.checkpoint.load import blank_model, model_config
from epmq_cli.errors import CheckpointError, first_line
from epmq_cli.models.model_class import ModelClass, equal, model_class, untied_config
from epmq_cli.models.model_folder import TensorInfo, Tensors, model_files, read_json

if TYPE_CHECKING:
    from torch import nn

ROLE = "checkpoint"


def check_described(folder: Path) -> None:
    """CheckpointError if the tensors of a checkpoint of `epmq run` have other names, shapes or types than its
    config.json implies; reads no values."""
    files = model_files(folder, ROLE)
    model = described_model(folder, files)
    expected = expected_tensors(folder, model, signed=False)
    problems = name_problems(model, files, expected)
    problems += [problem for name, info in files.infos.items() if (problem := layout_problem(name, info, expected))]
    if problems:
        raise CheckpointError(
            f"{folder / 'config.json'} describes another model than the files beside it: {problems[0]}; fetch "
            "both again, or run epmq run again"
        )


def name_problems(model: nn.Module, files: Tensors, expected: Mapping[str, ExpectedTensor]) -> list[str]:
    """A phrase for each tensor that is missing and not tied, and for each that the model does not have."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [f"{name} is missing" for name in expected if name not in files.infos and name not in tied]
    return missing + [f"{name} is not a tensor of the model" for name in files.infos if name not in expected]


def tie_problems(folder: Path, files: Tensors) -> list[str]:
    """A phrase for each tensor whose ties differ from config.json.

    A stored copy that config.json ties must have the values of its source. This does not hold for output layers that no
    setting unties, such as those of T5: transformers reads these from the files. A copy that config.json does not
    tie must be stored.
    """
    config, problems = read_json(folder, "config.json", ROLE), list[str]()
    cls = model_class(config, files.infos)
    if cls is None:
        return []
    for copy, source in cls.tieable.items():
        stored, origin = (_stored(name, cls, files) for name in (copy, source))
        if copy not in cls.tied and stored is None and origin is not None:
            problems.append(f"{copy} is missing, which config.json does not tie to {source}")
        settled = copy in cls.tied and stored is not None and origin is not None
        settled = settled and (copy not in cls.outputs or untied_config(config, files.infos, [copy]) is not None)
        if settled and not equal((files, str(stored)), (files, str(origin))):
            problems.append(f"{stored} has other values than {origin}, to which config.json ties it")
    return problems


def lacking_problems(folder: Path, files: Tensors) -> list[str]:
    """A phrase for each tensor that the model class of a dense merge has and its files do not."""
    cls = model_class(read_json(folder, "config.json", ROLE), files.infos)
    return [f"{name} is missing" for name in cls.lacking(files.infos)] if cls is not None else []


def _stored(name: str, cls: ModelClass, files: Tensors) -> str | None:
    """The stored name of a tensor of the class, which may lack the prefix of its body or be an older name."""
    names = {cls.own_name(stored): stored for stored in files.infos}
    return next((names[own] for own in (name, name.removeprefix(f"{cls.prefix}.")) if own in names), None)


def layout_problem(name: str, info: TensorInfo, expected: Mapping[str, ExpectedTensor]) -> str | None:
    """The problem with the shape or type of a stored tensor; None if it has none, or if the tensor is unknown."""
    tensor = expected.get(name, ExpectedTensor(info.shape))
    if info.shape != tensor.shape:
        return f"{name} is {list(info.shape)}, config.json implies {list(tensor.shape)}"
    if tensor.dtype not in (None, info.dtype):
        return f"{name} is of type {info.dtype}, config.json implies {tensor.dtype}"
    return None


def described_model(folder: Path, files: Tensors) -> nn.Module:
    """The model that config.json describes, on the meta device."""
    settings = model_config(folder, files)
    try:
        with torch.device("meta"):
            return blank_model(folder, settings, files)
    except CheckpointError:
        raise
    except Exception as error:  # a config may hold anything, and transformers checks little of it
        reason = first_line(error)
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a model of transformers ({reason}); fetch it again"
        ) from error


def expected_tensors(folder: Path, model: nn.Module, signed: bool) -> dict[str, ExpectedTensor]:
    """Every tensor of the model, as config.json stores it; `signed`: whether scales may be negative."""
    expected = {name: ExpectedTensor(tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    layout = layout_of(folder)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and layout.format_of(name) is not None:
            expected |= layout.expected(name, torch.Size(expected.pop(f"{name}.weight").shape), signed)
    return expected | expected_cache(folder, model)
