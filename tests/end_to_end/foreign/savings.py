"""The axis "how base and experts are saved": each way by name, the kinds that it applies to, and whether it may be
refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.end_to_end.foreign.forms import (
    BIN,
    FILE,
    FOLDER,
    MODEL,
    MODULE,
    PRETRAINING,
    PT,
    SHARDED,
    SHARDED_BIN,
    STATE_DICT,
    Form,
    Layout,
    bfloat16,
    buffers,
    copy_only,
    float16,
    gamma_beta,
    live,
    mixed,
    plain,
    twice,
)
from tests.end_to_end.foreign.kinds import Kind

Applies = Callable[[Kind], bool]


def _all(kind: Kind) -> bool:
    return True


def _tied(kind: Kind) -> bool:
    return kind.tied


def _ties(kind: Kind) -> bool:
    return kind.tied or kind.family == "t5"


def _encoder(kind: Kind) -> bool:
    return kind.has_labels


def _pretrained(kind: Kind) -> bool:
    return kind.name in PRETRAINING


def _with_buffers(kind: Kind) -> bool:
    return kind.name != "vit"


def _named(*names: str) -> Applies:
    return lambda kind: kind.name in names


@dataclass(frozen=True)
class Saving:
    """How a base and an expert are saved. `base_role` and `role`: the saved part of the model, see `saved`; by
    default that of `roles`. `may_be_refused`: why a refusal is correct too, if it is."""

    base: Form = plain
    expert: Form = plain
    base_layout: Layout = FOLDER
    layout: Layout = FOLDER
    base_role: str | None = None
    role: str | None = None
    applies: Applies = _all
    may_be_refused: str | None = None


NO_CONFIG = "a folder without safetensors: the way out is the file's name or a conversion"
SAVINGS = {
    "plain": Saving(),
    "shards": Saving(base_layout=SHARDED, layout=SHARDED),
    "base-shards": Saving(base_layout=SHARDED),
    "one-file": Saving(layout=FILE),
    "pt": Saving(layout=PT),
    "pt-state_dict": Saving(layout=STATE_DICT),
    "pt-model": Saving(layout=MODEL),
    "pt-module": Saving(layout=MODULE, may_be_refused="what DeepSpeed calls a state dict may be asked for by name"),
    "bin": Saving(layout=BIN, may_be_refused=NO_CONFIG),
    "bin-shards": Saving(layout=SHARDED_BIN, may_be_refused=NO_CONFIG),
    "twice": Saving(base=twice, expert=twice, applies=_ties),
    "twice-base": Saving(base=twice, applies=_ties),
    "twice-expert": Saving(expert=twice, applies=_ties),
    "twice-pt": Saving(expert=twice, layout=PT, applies=_ties),
    "twice-shards": Saving(base=twice, expert=twice, base_layout=SHARDED, layout=SHARDED, applies=_ties),
    "copy-base": Saving(base=copy_only, applies=_tied),
    "copy-expert": Saving(expert=copy_only, applies=_tied),
    "copy-both": Saving(base=copy_only, expert=copy_only, applies=_tied),
    "copy-pt": Saving(expert=copy_only, layout=PT, applies=_tied),
    "live": Saving(base=live, expert=live, applies=_named("vit")),
    "live-base": Saving(base=live, applies=_named("vit")),
    "live-expert": Saving(expert=live, applies=_named("vit")),
    "live-pt": Saving(expert=live, layout=PT, applies=_named("vit")),
    "gamma-beta": Saving(base=gamma_beta, expert=gamma_beta, applies=_named("bert")),
    "gamma-base": Saving(base=gamma_beta, applies=_named("bert")),
    "gamma-expert": Saving(expert=gamma_beta, applies=_named("bert")),
    "bf16": Saving(base=bfloat16, expert=bfloat16),
    "bf16-expert": Saving(expert=bfloat16),
    "fp16-expert": Saving(expert=float16),
    "bf16-base": Saving(base=bfloat16),
    "mixed": Saving(base=mixed, expert=mixed),
    "mixed-base": Saving(base=mixed),
    "buffers": Saving(base=buffers, expert=buffers, applies=_with_buffers),
    "buffers-base": Saving(base=buffers, applies=_with_buffers),
    "buffers-expert": Saving(expert=buffers, applies=_with_buffers),
    "base-head": Saving(base_role="whole", applies=_encoder),
    "base-pretraining": Saving(base_role="pretraining", applies=_pretrained),
    "base-pretraining-twice": Saving(base=twice, base_role="pretraining", applies=_pretrained),
    "both-pretraining": Saving(base_role="pretraining", role="pretraining", applies=_pretrained),
    "expert-body": Saving(role="body", applies=_encoder),
    "expert-whole": Saving(role="whole", applies=_named("clip")),
    "base-pretraining-expert-twice": Saving(
        base_role="pretraining", role="pretraining", expert=twice, applies=_pretrained
    ),
}


def roles(kind: Kind) -> tuple[str, str]:
    """The default roles of base and expert."""
    if kind.has_labels:
        return "body", "whole"
    return ("whole", "body") if kind.name == "clip" else ("whole", "whole")
