"""The one door to transformers' from_pretrained: it reads a folder's own files, and runs no code that comes with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from epmq_cli.errors import ModelError, first_line


def from_folder(kind: Any, folder: Path, **options: Any) -> Any:
    """What a class of transformers makes of a folder; ModelError where it cannot, or only by code of the folder's.

    Nothing is fetched. Left to itself transformers asks at the terminal whether to run such code.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config may hold anything, and transformers checks little of it
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder} brings code of its own (auto_map in its JSON files), which epmq never runs; give a model "
                "and a tokenizer of a kind that transformers has"
            ) from error
        raise ModelError(
            f"{folder} cannot be read by {kind.__name__} of transformers ({first_line(error)}); give the folder that "
            "save_pretrained wrote"
        ) from error


def config_of(folder: Path) -> Any:
    """A folder's config, not to be changed; it is read once for all tasks, as transformers takes its time for that."""
    return _config_of(folder, (folder / "config.json").stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _config_of(folder: Path, changed: int) -> Any:
    from transformers import AutoConfig

    return from_folder(AutoConfig, folder)


def dequantized(folder: Path, load: Callable[..., Any], dtype: torch.dtype | Literal["auto"] = "auto") -> nn.Module:
    """The whole model of a folder in a type, packed weights dequantized in the type that they are stored for. `load`:
    the from_pretrained of its class, which takes the folder and options."""
    from transformers import AutoConfig

    config = from_folder(AutoConfig, folder)
    quantization = getattr(config, "quantization_config", None)
    mixed = quantization is not None and len(quantization["config_groups"]) > 1
    if quantization is not None and not mixed:
        quantization["dequantize"] = True
    model, info = load(folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True)
    _check_complete(folder, model, info)
    if mixed:  # transformers dequantizes all of them with the first width
        from compressed_tensors.offload import remove_dispatch

        model.hf_quantizer.compressor.decompress_model(model)
        remove_dispatch(model)  # which would keep it on the device that it is on
    whole: nn.Module = model
    return whole


def _check_complete(folder: Path, model: nn.Module, info: Mapping[str, Collection[Any]]) -> None:
    """ModelError where a folder's files are not all of the model that its config.json describes, or more of it;
    `info`: what from_pretrained says under `output_loading_info`.

    transformers fills up what is missing with random numbers. Tensors of modules that the model does not have, as those
    of a head, may be in the files; of tied tensors one may be missing.
    """
    where = f"{folder / 'config.json'} describes a model"
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{where} with {missing[0]}, which its files have not; fetch or make both again")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parts = {name for name, _ in model.named_children()}
    for name in sorted(info["unexpected_keys"]):
        if name.removeprefix(prefix).partition(".")[0] in parts:
            raise ModelError(f"{where} without {name}, which its files have; fetch or make both again")
    for name in sorted(map(str, info["mismatched_keys"])):
        raise ModelError(f"{where} with {name} of another shape than in its files; fetch or make both again")
