"""Tied tensors of a base that an adapter touches: which copies follow their source, and which are on their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from epmq_cli.errors import ModelError
from epmq_cli.models.lora.config import AdapterConfig
from epmq_cli.models.lora.files import AdapterFile
from epmq_cli.models.model_class import model_class
from epmq_cli.models.model_folder import ModelFolder

HEADLESS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""Task types of PEFT whose models have no output layer that is tied to a table."""

CLOSE = 1e-5  # relative; LoRAs of table and output layer that are tied are multiplied in different orders


class Ties:
    """The tied tensors of a base: `pairs` maps the name of each copy to that of its source, both as the base's files
    have or would have them. Empty where the adapter cannot touch them, as asking transformers takes seconds, or has a
    head of a task, whose models have no output layer that is tied."""

    def __init__(self, base: ModelFolder, config: AdapterConfig, files: AdapterFile) -> None:
        self._base, self._config = base, config
        names = [*files.adapted, *files.whole]
        outside = any(not any(part.isdigit() for part in name.split(".")) for name in names)
        headless = config.values.get("task_type") in HEADLESS
        pairs = tied_names(base) if outside and not headless else {}
        known = [*base.infos, *pairs]
        other_head = any(not any(_same_end(name, own) for own in known) for name in files.whole)
        self.pairs = {} if other_head else pairs

    def settled(
        self, own: Collection[str], reached: Collection[str], tensor: Callable[[str], Tensor]
    ) -> tuple[dict[str, str], set[str]]:
        """The copies that follow their source (copy -> source), and the copies that become tensors of their own.

        `own`: the tensors that the adapter changes. `reached`: those of which a change is one of the copies, too, as
        the modules share their parameter when PEFT makes it.
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
        """ModelError where a tied tensor is adapted by an initialisation that takes something from it."""
        tied = {*self.pairs, *self.pairs.values()}
        odd = next((name for name in names if name in tied), None)
        if self._config.init is not None and odd is not None:
            raise ModelError(
                f"{self._config.role}: {self._config.path} is a LoRA adapter with an initialisation that changes the "
                f"base's weights ({self._config.init}) on {odd}, which is tied to another tensor; save the model that "
                "merge_and_unload returns where it was trained, and give its folder"
            )

    def _differs(self, name: str, source: str) -> bool:
        """Whether the base stores a copy that is not one."""
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
    """Copy -> source of the tensors that the base's class and config tie and whose source its files have, both as the
    files have or would have them."""
    known = model_class(base.config, base.infos)
    if known is None:
        return {}
    prefix, pairs = f"{known.prefix}.", {}
    for name, source in known.tied.items():
        stored = next((own for own in (source, source.removeprefix(prefix)) if own in base.infos), None)
        if stored is not None:
            pairs[name if stored == source else name.removeprefix(prefix)] = stored
    return pairs
