"""Base and experts of a suite side by side, by tensor name, one tensor at a time: what merge methods read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import ModelError
from epmq_cli.merge.method import Piece, PieceReader
from epmq_cli.merge.named_tensors import ExpertTensors, NamedTensors
from epmq_cli.merge.settings import LAYER, Setting, TensorSetting, layer_depths
from epmq_cli.merge.token_rows import TokenRows
from epmq_cli.merge.vocabulary import is_over_vocabulary, mean_rows, vocabulary_of
from epmq_cli.models.model_folder import DTYPES, dtype_of
from epmq_cli.quantize.linalg import is_finite

if TYPE_CHECKING:
    from torch import Tensor

GIVEN = ""
"""The key of a merge that exists already, beside the experts by task."""
SHOWN = 3  # differences that an error lists
PIECE = 1 << 16  # elements: 256 KB in float32


class MergeSource:
    """Base and experts of one suite, the latter by task, under common tensor names.

    Names or shapes that differ from the base's raise a ModelError before anything is computed.

    `vocabulary`: with `pad`, tensors over the vocabulary (see `vocabulary.py`) may differ in rows; with `same` they may
    not. Padded tensors have as many rows as the longest one: an expert takes the rows that it lacks from the base, and
    the base takes the mean of those experts that have them. `written`: the names in the result's files of tensors that
    are not stored under the base's names. `misfits`: by task, what the names of an expert with missing tensors suggest.
    `rows`: matches the rows of tables over the vocabulary by token; all of them then count as padded.
    """

    def __init__(
        self,
        base: NamedTensors,
        experts: Mapping[str, NamedTensors],
        vocabulary: str = "same",
        written: Mapping[str, str] | None = None,
        misfits: Mapping[str, str] | None = None,
        rows: TokenRows | None = None,
    ) -> None:
        self._base, self._experts, self._vocabulary, self._rows = base, experts, vocabulary, rows
        self._written = written or {}
        self._misfits = misfits or {}
        self._added: dict[str, Tensor] = {}
        self.padded: dict[str, int] = {}
        """The tensors over the vocabulary whose rows differ between models, and the rows that they get."""
        for name in base.names:
            _check_readable(base, name)
        for task in experts:
            self._check_same(task)
        self.names = [name for name in base.names if base.info(name).dtype in DTYPES]
        self.tasks = [task for task in experts if task != GIVEN]
        """The tasks that have an expert, in the suite's order."""

    def base(self, name: str) -> Tensor:
        """The base's tensor in float32. ModelError if it contains NaN or infinity."""
        if self._rows is not None and name in self.padded:
            return self._rows.aligned(partial(self._own, name=name), None)
        tensor = self._own(None, name)
        lacks = name in self.padded and len(tensor) < self.padded[name]
        return torch.cat([tensor, self._rows_added(name)]) if lacks else tensor

    def expert(self, task: str, name: str) -> Tensor:
        """The tensor of a task's expert in float32. ModelError if it contains NaN or infinity."""
        if self._rows is not None and name in self.padded:
            return self._rows.aligned(partial(self._own, name=name), task)
        tensor = self._own(task, name)
        return torch.cat([tensor, self.base(name)[len(tensor) :]]) if name in self.padded else tensor

    def experts(self, name: str) -> Mapping[str, Tensor]:
        """The experts' tensors of one name, by task. A tensor is read each time it is looked up."""
        return ExpertTensors(self, name)

    def given(self, name: str) -> Tensor:
        """The tensor of a merge that exists already, in float32; see `merge=given`."""
        return self.expert(GIVEN, name)

    def model(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The names and tensors of a task's expert, in float32."""
        return ((name, self.expert(task, name)) for name in self.names)

    def pieces(self, name: str) -> list[PieceReader]:
        """A reader for each run of up to `PIECE` elements, which fits into the processor's cache."""
        split = zip(*(torch.split(tensor.flatten(), PIECE) for tensor in self._whole(name)), strict=True)
        return [partial(self._piece, name, number * PIECE, parts) for number, parts in enumerate(split)]

    def _whole(self, name: str) -> list[Tensor]:
        """The tensor of the base and of each expert, as stored unless padded."""
        if name in self.padded:
            return [self.base(name), *self.experts(name).values()]
        return [self._model(task).tensor(name) for task in (None, *self.tasks)]

    def setting(self, setting: Setting, default: float) -> TensorSetting:
        """The values of a method's setting for these tensors; `default` where it has none."""
        return TensorSetting(setting, default, self.depths)

    def renamed(
        self,
        base: Mapping[str, str],
        experts: Mapping[str, Mapping[str, str]],
        role: str | None,
        depths: Mapping[str, float],
    ) -> MergeSource:
        """Some tensors of some models under other names, new -> own, with other depths. `role`: the task whose expert
        is the base; None for the base itself."""

        def tensors(task: str | None, names: Mapping[str, str]) -> NamedTensors:
            model = self._model(task)
            return NamedTensors(model.folder, {new: model.names[own] for new, own in names.items()})

        made = MergeSource(
            tensors(role, base),
            {task: tensors(task, names) for task, names in experts.items()},
            self._vocabulary,
            rows=None if self._rows is None else self._rows.of(role),
        )
        made.depths = dict(depths)
        return made

    @cached_property
    def depths(self) -> dict[str, float]:
        """The depth of each tensor in its stack of layers, in [0, 1]; see `settings.layer_depths`."""
        return layer_depths(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the merged tensor."""
        shape = self._base.info(name).shape
        return (self.padded[name], *shape[1:]) if name in self.padded else shape

    def is_over_vocabulary(self, name: str) -> bool:
        """Whether a tensor is a matrix with a row for each token, as embeddings and output layers are."""
        shape = self._base.info(name).shape
        return len(shape) == 2 and (name in self.padded or shape[0] == vocabulary_of(self._base.folder.config))

    def stored_name(self, name: str) -> str:
        """The name of a tensor in the result's files: the base's, unless the tensor gets another one."""
        return self._written.get(name, self._base.names[name])

    def read_name(self, name: str) -> str:
        """The name, in the base's files, of the tensor that has its values."""
        return self._base.names[name]

    def dtype(self, name: str) -> torch.dtype:
        """The type in which the base stores a tensor."""
        return dtype_of(self._base.info(name).dtype)

    @property
    def main_dtype(self) -> torch.dtype:
        """The type in which the base stores most of the merged elements."""
        return self._base.main_dtype(self.names)

    @property
    def wider(self) -> dict[str, torch.dtype]:
        """The tasks whose experts store most of their elements in a wider type than the base, and these types."""
        mains = {task: expert.main_dtype(self.names) for task, expert in self._experts.items()}
        return {task: dtype for task, dtype in mains.items() if dtype.itemsize > self.main_dtype.itemsize}

    @property
    def vocabulary_size(self) -> int | None:
        """The rows of the tensors over the vocabulary; None if the base has as many."""
        if self._rows is not None:
            return self._rows.size if self.padded else None
        larger = [rows for name, rows in self.padded.items() if rows > self._base.info(name).shape[0]]
        return max(larger, default=None)

    def _model(self, task: str | None) -> NamedTensors:
        """A task's expert, or the base."""
        return self._base if task is None else self._experts[task]

    def _own(self, task: str | None, name: str) -> Tensor:
        """The stored rows of a tensor of an expert, or of the base, in float32."""
        return self._checked(task, name, self._model(task).tensor(name).float())

    def _piece(self, name: str, offset: int, parts: tuple[Tensor, ...]) -> Piece:
        base = self._checked(None, name, parts[0].float())
        experts = {
            task: self._checked(task, name, part.float()) for task, part in zip(self.tasks, parts[1:], strict=True)
        }
        return Piece(name, offset, base, experts)

    def _checked(self, task: str | None, name: str, tensor: Tensor) -> Tensor:
        """The tensor itself. ModelError if it contains NaN or infinity."""
        if not is_finite(tensor):
            role = self._model(task).folder.role
            raise ModelError(f"{role}: {name} holds a NaN or an infinity; train or fetch the model again")
        return tensor

    def _rows_added(self, name: str) -> Tensor:
        """The rows that the base lacks in a tensor over the vocabulary: the mean of the experts that have them."""
        if name not in self._added:
            start = self._base.info(name).shape[0]
            self._added[name] = mean_rows([self._own(task, name)[start:] for task in self.tasks])
        return self._added[name]

    def _is_table(self, name: str) -> bool:
        """Whether a tensor has a row, or a bias, for each token in all models. Tensors in layers have none, whatever
        their size."""
        info, config = self._base.info(name), self._base.folder.config
        if LAYER.match(name) or not (len(info.shape) > 1 or name.endswith("bias")):
            return False
        having = [expert for expert in self._experts.values() if name in expert.names]
        return all(is_over_vocabulary(info, config, own.info(name), own.folder.config) for own in having)

    def _check_same(self, task: str) -> None:
        base, expert = self._base, self._experts[task]
        differences, types = list[str](), list[str]()
        for name in base.names:
            info = base.info(name)
            own = expert.info(name) if name in expert.names else None
            if own is None:
                differences.append(f"{name} is missing from the expert")
            elif info.dtype in DTYPES and own.dtype not in DTYPES:
                types.append(f"{name} is of type {own.dtype} in the expert and {info.dtype} in the base")
            elif self._rows is not None and self._is_table(name):
                self.padded[name] = self._rows.size
            elif own.shape != info.shape:
                over = is_over_vocabulary(info, base.folder.config, own, expert.folder.config)
                if over and self._vocabulary == "pad":
                    self.padded[name] = max(self.padded.get(name, 0), own.shape[0], info.shape[0])
                    continue
                hint = " (suite.vocabulary=pad fills the rows that either lacks)" if over else ""
                differences.append(
                    f"{name} is {list(own.shape)} in the expert and {list(info.shape)} in the base{hint}"
                )
        differences += [f"{name} is missing from the base" for name in expert.names if name not in base.names]
        remedy = "give an expert that was fine-tuned from this base and saved with save_pretrained"
        if types and not differences:
            remedy = f"save the expert in one of {', '.join(DTYPES)}"
        differences += types
        if differences:
            more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
            reason = f"{self._misfits[task]}; " if task in self._misfits else ""
            raise ModelError(
                f"{expert.folder.role} ({expert.folder.path}) does not fit the base ({base.folder.path}): "
                f"{reason}{'; '.join(differences[:SHOWN])}{more}; {remedy}"
            )


def _check_readable(base: NamedTensors, name: str) -> None:
    """ModelError if a tensor has a type of 8 bits or less, as quantized weights have. These cannot be merged."""
    dtype = base.info(name).dtype
    if dtype not in DTYPES and (dtype.startswith("F") or dtype in ("I8", "U8")):
        raise ModelError(
            f"{base.folder.role}: {name} is of type {dtype}, and epmq merges {', '.join(DTYPES)}; save the model in "
            "one of these types"
        )
