"""Merges LoRA adapters (https://arxiv.org/abs/2106.09685) from PEFT folders into the base, tensor by tensor.

Supports DoRA, rank-stabilized scaling (https://arxiv.org/abs/2312.03732), embeddings and convolutions, and the
residuals of PiSSA, OLoRA and KaSA (see `delta.py`). Also merges fully trained tensors, biases and embedding rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import ModelError, first_line
from epmq_cli.models.conv1d import is_turned
from epmq_cli.models.lora.config import REMEDY, read_config
from epmq_cli.models.lora.delta import product, residual, with_lengths
from epmq_cli.models.lora.files import AdapterFile, sorted_file
from epmq_cli.models.lora.names import Spelling, lacking, matched
from epmq_cli.models.lora.shapes import LowRank, rows_problem
from epmq_cli.models.lora.stacked import unstacked
from epmq_cli.models.lora.ties import Ties
from epmq_cli.models.model_folder import ModelFolder, SafetensorsFiles, TensorInfo, Tensors
from epmq_cli.models.state_dict import open_file
from epmq_cli.models.stored import as_linears

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


class Adapted:
    """The base's tensors with an adapter merged in, under the base's names.

    Tensors that the base does not have, such as a classifier, keep the adapter's names. Adapted tensors are float32;
    all others keep their stored type. `path`: the adapter's folder, or the file in it that the suite names. `merged`:
    the base tensors that the family merges. `spelling`: the family's spelling of tensor names.

    On a tied base, an adapter can untie a copy from its source. The copy then becomes a separate tensor: it was trained
    as one, and PeftModel.from_pretrained loads it as one. (PEFT's merge_and_unload instead adds the LoRA of one of them
    to both.) `changed`: the names of all tensors that differ from the base. `copies`: the base tensors that the
    adapter's file also contains. `base`: the model that the adapter is merged into.
    """

    def __init__(
        self, path: Path, role: str, base: ModelFolder, merged: Collection[str], spelling: Spelling = str
    ) -> None:
        self.path, self._role, self.base = (path.parent if path.is_file() else path), role, base
        config, tensors = read_config(self.path, role), as_linears(base.config, _open(path, role))
        self.stored: Mapping[str, TensorInfo] = tensors.infos
        """The tensors of the adapter's own file, by stored name."""
        self._file, parameters = unstacked(config, base, tensors)
        self.config = replace(config, parameters=parameters)
        files = sorted_file(self.path, role, self._file.infos)
        self._ties = Ties(base, self.config, files)
        places = self._places(files, merged, spelling)
        self._place(files, places)
        own = {*self._whole, *self._parts, *self._rows, *self._biases}
        self.infos = base.infos | {name: self._changed_info(name) for name in own}
        self._follows, apart = self._settled(own)
        self.changed = frozenset(self.infos) & (own | apart | set(self._follows))

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this name."""
        name = self._follows.get(name, name)
        tensor = self._unadapted(name)
        if name in self._rows:
            module, stored = self._rows[name]
            index = torch.tensor(self.config.token_rows(module), dtype=torch.long)
            tensor = tensor.float().index_copy(0, index, self._file.tensor(stored).float())
        if name in self._parts:
            tensor = self._with_lora(name, tensor.float())
        if name in self._biases:
            stored, weight = self._biases[name]
            tensor = tensor.float() + self._scales[weight] * self._file.tensor(stored).float()
        return tensor

    def rank(self, name: str) -> int | None:
        """The rank of the product that the adapter adds to a matrix of the base; 0 if it leaves a tensor as it is. None
        if it changes the tensor in another way, as DoRA, replaced tensors and convolutions do."""
        name = self._follows.get(name, name)
        if name in self._replaced:
            return None
        if name not in self.changed:
            return 0
        _, parts = self._parts.get(name, ("", {}))
        is_plain = parts.keys() == {"lora_A", "lora_B"} and self.config.init is None and name not in self._rows
        return self._low_rank(parts).rank if is_plain and len(self.infos[name].shape) == 2 else None

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """B (out, rank), A (rank, in) and the scale s of the product s B A that is added to a matrix (out, in) of a
        `rank` above 0."""
        name = self._follows.get(name, name)
        stored = self._parts[name][1]
        B, A = (self._file.tensor(stored[part]).float() for part in ("lora_B", "lora_A"))
        turned = self._low_rank(stored).turned(self.infos[name].shape)
        return (A.T, B.T, self._scales[name]) if turned else (B, A, self._scales[name])

    @property
    def tied(self) -> Collection[str]:
        """The names of the base's tied copies."""
        return self._ties.pairs.keys()

    def copy(self, name: str) -> Tensor:
        """Returns the adapter file's copy of the base tensor of this name."""
        return self._file.tensor(self.copies[name])

    def _places(self, files: AdapterFile, merged: Collection[str], spelling: Spelling) -> dict[str, str]:
        """Maps the adapter's tensor names to the base's.

        Raises ModelError if the base lacks an adapted tensor, or if the adapter fits two places in the base.
        """
        adapted, names = files.adapted, [*files.adapted, *files.whole, *files.copies, *files.originals]
        stored = [*self.base.infos, *self._ties.pairs]

        def fits(name: str, place: str) -> bool:
            module, _, kind = name.rpartition(".")
            parts = files.parts.get(module)
            return parts is None or kind == "bias" or self._low_rank(parts).fits(self._base_info(place).shape)

        matches = matched(adapted, names, stored, spelling, fits, merged)
        matches = matches or matched(adapted, names, stored, spelling, lambda name, place: True, merged)
        if not matches:
            raise ModelError(
                f"{self._role}: the adapter {self.path} was not trained on the base ({self.base.path}), which lacks "
                f"{lacking(adapted, stored, spelling)}; give the model that the adapter was trained on as the base"
            )
        if len(matches) > 1:
            one, other = (places[adapted[0]] for places in matches[:2])
            raise ModelError(
                f"{self._role}: the adapter {self.path} fits both {one} and {other} of the base ({self.base.path}); "
                "save the adapter from the whole model, so that its tensor names are unique"
            )
        return matches[0]

    def _place(self, files: AdapterFile, places: Mapping[str, str]) -> None:
        """Stores the file's tensor names under the base's names.

        Raises ModelError if the file contains a tensor twice with different values.
        """
        for name, stored in files.doubles.items():
            if not torch.equal(self._file.tensor(stored), self._file.tensor(files.whole[name])):
                raise ModelError(
                    f"{self._role}: {self.path} contains {stored} and {files.whole[name]} with different values, but "
                    "they are the same tensor; save the adapter again with save_pretrained of PEFT"
                )
        self._whole = {places[name]: stored for name, stored in files.whole.items()}
        self.copies = {places[name]: stored for name, stored in (files.originals | files.copies).items()}
        self._replaced = {places[name]: stored for name, stored in files.copies.items()} | self._whole
        self._parts = {places[f"{module}.weight"]: (module, parts) for module, parts in files.parts.items()}
        self._scales = {
            name: self.config.scale(module, max(self._low_rank(parts).rank, 1))
            for name, (module, parts) in self._parts.items()
        }
        self._rows = {places[f"{module}.weight"]: (module, stored) for module, stored in files.rows.items()}
        self._biases = {
            places[f"{module}.bias"]: (stored, places[f"{module}.weight"]) for module, stored in files.biases.items()
        }

    def _settled(self, own: set[str]) -> tuple[dict[str, str], set[str]]:
        """Decides which tied copies follow their source and which are separate tensors, and updates `infos`."""
        self._ties.refuse_residuals(name for name, (_, parts) in self._parts.items() if "lora_A" in parts)
        self._follows = {}
        saved = {name for name in self._whole if self.config.saves(name.rpartition(".")[0])}
        follows, apart = self._ties.settled(own, {*self._rows, *self._whole} - saved, self.tensor)
        for name in apart:
            self.infos.setdefault(name, self._base_info(name))
        for name, source in follows.items():
            if name in self.base.infos:
                self.infos[name] = self.infos[source]
            else:
                self.infos.pop(name, None)
        return follows, apart

    def _base_info(self, name: str) -> TensorInfo:
        return self.base.infos[self._base_name(name)]

    def _base_name(self, name: str) -> str:
        return name if name in self.base.infos else self._ties.pairs[name]

    def _unadapted(self, name: str) -> Tensor:
        """The tensor before the adapter is added: the file's replacement if it has one, otherwise the base's tensor."""
        stored = self._replaced.get(name)
        return self.base.tensor(self._base_name(name)) if stored is None else self._file.tensor(stored)

    def _changed_info(self, name: str) -> TensorInfo:
        """The shape and type of a changed tensor. Raises ModelError if the adapter's shapes do not fit it."""
        stored = self._replaced.get(name)
        info = self._base_info(name) if stored is None else self._file.infos[stored]
        if name in self._rows:
            module, rows = self._rows[name]
            problem = rows_problem(self._file.infos[rows].shape, info.shape, self.config.token_rows(module))
            self._refuse(problem, name)
        if name in self._parts:
            _, parts = self._parts[name]
            low_rank = self._low_rank(parts)
            self._refuse(low_rank.problem(info.shape), name)
            self._check_same(name, low_rank.weight(info.shape), info.shape)
        if name in self._biases:
            self._check_same(name, self._file.infos[self._biases[name][0]].shape, info.shape)
        added = name in self._rows or name in self._parts or name in self._biases
        return TensorInfo(info.shape, "F32") if added else info

    def _refuse(self, problem: str | None, name: str) -> None:
        if problem is not None:
            raise ModelError(
                f"{self._role}: the adapter {self.path} does not fit {name}: {problem}; train or fetch it again"
            )

    def _check_same(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise ModelError(
                f"{self._role}: the adapter {self.path} was not trained on the base ({self.base.path}): {name} has "
                f"the shape {list(shape)} in the adapter and {list(expected)} in the base; give the model that the "
                "adapter was trained on as the base"
            )

    def _low_rank(self, parts: Mapping[str, str]) -> LowRank:
        shapes = {part: self._file.infos[stored].shape for part, stored in parts.items()}
        return LowRank(shapes, self.config.is_set("fan_in_fan_out") and not is_turned(self.base.config))

    def _with_lora(self, name: str, weight: Tensor) -> Tensor:
        """Adds the LoRA of a module to its weight in float32."""
        _, stored = self._parts[name]
        parts = {part: self._file.tensor(key).float() for part, key in stored.items()}
        shape, low_rank, scale = tuple(weight.shape), self._low_rank(stored), self._scales[name]
        turned = low_rank.turned(shape)
        linear = len(shape) == 2 and not low_rank.is_embedding
        if self.config.init is not None and linear and name not in self._replaced:
            weight = self._residual(name, weight, scale, turned)
        adapted = weight + scale * product(parts, shape, turned)
        if "lora_magnitude_vector" in parts:
            adapted = with_lengths(adapted, parts["lora_magnitude_vector"], columns=turned or low_rank.is_embedding)
        return adapted

    def _residual(self, name: str, weight: Tensor, scale: float, turned: bool) -> Tensor:
        _, stored = self._parts[name]
        try:
            if self.config.init == "olora" and is_turned(self.base.config):
                raise ValueError("PEFT decomposes its transposed weight")
            return residual(weight, str(self.config.init), self._low_rank(stored).rank, scale, turned)
        except (ValueError, RuntimeError) as error:  # torch's error if a decomposition fails
            raise ModelError(
                f"{self._role}: {self.path} is a LoRA adapter whose initialization ({self.config.init}) cannot be "
                f"recomputed for {name} ({first_line(error)}); {REMEDY}"
            ) from error


def _open(path: Path, role: str) -> Tensors:
    """Opens the tensors of an adapter folder, or of the file in it that the suite names. That file may be a pickle."""
    if path.is_file():
        return open_file(path, role)
    if not (path / WEIGHTS).is_file():
        pickle = path / PICKLE
        way = (
            f"give the file {pickle} itself, or save the adapter with save_pretrained of PEFT"
            if pickle.is_file()
            else "save the adapter with save_pretrained of PEFT"
        )
        raise ModelError(f"{role}: {path} has no {WEIGHTS}; {way}")
    return SafetensorsFiles(path / WEIGHTS, role)
