"""LoRA adapters (https://arxiv.org/abs/2106.09685) in folders of PEFT: merged into the base tensor by tensor.

Also DoRA (https://arxiv.org/abs/2402.09353, equation 5), rank-stabilised scales (https://arxiv.org/abs/2312.03732),
adapted embeddings and convolutions, and whole tensors that were trained beside (`modules_to_save`, biases).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex
from torch import Tensor
from torch.linalg import vector_norm

from epmq_cli.checkpoint.reader import DTYPES, ModelFolder, SafetensorsFiles, TensorInfo, read_json
from epmq_cli.errors import ModelError, shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")
KNOWN_PARTS = (
    {"lora_A", "lora_B"},
    {"lora_A", "lora_B", "lora_magnitude_vector"},
    {"lora_embedding_A", "lora_embedding_B"},
)
PATTERN_SECONDS = 1.0  # for one pattern of the config and one module; a stranger's pattern can take for ever
WRAPPERS = (".modules_to_save", ".base_layer")
REMEDY = "merge it with merge_and_unload of peft, and give the folder that save_pretrained then writes"
SWITCHES = ("use_rslora", "fan_in_fan_out", "use_dora")
UNKNOWN_OPTIONS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
"""Options of PEFT's LoraConfig that change what is merged in a way not known here, where they are set."""


UNUSABLE = (AttributeError, TypeError, ValueError, OverflowError, RecursionError, TimeoutError, regex.error)
"""What an alpha that is no number, or a pattern that is no regular expression, ends in."""


@dataclass
class _Files:
    """What an adapter's file holds: `parts[module][part]` and `whole[tensor name]` are names in the file."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


class Adapted:
    """The base's tensors with an adapter merged in, under the names that they have in the base.

    Tensors that the base does not have, such as a classifier, keep the adapter's name for them. What is adapted comes
    in float32, the rest in the type it is stored in. `merged`: the base's tensors that the family merges.
    """

    def __init__(self, path: Path, role: str, base: ModelFolder, merged: Collection[str]) -> None:
        self._config, self._role, self._base, self._path = _config(path, role), role, base, path
        if not (path / WEIGHTS).is_file():
            raise ModelError(f"{role}: {path} has no {WEIGHTS}; save the adapter with save_pretrained of peft")
        self._file = SafetensorsFiles(path / WEIGHTS, role)
        files = self._sorted()
        self._alphas = {module: self._alpha(module) for module in files.parts}
        names = self._names(files, merged)
        self._whole = {names.get(name, name): stored for name, stored in files.whole.items()}
        self._parts = {names[f"{module}.weight"]: (module, parts) for module, parts in files.parts.items()}
        self.infos = base.infos | {name: self._file.infos[stored] for name, stored in self._whole.items()}
        self.infos |= {name: TensorInfo(self._shape(name), "F32") for name in self._parts}

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        tensor = self._file.tensor(self._whole[name]) if name in self._whole else self._base.tensor(name)
        if name not in self._parts:
            return tensor
        module, stored = self._parts[name]
        parts = {part: self._file.tensor(key).float() for part, key in stored.items()}
        adapted = tensor.float() + self._scale(module, parts) * self._delta(parts, tuple(tensor.shape))
        if "lora_magnitude_vector" in parts:
            adapted = self._with_magnitude(adapted, parts["lora_magnitude_vector"])
        return adapted

    def _sorted(self) -> _Files:
        files = _Files()
        for stored in self._file.infos:
            name = stored.removeprefix(PREFIX)
            if found := PART.fullmatch(name):
                files.parts.setdefault(found[1], {})[found[2]] = stored
            elif "lora_" in name or "token_adapter" in name or "trainable_tokens" in name:
                raise ModelError(f"{self._role}: {self._path} holds {name}, which epmq cannot merge; {REMEDY}")
            else:
                for wrapper in WRAPPERS:
                    name = name.replace(f"{wrapper}.", ".")
                files.whole[name] = stored
        if not files.parts:
            raise ModelError(f"{self._role}: {self._path / WEIGHTS} holds no LoRA tensors; train or fetch it again")
        for module, parts in files.parts.items():
            odd = [key for key in parts.values() if self._file.infos[key].dtype not in DTYPES]
            if odd:
                raise ModelError(
                    f"{self._role}: {self._path} holds {odd[0]} in the type {self._file.infos[odd[0]].dtype}, epmq "
                    f"merges {', '.join(DTYPES)}; save the adapter in one of these"
                )
            plain = (
                "lora_magnitude_vector" not in parts or len(self._file.infos[parts["lora_magnitude_vector"]].shape) == 1
            )
            if set(parts) not in KNOWN_PARTS or not plain:
                raise ModelError(
                    f"{self._role}: {self._path} holds {', '.join(sorted(parts))} of {module}, "
                    f"which epmq cannot merge; {REMEDY}"
                )
        return files

    def _names(self, files: _Files, merged: Collection[str]) -> dict[str, str]:
        """The base's names of the adapter's tensors that the base has.

        The adapter may have been trained on a model that wraps the base's, or on a part of it: then its names have a
        prefix more, or less. Where several parts fit, as the two towers of CLIP may, it is the one that is merged.
        """
        adapted = [f"{module}.weight" for module in files.parts]
        stored = self._base.infos
        candidates = [_renamed([*adapted, *files.whole], strip, add) for strip, add in _prefixes(adapted[0], stored)]
        fitting = [names for names in candidates if all(names[name] in stored for name in adapted)]
        if not fitting:
            raise ModelError(
                f"{self._role}: the adapter {self._path} was not trained on the base ({self._base.path}), "
                f"which has no tensors for all of its modules such as {next(iter(files.parts))}"
            )
        best = max(fitting, key=lambda names: sum(names[name] in merged for name in adapted))
        return {name: own for name, own in best.items() if own in stored}

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of an adapted tensor; ModelError where the adapter's is another."""
        shape = self.infos[name].shape
        module, stored = self._parts[name]
        a, b = (self._file.infos[key].shape for part, key in sorted(stored.items()) if part[-2:] in ("_A", "_B"))
        if not len(a) == len(b) == len(shape) > 1 or not a[0] == b[1] > 0 or any(size != 1 for size in b[2:]):
            raise ModelError(
                f"{self._role}: the adapter {self._path} has A {list(a)} and B {list(b)} of {module}, which are not of "
                f"one rank above 0 for {name}, {list(shape)} in the base; train or fetch it again"
            )
        found = (b[0], *a[1:])
        if "lora_embedding_A" in stored or self._transposed(shape):
            found = found[::-1]
        if found != shape:
            raise ModelError(
                f"{self._role}: the adapter {self._path} was not trained on the base ({self._base.path}): "
                f"{name} is {list(found)} in the adapter and {list(shape)} in the base"
            )
        if "lora_magnitude_vector" in stored:
            self._check_magnitude(module, self._file.infos[stored["lora_magnitude_vector"]].shape, b[0])
        return shape

    def _check_magnitude(self, module: str, found: tuple[int, ...], outputs: int) -> None:
        if found != (outputs,):
            raise ModelError(
                f"{self._role}: the adapter {self._path} has the lengths {list(found)} of {module}, which has "
                f"{outputs} outputs; train or fetch it again"
            )

    def _transposed(self, shape: tuple[int, ...]) -> bool:
        return bool(self._config.get("fan_in_fan_out")) and len(shape) == 2

    def _scale(self, module: str, parts: Mapping[str, Tensor]) -> float:
        """alpha / r, or alpha / sqrt(r) where it is rank-stabilised."""
        rank = len(parts["lora_A"] if "lora_A" in parts else parts["lora_embedding_A"])
        return self._alphas[module] / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _alpha(self, module: str) -> float:
        """ModelError where it is no number."""
        try:
            patterns: dict[str, float] = self._config.get("alpha_pattern") or {}
            given = (alpha for key, alpha in patterns.items() if _matches(key, module))
            alpha = next(given, self._config.get("lora_alpha", 8))
            if isinstance(alpha, bool) or not math.isfinite(float(alpha)):
                raise ValueError(f"{alpha} is no finite number")
            return float(alpha)
        except UNUSABLE as error:
            raise ModelError(
                f"{self._role}: lora_alpha or alpha_pattern of {self._path / CONFIG} cannot be used ({error}); fetch "
                "the adapter again"
            ) from error

    def _delta(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """B A in the shape of the tensor that it is added to."""
        if "lora_embedding_A" in parts:
            return (parts["lora_embedding_B"] @ parts["lora_embedding_A"]).T
        product = parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)
        return product.T if self._transposed(shape) else product.reshape(shape)

    def _with_magnitude(self, adapted: Tensor, magnitude: Tensor) -> Tensor:
        """DoRA: the outputs' rows scaled to these lengths."""
        axis = 0 if self._transposed(tuple(adapted.shape)) else 1
        scale: Tensor = magnitude.flatten() / vector_norm(adapted, dim=axis)
        return adapted * scale.unsqueeze(axis)


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern of PEFT means a module: its name, or the end of it after a dot."""
    return regex.match(rf"(.*\.)?({pattern})$", module, timeout=PATTERN_SECONDS) is not None


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def _config(path: Path, role: str) -> dict[str, Any]:
    config = read_json(path, CONFIG, role)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{role}: {path} is an adapter of type {kind}, epmq merges only LORA on the fly; {REMEDY}")
    found = [option for option in UNKNOWN_OPTIONS if config.get(option)]
    if found:
        raise ModelError(f"{role}: {path} is a LoRA adapter with {found[0]}, which epmq cannot merge; {REMEDY}")
    for option in SWITCHES:
        if not isinstance(config.get(option), bool | None):
            raise ModelError(
                f"{role}: {option} in {path / CONFIG} must be true or false, got {shown(config[option])}; fetch the "
                "adapter again"
            )
    return config


def _prefixes(name: str, stored: Collection[str]) -> list[tuple[str, str]]:
    """All (prefix to take off, prefix to put on) that make a stored name of this one."""
    found = [("", "")] if name in stored else []
    found += [("", own[: -len(name)]) for own in stored if own.endswith(f".{name}")]
    found += [(name[: -len(own)], "") for own in stored if name.endswith(f".{own}")]
    return found


def _renamed(names: Collection[str], strip: str, add: str) -> dict[str, str]:
    return {name: add + name.removeprefix(strip) for name in names}
