"""The tensors that the model of a checkpoint's config.json has, and how they must be stored; for the values see
verification.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from epmq_cli.checkpoint.compressed_tensors import format_of
from epmq_cli.checkpoint.load import blank_model, model_config
from epmq_cli.errors import CheckpointError, first_line
from epmq_cli.models.model_class import ModelClass, equal, model_class, untied_config
from epmq_cli.models.model_folder import SafetensorsFiles, TensorInfo, read_json
from epmq_cli.quantize.formats.format import NumberFormat, group_columns
from epmq_cli.quantize.formats.fp8 import Fp8Format

ROLE = "checkpoint"


def finite(tensor: Tensor) -> str | None:
    """What is wrong with the values of any tensor; None where nothing is."""
    if not tensor.is_floating_point():
        return None
    known = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # torch does not look into FP8
    return None if known.isfinite().all() else "holds NaN or infinity"


def signed_scale(tensor: Tensor) -> str | None:
    """Likewise, of scales of either sign."""
    return finite(tensor) or (None if (tensor != 0).all() else "holds scales of 0")


def positive_scale(tensor: Tensor) -> str | None:
    """Likewise, of scales above 0."""
    return finite(tensor) or (None if (tensor > 0).all() else "holds scales that are not above 0")


def equal_to(values: list[int], tensor: Tensor) -> str | None:
    """Likewise, of a tensor whose values are known."""
    return None if tensor.tolist() == values else f"is {tensor.tolist()}, config.json implies {values}"


@dataclass(frozen=True)
class Wanted:
    """What a tensor must be: its shape, the safetensors name of its type (None for any), and a check of its values."""

    shape: tuple[int, ...]
    dtype: str | None = None
    check: Callable[[Tensor], str | None] = finite


def check_described(folder: Path) -> None:
    """CheckpointError where the tensors of a checkpoint that `epmq run` wrote are not those that its config.json
    describes, by names, shapes and types; their values are not read."""
    files = SafetensorsFiles(folder, ROLE)
    model = described_model(folder, files)
    wanted = wanted_tensors(folder, model, signed=False)
    found = name_problems(model, files, wanted)
    found += [problem for name, info in files.infos.items() if (problem := layout_problem(name, info, wanted))]
    if found:
        raise CheckpointError(
            f"{folder / 'config.json'} describes another model than the files beside it hold: {found[0]}; fetch both "
            "again, or make them again with epmq run"
        )


def name_problems(model: nn.Module, files: SafetensorsFiles, wanted: Mapping[str, Wanted]) -> list[str]:
    """The tensors that are missing, but for tied ones, and those that the model has not, a phrase for each."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found = [f"{name} is missing" for name in wanted if name not in files.infos and name not in tied]
    return found + [f"{name} is no tensor of the model" for name in files.infos if name not in wanted]


def tie_problems(folder: Path, files: SafetensorsFiles) -> list[str]:
    """Where the tied tensors in the files of a checkpoint are not those of its config.json, a phrase for each.

    A copy that config.json ties has its source's values if it is stored; but for output layers of classes that no
    setting unties, such as T5's, which transformers takes as they are stored. One that it does not tie is there.
    """
    config, found = read_json(folder, "config.json", ROLE), list[str]()
    known = model_class(config, files.infos)
    if known is None:
        return []
    for copy, source in known.tieable.items():
        stored, origin = (_stored(name, known, files) for name in (copy, source))
        if copy not in known.tied and stored is None and origin is not None:
            found.append(f"{copy} is missing, which config.json does not tie to {source}")
        settled = copy in known.tied and stored is not None and origin is not None
        settled = settled and (copy not in known.outputs or untied_config(config, files.infos, [copy]) is not None)
        if settled and not equal((files, str(stored)), (files, str(origin))):
            found.append(f"{stored} has other values than {origin}, to which config.json ties it")
    return found


def lacking_problems(folder: Path, files: SafetensorsFiles) -> list[str]:
    """The tensors that the class of a dense merge has and its files have not, a phrase for each."""
    known = model_class(read_json(folder, "config.json", ROLE), files.infos)
    return [f"{name} is missing" for name in known.lacking(files.infos)] if known is not None else []


def _stored(name: str, known: ModelClass, files: SafetensorsFiles) -> str | None:
    """What the files call a tensor of the class, with or without the prefix of its body, or by another name."""
    names = {known.own_name(stored): stored for stored in files.infos}
    return next((names[own] for own in (name, name.removeprefix(f"{known.prefix}.")) if own in names), None)


def layout_problem(name: str, info: TensorInfo, wanted: Mapping[str, Wanted]) -> str | None:
    """What is wrong with shape or type of a stored tensor; None where nothing is, or nothing is known of it."""
    want = wanted.get(name, Wanted(info.shape))
    if info.shape != want.shape:
        return f"{name} is {list(info.shape)}, config.json implies {list(want.shape)}"
    if want.dtype not in (None, info.dtype):
        return f"{name} is of type {info.dtype}, config.json implies {want.dtype}"
    return None


def described_model(folder: Path, files: SafetensorsFiles) -> nn.Module:
    """The model that config.json describes, without memory for its tensors."""
    settings = model_config(folder, files)
    try:
        with torch.device("meta"):
            return blank_model(folder, settings, files)
    except CheckpointError:
        raise
    except Exception as error:  # a config may hold anything, and transformers checks little of it
        reason = first_line(error)
        raise CheckpointError(
            f"{folder / 'config.json'} describes no model that transformers can make ({reason}); fetch it again"
        ) from error


def wanted_tensors(folder: Path, model: nn.Module, signed: bool) -> dict[str, Wanted]:
    """Every tensor of the model, packed where config.json says so; `signed`: whether scales may be negative."""
    wanted = {name: Wanted(tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    quantization = read_json(folder, "config.json", ROLE).get("quantization_config")
    if quantization is None:
        return wanted
    for name, module in model.named_modules():
        format = format_of(folder, quantization, name) if isinstance(module, nn.Linear) else None
        if format is not None:
            rows, columns = wanted.pop(f"{name}.weight").shape
            wanted |= {f"{name}.{part}": want for part, want in _stored_as(rows, columns, format, signed).items()}
    return wanted


def _stored_as(rows: int, columns: int, format: NumberFormat, signed: bool) -> dict[str, Wanted]:
    """The tensors that stand for a weight (rows, columns)."""
    groups = math.ceil(columns / group_columns(format, columns))
    scale = positive_scale if format.mirrored or not signed else signed_scale
    found = {"weight_scale": Wanted((rows, groups), check=scale)}
    if isinstance(format, Fp8Format):
        return {"weight": Wanted((rows, columns), "F8_E4M3"), **found}
    found["weight_packed"] = Wanted((rows, _words(columns, format.bits)), "I32")
    found["weight_shape"] = Wanted((2,), "I64", partial(equal_to, [rows, columns]))
    if format.zero_points != "none":
        found["weight_zero_point"] = Wanted((_words(rows, format.bits), groups), "I32")
    return found


def _words(count: int, bits: int) -> int:
    """How many int32 so many integers are packed into by `pack_to_int32`, which would take memory for them."""
    return -(-count * bits // 32)
