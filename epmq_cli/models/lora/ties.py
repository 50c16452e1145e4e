"""Decides which tied copies in a base follow their source after an adapter changes one, and which become separate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import ModelError
from epmq_cli.models.lora.config import AdapterConfig
from epmq_cli.models.lora.files import AdapterFile
from epmq_cli.models.model_class import model_class
from epmq_cli.models.model_folder import ModelFolder

if TYPE_CHECKING:
    from torch import Tensor

HEADLESS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""PEFT task types whose models have no output layer tied to the embedding table."""

CLOSE = 1e-5  # relative; the LoRA products of a table and its tied output layer differ in the order of operations


class Ties:
    """The tied tensors of a base.

    `pairs`: copy -> source, with the names that the base's files use or would use. It stays empty if the adapter cannot
    affect tied tensors, because loading transformers takes seconds. It also stays empty if the adapter has a task head,
    because such models have no tied output layer.
    """

    def __init__(self, base: ModelFolder, config: AdapterConfig, files: AdapterFile) -> None:
        self._base, self._config = base, config
        names = [*files.adapted, *files.whole]
        outside = any(not any(part.isdigit() for part in name.split(".")) for name in names)
        headless = config.values.get("task_type") in HEADLESS
        pairs = tied_names(base) if outside and not headless else {}
        stored = [*base.infos, *pairs]
        other_head = any(not any(_same_end(name, own) for own in stored) for name in files.whole)
        self.pairs = {} if other_head else pairs

    def settled(
        self, own: Collection[str], reached: Collection[str], tensor: Callable[[str], Tensor]
    ) -> tuple[dict[str, str], set[str]]:
        """The copies that follow their source (copy -> source), and the copies that become separate tensors.

        `own`: the tensors that the adapter changes. `reached`: the tensors whose change also affects their copies,
        because the modules still share the parameter when PEFT changes it.
        """
        follows, apart = dict[str, str](), set[str]()
        for name, source in self.pairs.items():
            if (name not in own and source not in own) or self._differs(name, source):
                continue
            follow = name not in own and source in reached
            if follow or (source in own and _close(tensor(name), tensor(source))):
                follows[name] = source
            else:
                apart.add(name)
        return follows, apart

    def refuse_residuals(self, names: Iterable[str]) -> None:
        """Raises ModelError if an initialization that changes the base's weights is used on a tied tensor."""
        tied = {*self.pairs, *self.pairs.values()}
        odd = next((name for name in names if name in tied), None)
        if self._config.init is not None and odd is not None:
            raise ModelError(
                f"{self._config.role}: {self._config.path} is a LoRA adapter with an initialization that changes the "
                f"base's weights ({self._config.init}) on {odd}, which is tied to another tensor; save the model that "
                "merge_and_unload returns after training, and give its folder"
            )

    def _differs(self, name: str, source: str) -> bool:
        """Whether the base stores the copy and its source with different values."""
        infos = self._base.infos
        if name not in infos or source not in infos:
            return False
        return infos[name] != infos[source] or not torch.equal(self._base.tensor(name), self._base.tensor(source))


def _same_end(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    return bool((one - other).abs().max() <= CLOSE * other.abs().max())


def tied_names(base: ModelFolder) -> dict[str, str]:
    """Copy -> source for the tensors that the base's class and config tie.

    The source must be in the base's files. Both names are those that the files use or would use.
    """
    cls = model_class(base.config, base.infos)
    if cls is None:
        return {}
    prefix, pairs = f"{cls.prefix}.", {}
    for name, source in cls.tied.items():
        stored = next((own for own in (source, source.removeprefix(prefix)) if own in base.infos), None)
        if stored is not None:
            pairs[name if stored == source else name.removeprefix(prefix)] = stored
    return pairs
