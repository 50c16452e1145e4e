"""Classifies the tensors in an adapter's file: low-rank parts, whole tensors, table rows, copies of base tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from epmq_cli.errors import ModelError
from epmq_cli.models.headers import FLOATS, TensorInfo
from epmq_cli.models.lora.config import CONFIG, REMEDY
from epmq_cli.models.mixtures import EXPERTS

WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Segments that torch.compile, FSDP and activation checkpointing insert into names."""

PREFIX = re.compile(r"^(?:module\.)?(?:base_model\.model\.)+")
NAMED = r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?"  # the adapter's name, which PEFT removes on saving
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_diag"
    rf"|lora_velora_embed){NAMED}(?:\.(?P<kind>weight|bias))?"
)
SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?P<rest>.+)")
ROWS = re.compile(rf"(?P<module>.+)\.token_adapter\.trainable_tokens_delta{NAMED}")
COPY = re.compile(r"(?P<module>.+?)\.(?:token_adapter\.)?base_layer\.(?P<rest>.+)")
ORIGINAL = re.compile(r"(?P<module>.+?)\.original_module\.(?P<rest>.+)")
EXPERTS_MODULE = re.compile(rf"(?:.*\.)?{EXPERTS}(?:\.base_layer)?")
"""The module of all experts of a block, inside a wrapper for each of its parameters that is adapted, see stacked.py."""
TRAINING = ("lora_velora_embed",)  # used in the backward pass only
KNOWN_PARTS = (
    {"lora_A", "lora_B"},
    {"lora_A", "lora_B", "lora_magnitude_vector"},
    {"lora_A", "lora_B", "lora_diag"},
    {"lora_embedding_A", "lora_embedding_B"},
    {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"},
)
OTHERS = ("lora_", "token_adapter", "trainable_tokens")
"""Substrings of the names of adapter tensors that epmq does not support."""


@dataclass
class AdapterFile:
    """The stored names in an adapter's file, by kind.

    `parts[module][part]`: a low-rank part. `biases[module]`: the bias of lora_B. `rows[module]`: the trained rows of a
    table. `whole[tensor]`: a fully trained tensor. `copies[tensor]`: the base's weight of an adapted module.
    `originals[tensor]`: the base's weight of a fully saved module. `doubles[tensor]`: a second copy of a whole tensor,
    as PEFT stores the biases of saved modules.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    doubles: dict[str, str] = field(default_factory=dict)

    @property
    def adapted(self) -> list[str]:
        """The tensors that the adapter adds to. The base must have them."""
        return [
            *(f"{module}.weight" for module in self.parts),
            *(f"{module}.weight" for module in self.rows),
            *(f"{module}.bias" for module in self.biases),
        ]


def plain(stored: str) -> str:
    """A stored name without the prefixes and segments that PEFT and training wrappers add."""
    return PREFIX.sub("", WRAPPERS.sub("", stored))


def sorted_file(path: Path, role: str, infos: Mapping[str, TensorInfo]) -> AdapterFile:
    """Classifies the tensors of an adapter's file.

    Raises ModelError if epmq cannot merge one of them, or if there is nothing to merge.
    """
    file, adapters = AdapterFile(), set[str]()
    for stored, name in plain_names(infos).items():
        adapters |= _add(file, stored, name, path, role)
    if len(adapters) > 1:
        raise ModelError(
            f"{role}: {path} contains several adapters ({', '.join(sorted(adapters))}); save one of them alone with "
            "save_pretrained of PEFT and give its folder"
        )
    if not file.parts and not file.rows:
        raise ModelError(f"{role}: {path} contains no LoRA tensors; train or fetch it again")
    for module, parts in file.parts.items():
        _check_parts(path, role, infos, module, parts)
    for module, stored in file.rows.items():
        _check_types(path, role, infos, [stored])
        if module in file.parts:
            raise ModelError(
                f"{role}: {path} contains rows and a LoRA of {module}, which epmq cannot merge together; {REMEDY}"
            )
    return file


def _add(file: AdapterFile, stored: str, name: str, path: Path, role: str) -> set[str]:
    """Files one tensor under its kind. Returns the adapter name in the tensor name, if there is one."""
    if match := PART.fullmatch(name):
        if match["kind"] == "bias" and match["part"] == "lora_B":
            _put(file.biases, match["module"], stored, path, role)
        elif match["kind"] == "bias":
            raise ModelError(f"{role}: {path} contains {name}, which epmq cannot merge; {REMEDY}")
        elif match["part"] not in TRAINING:
            _put(file.parts.setdefault(match["module"], {}), match["part"], stored, path, role)
    elif match := ROWS.fullmatch(name):
        _put(file.rows, match["module"], stored, path, role)
    elif match := COPY.fullmatch(name):
        kind = file.copies if match["rest"] == "weight" else file.whole
        _put(kind, f"{match['module']}.{match['rest']}", stored, path, role)
    elif match := ORIGINAL.fullmatch(name):
        _put(file.originals, f"{match['module']}.{match['rest']}", stored, path, role)
    elif match := SAVED.fullmatch(name):
        key = f"{match['module']}.{match['rest']}"
        _put(file.doubles if key in file.whole else file.whole, key, stored, path, role)
        return set()
    elif any(other in name for other in OTHERS):
        raise ModelError(f"{role}: {path} contains {name}, which epmq cannot merge; {REMEDY}")
    else:
        if ".modules_to_save." in file.whole.get(name, ""):
            file.doubles[name] = file.whole.pop(name)
        _put(file.whole, name, stored, path, role)
        return set()
    named = match.groupdict().get("adapter")
    return {named} if named else set()


def _put(kind: dict[str, str], key: str, stored: str, path: Path, role: str) -> None:
    if key in kind:
        raise ModelError(
            f"{role}: {path} contains {kind[key]} and {stored}, the same tensor of two adapters; save each adapter "
            "separately with save_pretrained of PEFT"
        )
    kind[key] = stored


def plain_names(stored: Iterable[str]) -> dict[str, str]:
    """Maps stored names to plain names. Removes the adapter's name from `modules_to_save.NAME.` if PEFT kept it."""
    names = {name: plain(name) for name in stored}
    named = {part["adapter"] for name in names.values() if (part := PART.fullmatch(name)) and part["adapter"]}
    adapter = re.escape(next(iter(named))) if len(named) == 1 else "default"
    return {name: re.sub(rf"\.modules_to_save\.{adapter}\.", ".modules_to_save.", own) for name, own in names.items()}


def _check_types(path: Path, role: str, infos: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
    odd = next((name for name in names if infos[name].dtype not in FLOATS), None)
    if odd is not None:
        raise ModelError(
            f"{role}: {path} contains {odd} in the type {infos[odd].dtype}, but epmq merges {', '.join(FLOATS)}; save "
            "the adapter in one of these types"
        )


def _check_parts(path: Path, role: str, infos: Mapping[str, TensorInfo], module: str, parts: Mapping[str, str]) -> None:
    _check_types(path, role, infos, parts.values())
    if set(parts) not in KNOWN_PARTS:
        raise ModelError(
            f"{role}: {path} contains {', '.join(sorted(parts))} of {module}, which epmq cannot merge; {REMEDY}"
        )
    if module.endswith(".base_layer") and not EXPERTS_MODULE.fullmatch(module):
        raise ModelError(
            f"{role}: {path} contains two LoRAs of one module ({module}), which {CONFIG} cannot describe; {REMEDY}"
        )
