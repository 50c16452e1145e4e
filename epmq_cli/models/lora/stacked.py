"""LoRA of the parameters that hold all experts of a block (`target_parameters` of PEFT), as one for each linear.

transformers 5 keeps the experts of a block in two parameters (experts, rows, columns), to which PEFT adds B A for each
expert. Its file holds A of all experts in one matrix (experts rank, columns), and B in another (rows, rank experts), in
whose columns the experts take turns. Until version 0.20 of PEFT, A was (experts rank, rows) and B (columns, rank
experts), and A' B' was added.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from epmq_cli.errors import ModelError
from epmq_cli.models.conv1d import Named
from epmq_cli.models.headers import TensorInfo
from epmq_cli.models.lora.config import CONFIG, REMEDY, AdapterConfig
from epmq_cli.models.lora.files import EXPERTS_MODULE, PART, plain
from epmq_cli.models.mixtures import EXPERTS, MIXTURES, PARAMETERS, STACKED, Names
from epmq_cli.models.stacked_experts import is_stacked

if TYPE_CHECKING:
    from torch import Tensor

    from epmq_cli.models.model_folder import ModelFolder

_, DOWN = PARAMETERS
SWAPPED = (0, 20)
"""The first version of PEFT in which A has the columns of the parameter."""
VERSION = re.compile(r"(\d+)\.(\d+)\..*")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mixture:
    """The experts of a block of a model: how many, their size `inner` and that of the stream, and the names of their
    linears in files. `turned`: whether parameters hold weights as (in, out)."""

    count: int
    inner: int
    width: int
    names: Names
    turned: bool

    @classmethod
    def of(cls, base: ModelFolder) -> Mixture | None:
        """That of a base; None if it has no experts that epmq knows."""
        names = MIXTURES.get(str(base.config.get("model_type")))
        if names is None:
            return None
        pattern = re.compile(rf".*\.{EXPERTS}\.(\d+)\.{names.gate}\.weight")
        gates = {int(match[1]): info.shape for name, info in base.infos.items() if (match := pattern.fullmatch(name))}
        if not gates:
            return None
        inner, width = next(iter(gates.values()))
        return cls(1 + max(gates), inner, width, names, is_stacked(base.config))

    def shape(self, parameter: str) -> Shape:
        """The linears of an expert in a parameter as one linear: (out, in)."""
        return (self.width, self.inner) if parameter == DOWN else (2 * self.inner, self.width)

    def linears(self, parameter: str) -> dict[str, slice]:
        """The rows (out,) of these linears, by name."""
        if parameter == DOWN:
            return {self.names.down: slice(0, self.width)}
        return {self.names.gate: slice(0, self.inner), self.names.up: slice(self.inner, 2 * self.inner)}


def unstacked(config: AdapterConfig, base: ModelFolder, tensors: Named) -> tuple[Named, Mapping[str, str]]:
    """The tensors of an adapter's file with a LoRA for each linear of an expert, and by its module the parameter that
    PEFT adapts. ModelError for experts of a base that epmq does not know."""
    mixture = Mixture.of(base)
    if mixture is not None:
        own = Unstacked(config, mixture, tensors)
        return own, own.parameters
    targets = config.values.get("target_parameters") or []
    if odd := [target for target in targets if target.endswith(PARAMETERS)]:
        raise ModelError(
            f"{config.role}: the adapter {config.path} has target_parameters {odd}, but the base ({base.path}) is not "
            f"one of the mixtures whose experts epmq knows: {', '.join(MIXTURES)}; {REMEDY}"
        )
    return tensors, {}


@dataclass(frozen=True)
class _Place:
    """Where a factor of a linear is: the stored matrix of all experts, the number of the expert, whether the experts
    take turns, and the rows (out,) that B has of it; None for A."""

    stored: str
    expert: int
    turns: bool
    rows: slice | None = None


class Unstacked:
    """The tensors of an adapter's file, with a LoRA for each linear of an expert. `parameters`: the parameter that PEFT
    adapts, by module of each linear."""

    def __init__(self, config: AdapterConfig, mixture: Mixture, tensors: Named) -> None:
        self._config, self._mixture, self._tensors = config, mixture, tensors
        self.infos, self.parameters = dict(tensors.infos), dict[str, str]()
        self._places: dict[str, _Place] = {}
        if whole := next((name for name in self.infos if name.endswith(STACKED)), None):
            raise self._refusal(f"contains whole experts ({plain(whole)}), which epmq reads one by one", REMEDY)
        for experts, end, parts in _stacks(tensors.infos):
            self._take_apart(experts, end, parts)

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this name."""
        place = self._places.get(name)
        if place is None:
            return self._tensors.tensor(name)
        whole, count = self._tensors.tensor(place.stored), self._mixture.count
        if place.turns:
            factor = whole.reshape(len(whole), -1, count)[..., place.expert].T
        else:
            factor = whole.reshape(count, -1, whole.shape[1])[place.expert]
        return (factor if place.rows is None else factor.T[place.rows]).contiguous()

    def _take_apart(self, experts: str, end: str, parts: Mapping[str, str]) -> None:
        """Replaces the LoRA of a parameter. `end`: of the names of its tensors."""
        A, B = parts["lora_A"], parts["lora_B"]
        a, b = self.infos.pop(A), self.infos.pop(B)
        parameter, turned = self._fitting(experts, a.shape, b.shape)
        if f"{experts}.{parameter}" in self.parameters.values():
            raise self._refusal(
                f"contains two LoRAs of {experts}.{parameter}",
                "save each adapter separately with save_pretrained of PEFT",
            )
        rank, (_, width) = a.shape[0] // self._mixture.count, self._mixture.shape(parameter)
        if turned:
            A, B, a, b = B, A, b, a
        for expert in range(self._mixture.count):
            for linear, rows in self._mixture.linears(parameter).items():
                own = f"{experts}.{expert}.{linear}"
                self.parameters[own] = f"{experts}.{parameter}"
                self._places[f"{own}.lora_A{end}"] = _Place(A, expert, turned)
                self._places[f"{own}.lora_B{end}"] = _Place(B, expert, not turned, rows)
                self.infos[f"{own}.lora_A{end}"] = TensorInfo((rank, width), a.dtype)
                self.infos[f"{own}.lora_B{end}"] = TensorInfo((rows.stop - rows.start, rank), b.dtype)

    def _fitting(self, experts: str, a: Shape, b: Shape) -> tuple[str, bool]:
        """The parameter whose LoRA has A and B of these shapes, and whether A has the outputs of its linears."""
        ranks = a[0] if len(a) == 2 else 0
        for parameter in PARAMETERS:
            out, width = self._mixture.shape(parameter)
            straight, turned = ((ranks, width), (out, ranks)), ((ranks, out), (width, ranks))
            if not ranks or ranks % self._mixture.count or (a, b) not in (straight, turned):
                continue
            if straight != turned:
                return parameter, (a, b) == turned
            return parameter, self._swapped(f"{experts}.{parameter}") == self._mixture.turned
        sizes = " or ".join(f"{parameter} (out, in) {list(self._mixture.shape(parameter))}" for parameter in PARAMETERS)
        raise self._refusal(
            f"does not fit {experts}: A {list(a)} and B {list(b)} must be of {self._mixture.count} experts and {sizes}",
            "give the model that the adapter was trained on as the base",
        )

    def _swapped(self, parameter: str) -> bool:
        """Whether the version of PEFT that wrote the adapter gives A the columns of a square parameter."""
        version = VERSION.fullmatch(str(self._config.values.get("peft_version")))
        if version is None:
            raise self._refusal(
                f"does not tell by peft_version how it holds the square matrices of {parameter}",
                f"set peft_version in {CONFIG} to the version of PEFT that trained it",
            )
        return (int(version[1]), int(version[2])) >= SWAPPED

    def _refusal(self, problem: str, remedy: str) -> ModelError:
        return ModelError(f"{self._config.role}: the adapter {self._config.path} {problem}; {remedy}")


def _stacks(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """The stored names of A and B of each parameter, behind the name of the experts and the end of their names."""
    stacks: dict[tuple[str, str], dict[str, str]] = {}
    for stored, name in ((stored, plain(stored)) for stored in infos):
        match = PART.fullmatch(name)
        if match and EXPERTS_MODULE.fullmatch(match["module"]):
            end = name.removeprefix(f"{match['module']}.{match['part']}")
            stacks.setdefault((match["module"], end), {})[match["part"]] = stored
    for (module, end), parts in stacks.items():
        if parts.keys() == {"lora_A", "lora_B"}:
            yield module.removesuffix(".base_layer"), end, parts
