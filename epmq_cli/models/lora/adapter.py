"""LoRA adapters (https://arxiv.org/abs/2106.09685) in folders of PEFT: merged into the base tensor by tensor.

Also DoRA, rank-stabilised scales (https://arxiv.org/abs/2312.03732), adapted embeddings and convolutions, the residuals
of PiSSA, OLoRA and KaSA (see `lora_delta.py`), and what was trained beside: whole tensors, biases, rows of embeddings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from epmq_cli.errors import ModelError, first_line
from epmq_cli.models.lora.config import REMEDY, read_config
from epmq_cli.models.lora.delta import product, residual, with_lengths
from epmq_cli.models.lora.files import AdapterFile, sorted_file
from epmq_cli.models.lora.names import Spelling, lacking, matched
from epmq_cli.models.lora.shapes import LowRank, rows_problem
from epmq_cli.models.lora.ties import Ties
from epmq_cli.models.model_folder import ModelFolder, SafetensorsFiles, TensorInfo, Tensors
from epmq_cli.models.state_dict import open_file

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


class Adapted:
    """The base's tensors with an adapter merged in, under the names that they have in the base.

    Tensors that the base does not have, such as a classifier, keep the adapter's name for them. What is adapted comes
    in float32, the rest in the type it is stored in. `path`: the adapter's folder, or the file in it that the suite
    names. `merged`: the base's tensors that the family merges. `spelling`: the family's.

    On a tied base, a copy that the adapter takes apart from its source is a tensor of its own: these are the tensors
    that were trained and that PeftModel.from_pretrained loads. (PEFT's merge_and_unload adds what a LoRA of one of them
    learned to both.) `changed`: the names of all tensors that are not the base's. `copies`: the base's tensors that the
    adapter's file holds, too.
    """

    def __init__(
        self, path: Path, role: str, base: ModelFolder, merged: Collection[str], spelling: Spelling = str
    ) -> None:
        self.path, self._role, self._base = (path.parent if path.is_file() else path), role, base
        self.config = read_config(self.path, role)
        self._file = _open(path, role)
        files = sorted_file(self.path, role, self._file.infos)
        self._ties = Ties(base, self.config, files)
        places = self._places(files, merged, spelling)
        self._place(files, places)
        own = {*self._whole, *self._parts, *self._rows, *self._biases}
        self.infos = base.infos | {name: self._changed_info(name) for name in own}
        self._follows, apart = self._settled(own)
        self.changed = frozenset(self.infos) & (own | apart | set(self._follows))

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
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

    @property
    def tied(self) -> Collection[str]:
        """The names of the base's tied copies."""
        return self._ties.pairs.keys()

    def copy(self, name: str) -> Tensor:
        """The base's tensor of this name as the adapter's file has it."""
        return self._file.tensor(self.copies[name])

    def _places(self, files: AdapterFile, merged: Collection[str], spelling: Spelling) -> dict[str, str]:
        """The base's names of the adapter's tensors; ModelError where the base lacks those that are adapted, or has two
        places for them."""
        adapted, names = files.adapted, [*files.adapted, *files.whole, *files.copies, *files.originals]
        stored = [*self._base.infos, *self._ties.pairs]

        def fits(name: str, place: str) -> bool:
            module, _, kind = name.rpartition(".")
            parts = files.parts.get(module)
            return parts is None or kind == "bias" or self._low_rank(parts).fits(self._base_info(place).shape)

        found = matched(adapted, names, stored, spelling, fits, merged)
        found = found or matched(adapted, names, stored, spelling, lambda name, place: True, merged)
        if not found:
            raise ModelError(
                f"{self._role}: the adapter {self.path} was not trained on the base ({self._base.path}), which lacks "
                f"{lacking(adapted, stored, spelling)}; give the model that the adapter was trained on as the base"
            )
        if len(found) > 1:
            one, other = (places[adapted[0]] for places in found[:2])
            raise ModelError(
                f"{self._role}: the adapter {self.path} fits both {one} and {other} of the base ({self._base.path}); "
                "save it from the whole model, so that its names say which"
            )
        return found[0]

    def _place(self, files: AdapterFile, places: Mapping[str, str]) -> None:
        """Keeps what the file holds under the base's names; ModelError where it holds one tensor with two values."""
        for name, stored in files.doubles.items():
            if not torch.equal(self._file.tensor(stored), self._file.tensor(files.whole[name])):
                raise ModelError(
                    f"{self._role}: {self.path} holds {stored} and {files.whole[name]} with different values, which "
                    "are one tensor; save the adapter again with save_pretrained of PEFT"
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
        """Decides which tied copies follow their source and which are tensors of their own, and shows them so."""
        self._ties.refuse_residuals(name for name, (_, parts) in self._parts.items() if "lora_A" in parts)
        self._follows = {}
        saved = {name for name in self._whole if self.config.saves(name.rpartition(".")[0])}
        follows, apart = self._ties.settled(own, {*self._rows, *self._whole} - saved, self.tensor)
        for name in apart:
            self.infos.setdefault(name, self._base_info(name))
        for name, source in follows.items():
            if name in self._base.infos:
                self.infos[name] = self.infos[source]
            else:
                self.infos.pop(name, None)
        return follows, apart

    def _base_info(self, name: str) -> TensorInfo:
        return self._base.infos[self._base_name(name)]

    def _base_name(self, name: str) -> str:
        return name if name in self._base.infos else self._ties.pairs[name]

    def _unadapted(self, name: str) -> Tensor:
        """What the adapter's tensors are added to: the base's tensor, unless the file has one in its place."""
        stored = self._replaced.get(name)
        return self._base.tensor(self._base_name(name)) if stored is None else self._file.tensor(stored)

    def _changed_info(self, name: str) -> TensorInfo:
        """Shape and type of a changed tensor; ModelError where the adapter's shapes do not fit it."""
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
            raise ModelError(f"{self._role}: the adapter {self.path} has for {name} {problem}; train or fetch it again")

    def _check_same(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise ModelError(
                f"{self._role}: the adapter {self.path} was not trained on the base ({self._base.path}): "
                f"{name} is {list(found)} in the adapter and {list(expected)} in the base"
            )

    def _low_rank(self, parts: Mapping[str, str]) -> LowRank:
        shapes = {part: self._file.infos[stored].shape for part, stored in parts.items()}
        return LowRank(shapes, self.config.is_set("fan_in_fan_out"))

    def _with_lora(self, name: str, weight: Tensor) -> Tensor:
        """A weight in float32 with the LoRA of its module added."""
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
            return residual(weight, str(self.config.init), self._low_rank(stored).rank, scale, turned)
        except (ValueError, RuntimeError) as error:  # torch's error where a decomposition fails
            raise ModelError(
                f"{self._role}: {self.path} is a LoRA adapter whose initialisation ({self.config.init}) cannot be "
                f"computed again for {name} ({first_line(error)}); {REMEDY}"
            ) from error


def _open(path: Path, role: str) -> Tensors:
    """The tensors of an adapter's folder, or of the file in it that the suite names, which may be a pickle."""
    if path.is_file():
        return open_file(path, role)
    if not (path / WEIGHTS).is_file():
        pickle = path / PICKLE
        way = (
            f"name the file itself, {pickle}, or save the adapter with save_pretrained of PEFT"
            if pickle.is_file()
            else "save the adapter with save_pretrained of PEFT"
        )
        raise ModelError(f"{role}: {path} has no {WEIGHTS}; {way}")
    return SafetensorsFiles(path / WEIGHTS, role)
