"""The axis "wrappers": the prefixes that training code adds to the names of a model that it wraps."""

from __future__ import annotations

from dataclasses import dataclass

from tests.end_to_end.foreign.forms import Form, inside, plain, prefixed


@dataclass(frozen=True)
class Wrapper:
    """`form`: how it changes the names. `said`: the text that epmq's message must contain when it removes the
    prefix."""

    form: Form = plain
    said: str | None = None
    may_be_refused: str | None = None


def _before(prefix: str) -> Wrapper:
    return Wrapper(prefixed(prefix), prefix.rstrip("."))


WRAPPERS = {
    "none": Wrapper(),
    "ddp": _before("module."),
    "compile": _before("_orig_mod."),
    "ddp-compile": Wrapper(prefixed("module._orig_mod."), "_orig_mod"),
    "fsdp": _before("_fsdp_wrapped_module."),
    "peft": _before("base_model.model."),
    "lightning": _before("model."),
    "distilled": _before("student."),
    "compiled-layers": Wrapper(inside("_orig_mod."), "_orig_mod", "a wrapper around each layer may be named instead"),
    "fsdp-layers": Wrapper(
        inside("_fsdp_wrapped_module."), "_fsdp_wrapped_module", "a wrapper around each layer may be named instead"
    ),
}
