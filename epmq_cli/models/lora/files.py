"""The tensors in an adapter's file, by what they are: low-rank parts, whole tensors, rows of tables, base's copies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from epmq_cli.errors import ModelError
from epmq_cli.models.lora.config import CONFIG, REMEDY
from epmq_cli.models.model_folder import DTYPES, TensorInfo

WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names."""

PREFIX = re.compile(r"^(?:module\.)?(?:base_model\.model\.)+")
NAMED = r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?"  # adapter's name, which PEFT takes out of names on saving
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_diag"
    rf"|lora_velora_embed){NAMED}(?:\.(?P<kind>weight|bias))?"
)
SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?P<rest>.+)")
ROWS = re.compile(rf"(?P<module>.+)\.token_adapter\.trainable_tokens_delta{NAMED}")
COPY = re.compile(r"(?P<module>.+?)\.(?:token_adapter\.)?base_layer\.(?P<rest>.+)")
ORIGINAL = re.compile(r"(?P<module>.+?)\.original_module\.(?P<rest>.+)")
TRAINING = ("lora_velora_embed",)  # used by the backward pass alone
KNOWN_PARTS = (
    {"lora_A", "lora_B"},
    {"lora_A", "lora_B", "lora_magnitude_vector"},
    {"lora_A", "lora_B", "lora_diag"},
    {"lora_embedding_A", "lora_embedding_B"},
    {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"},
)
OTHERS = ("lora_", "token_adapter", "trainable_tokens")
"""In names of tensors that are added to others, in a way not known here."""


@dataclass
class AdapterFile:
    """Names in an adapter's file. `parts[module][part]`, `biases[module]` of lora_B, `rows[module]` of a table that was
    trained in part, `whole[tensor]`; `copies[tensor]`: the base's own weight of an adapted module; `originals[tensor]`:
    the base's weight of a module that is saved whole; `doubles[tensor]`: a whole tensor once more, as PEFT stores
    biases of saved modules."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    doubles: dict[str, str] = field(default_factory=dict)

    @property
    def adapted(self) -> list[str]:
        """The tensors that the base must have: those that something is added to."""
        return [
            *(f"{module}.weight" for module in self.parts),
            *(f"{module}.weight" for module in self.rows),
            *(f"{module}.bias" for module in self.biases),
        ]


def plain(stored: str) -> str:
    """A stored name without what PEFT and wrappers of training put before and into it."""
    return PREFIX.sub("", WRAPPERS.sub("", stored))


def sorted_file(path: Path, role: str, infos: Mapping[str, TensorInfo]) -> AdapterFile:
    """The tensors of an adapter's file by what they are; ModelError where epmq cannot merge one of them, or there is
    nothing to merge."""
    file, adapters = AdapterFile(), set[str]()
    for stored, name in plain_names(infos).items():
        adapters |= _add(file, stored, name, path, role)
    if len(adapters) > 1:
        raise ModelError(
            f"{role}: {path} holds several adapters ({', '.join(sorted(adapters))}); give one, saved on its own with "
            "save_pretrained of PEFT"
        )
    if not file.parts and not file.rows:
        raise ModelError(f"{role}: {path} holds no LoRA tensors; train or fetch it again")
    for module, parts in file.parts.items():
        _check_parts(path, role, infos, module, parts)
    for module, stored in file.rows.items():
        _check_types(path, role, infos, [stored])
        if module in file.parts:
            raise ModelError(f"{role}: {path} holds rows and a LoRA of {module}, which epmq cannot merge; {REMEDY}")
    return file


def _add(file: AdapterFile, stored: str, name: str, path: Path, role: str) -> set[str]:
    """Puts one tensor where it belongs; the adapter that its name names, if it does."""
    if found := PART.fullmatch(name):
        if found["kind"] == "bias" and found["part"] == "lora_B":
            _put(file.biases, found["module"], stored, path, role)
        elif found["kind"] == "bias":
            raise ModelError(f"{role}: {path} holds {name}, which epmq cannot merge; {REMEDY}")
        elif found["part"] not in TRAINING:
            _put(file.parts.setdefault(found["module"], {}), found["part"], stored, path, role)
    elif found := ROWS.fullmatch(name):
        _put(file.rows, found["module"], stored, path, role)
    elif found := COPY.fullmatch(name):
        kind = file.copies if found["rest"] == "weight" else file.whole
        _put(kind, f"{found['module']}.{found['rest']}", stored, path, role)
    elif found := ORIGINAL.fullmatch(name):
        _put(file.originals, f"{found['module']}.{found['rest']}", stored, path, role)
    elif found := SAVED.fullmatch(name):
        key = f"{found['module']}.{found['rest']}"
        _put(file.doubles if key in file.whole else file.whole, key, stored, path, role)
        return set()
    elif any(other in name for other in OTHERS):
        raise ModelError(f"{role}: {path} holds {name}, which epmq cannot merge; {REMEDY}")
    else:
        if ".modules_to_save." in file.whole.get(name, ""):
            file.doubles[name] = file.whole.pop(name)
        _put(file.whole, name, stored, path, role)
        return set()
    named = found.groupdict().get("adapter")
    return {named} if named else set()


def _put(kind: dict[str, str], key: str, stored: str, path: Path, role: str) -> None:
    if key in kind:
        raise ModelError(
            f"{role}: {path} holds {kind[key]} and {stored}, one tensor of two adapters; save each adapter on its own "
            "with save_pretrained of PEFT"
        )
    kind[key] = stored


def plain_names(stored: Iterable[str]) -> dict[str, str]:
    """Stored names and their plain ones, `modules_to_save.NAME.` without the adapter's name where PEFT left that in."""
    found = {name: plain(name) for name in stored}
    named = {part["adapter"] for name in found.values() if (part := PART.fullmatch(name)) and part["adapter"]}
    adapter = re.escape(next(iter(named))) if len(named) == 1 else "default"
    return {name: re.sub(rf"\.modules_to_save\.{adapter}\.", ".modules_to_save.", own) for name, own in found.items()}


def _check_types(path: Path, role: str, infos: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
    odd = next((name for name in names if infos[name].dtype not in DTYPES), None)
    if odd is not None:
        raise ModelError(
            f"{role}: {path} holds {odd} in the type {infos[odd].dtype}, epmq merges {', '.join(DTYPES)}; save the "
            "adapter in one of these"
        )


def _check_parts(path: Path, role: str, infos: Mapping[str, TensorInfo], module: str, parts: Mapping[str, str]) -> None:
    _check_types(path, role, infos, parts.values())
    if set(parts) not in KNOWN_PARTS:
        raise ModelError(
            f"{role}: {path} holds {', '.join(sorted(parts))} of {module}, which epmq cannot merge; {REMEDY}"
        )
    if module.endswith(".base_layer"):
        raise ModelError(
            f"{role}: {path} holds two LoRAs of one module ({module}), which {CONFIG} does not tell apart; {REMEDY}"
        )
