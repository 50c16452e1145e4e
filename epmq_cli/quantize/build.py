"""Builds a quantizer from the options of `quant=<name>`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from epmq_cli.config import instantiate
from epmq_cli.config.field_types import check_types, required
from epmq_cli.config.validate import check_keys
from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.names import SENSITIVITIES, FormatOptions
from epmq_cli.quantize.mixed_precision import MixedPrecision
from epmq_cli.quantize.quantizer import Quantizer

if TYPE_CHECKING:
    from omegaconf import DictConfig

OPTIONS = tuple(field.name for field in dataclasses.fields(FormatOptions))


def build_quantizer(node: DictConfig, budget: int | None = None) -> Quantizer | MixedPrecision:
    """The quantizer that the config group describes, or several that are mixed if its options name two formats, or if
    there is a budget, the maximum bytes of the checkpoint's weight files.

    A class with a field `format` has the options of FormatOptions in place of that field.
    """
    from omegaconf import OmegaConf

    fields = instantiate.fields_of("quant", node)
    if "format" not in fields:
        if budget is not None:
            name = instantiate.option_name("quant", instantiate.class_of("quant", node))
            raise ConfigError(
                f"budget needs a quantizer of several formats, got quant={name}; use quant=gptq, rtn, awq or autoround"
            )
        quantizer: Quantizer = instantiate.build("quant", node)
        return quantizer
    values: Any = OmegaConf.to_container(node, resolve=True)
    check_keys("quant", [key for key in values if key != "_target_"], *_keys(fields))
    options = {key: values.pop(key) for key in OPTIONS if key in values}
    check_types("quant", FormatOptions, options, instantiate.references(node))
    own = FormatOptions(**options)
    formats = own.formats() if budget is None else own.candidates()
    quantizers: tuple[Quantizer, ...] = tuple(
        instantiate.build("quant", OmegaConf.create({**values, "format": _node(format)})) for format in formats
    )
    if budget is None and len(quantizers) == 1:
        if own.sensitivity != SENSITIVITIES[0]:
            raise ConfigError(
                f"quant.sensitivity={own.sensitivity} chooses formats, got one format for all linears; use an average "
                f"such as bits=2.5, a budget, or quant.sensitivity={SENSITIVITIES[0]}"
            )
        return quantizers[0]
    limit = {"bits": options["bits"]} if budget is None else {"budget": budget}
    return MixedPrecision(quantizers, sensitivity=own.sensitivity, **limit)


def kv_cache_of(node: DictConfig) -> str | None:
    """The option `kv_cache` of a config group that `build_quantizer` has checked; None if it has none."""
    chosen: str | None = node.get("kv_cache")
    return chosen


def _keys(fields: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """The options of a class with these fields, and the required ones."""
    rest = [name for name in fields if name != "format"]
    return [*OPTIONS, *rest], [*required(FormatOptions), *(name for name in rest if fields[name])]


def _node(format: NumberFormat) -> dict[str, Any]:
    """The config from which Hydra instantiates a format."""
    kind = type(format)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(format)}  # type: ignore[call-overload]
