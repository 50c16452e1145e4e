"""Wraps from_pretrained of transformers: it reads local files only and never runs code from a model folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from epmq_cli.errors import ModelError, first_line

if TYPE_CHECKING:
    from torch import nn

BESIDE = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale")
"""The ends of the names of scales of activations, which checkpoints hold for engines, and models do not."""

DENSE_ONLY = ("dinov2", "dinov2_with_registers")
"""The model types of which transformers 5.24 loads dense weights only: it splits their feed-forwards as it reads them,
and does not know how to split packed weights, also where there is nothing to split."""


def from_folder(kind: Any, folder: Path, weights: bool = True, **options: Any) -> Any:
    """Loads a folder with a transformers class. Raises ModelError if that fails or needs code from the folder.

    Nothing is downloaded. By default, transformers asks on the terminal whether to run such code. `weights`: if false,
    the model that the folder's config describes on the meta device, without reading its weights.
    """
    try:
        if not weights:
            return _blank(kind, folder, **options)
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config can contain anything, and transformers validates little of it
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder} needs its own code (auto_map in its JSON files), which epmq never runs; give a model and a "
                "tokenizer of a type that transformers supports"
            ) from error
        raise ModelError(
            f"{folder} cannot be read by {kind.__name__} of transformers ({first_line(error)}); give the folder that "
            "save_pretrained wrote"
        ) from error


def _blank(kind: Any, folder: Path, **options: Any) -> Any:
    from transformers import AutoConfig, PreTrainedModel

    config = from_folder(AutoConfig, folder)
    with torch.device("meta"):
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind(config, **options)
        return kind.from_config(config, trust_remote_code=False, **options)


def config_of(folder: Path) -> Any:
    """A folder's config, cached for all tasks because loading is slow. Callers must not modify it."""
    return _config_of(folder, (folder / "config.json").stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _config_of(folder: Path, changed: int) -> Any:
    from transformers import AutoConfig

    return from_folder(AutoConfig, folder)


def dequantized(
    folder: Path,
    load: Callable[..., Any],
    dtype: torch.dtype | Literal["auto"] = "auto",
    described: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Loads the complete model of a folder in `dtype` and dequantizes packed weights.

    `load`: the from_pretrained method of the model's class; it takes the folder and options. `described`: a config in
    place of the folder's; tensors that the folder lacks then get random values.
    """
    from transformers import AutoConfig

    config = from_folder(AutoConfig, folder)
    if described is not None:
        config = type(config).from_dict(dict(described))
    quantization = getattr(config, "quantization_config", None)
    mixed = quantization is not None and len(quantization["config_groups"]) > 1
    if quantization is not None and not mixed:
        quantization["dequantize"] = True
    model, info = load(folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if described is None:
        _check_complete(folder, model, info)
    if mixed:  # transformers would dequantize all groups with the bit width of the first
        from compressed_tensors.offload import remove_dispatch

        model.hf_quantizer.compressor.decompress_model(model)
        remove_dispatch(model)  # the dispatch would pin the model to its current device
    whole: nn.Module = model
    return whole


def _check_complete(folder: Path, model: nn.Module, info: Mapping[str, Collection[Any]]) -> None:
    """Raises ModelError if a folder's tensors do not match the model that its config.json describes.

    transformers initializes missing tensors with random numbers. The files may contain tensors of modules that the
    model does not have, such as a head, and scales of activations (`BESIDE`). They may omit copies of tied tensors.
    `info`: the loading info that from_pretrained returns with `output_loading_info`.
    """
    where = f"{folder / 'config.json'} describes a model"
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{where} with {missing[0]}, which its files do not have; fetch or save the model again")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parts = {name for name, _ in model.named_children()}
    for name in sorted(info["unexpected_keys"]):
        if name.removeprefix(prefix).partition(".")[0] in parts and not name.endswith(BESIDE):
            raise ModelError(f"{where} without {name}, which its files have; fetch or save the model again")
    for name in sorted(map(str, info["mismatched_keys"])):
        raise ModelError(f"{where} with another shape of {name} than its files have; fetch or save the model again")
