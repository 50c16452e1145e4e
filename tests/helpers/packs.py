"""Every option of `pack`, by glob of conf/pack."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.config.instantiate import build, conf_dir

PACKS = sorted(path.stem for path in (conf_dir() / "pack").glob("*.yaml"))
LINEAR = "layers.0.linear"


def exporter_of(pack: str, **changes: Any) -> Exporter:
    """The exporter of a shipped option, with some settings changed."""
    found: Exporter = build("pack", OmegaConf.merge(OmegaConf.load(conf_dir() / "pack" / f"{pack}.yaml"), changes))  # type: ignore[arg-type]
    return found


def model_of(shape: torch.Size) -> nn.Module:
    """A model of one block with one linear (out, in) called `LINEAR`, followed by a linear `head`."""
    block = nn.ModuleDict({"linear": nn.Linear(shape[1], shape[0], bias=False)})
    return nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(1, 1)})
