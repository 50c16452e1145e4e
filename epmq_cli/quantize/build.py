"""From the options of `quant=<name>` to a quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from epmq_cli.config import instantiate
from epmq_cli.config.field_types import check_types, required
from epmq_cli.config.validate import check_keys
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.names import FormatOptions
from epmq_cli.quantize.mixed_precision import MixedPrecision
from epmq_cli.quantize.quantizer import Quantizer

if TYPE_CHECKING:
    from omegaconf import DictConfig

OPTIONS = tuple(field.name for field in fields(FormatOptions))


def build_quantizer(node: DictConfig) -> Quantizer | MixedPrecision:
    """The quantizer that the config group describes, or two that are mixed if its options name two formats.

    A class with a field `format` has the options of FormatOptions in place of that field.
    """
    from omegaconf import OmegaConf

    known = instantiate.fields_of("quant", node)
    if "format" not in known:
        found: Quantizer = instantiate.build("quant", node)
        return found
    given: Any = OmegaConf.to_container(node, resolve=True)
    check_keys("quant", [key for key in given if key != "_target_"], *_keys(known))
    options = {key: given.pop(key) for key in OPTIONS if key in given}
    check_types("quant", FormatOptions, options, instantiate.references(node))
    formats = FormatOptions(**options).formats()
    made = [instantiate.build("quant", OmegaConf.create({**given, "format": _node(format)})) for format in formats]
    return MixedPrecision(made[0], made[1], options["bits"]) if len(made) > 1 else made[0]


def _keys(known: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """The options of a class with these fields, and those of them that must be given."""
    rest = [name for name in known if name != "format"]
    return [*OPTIONS, *rest], [*required(FormatOptions), *(name for name in rest if known[name])]


def _node(format: NumberFormat) -> dict[str, Any]:
    """The config from which Hydra makes a format."""
    kind = type(format)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(format)}  # type: ignore[call-overload]
