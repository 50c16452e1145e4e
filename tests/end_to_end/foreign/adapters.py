"""The axis "adapters": what PEFT trains and saves, and the merged model of PEFT itself."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tests.end_to_end.foreign.forms import Form, plain
from tests.end_to_end.foreign.kinds import Kind, body_of, model, outputs, quiet

Options = Callable[[Kind], dict[str, Any]]


def _nothing(kind: Kind) -> dict[str, Any]:
    return {}


def _not_gpt2(kind: Kind) -> bool:
    return kind.name != "gpt2"


def _untied(kind: Kind) -> bool:
    return bool(kind.head) and not kind.tied


def _tied(kind: Kind) -> bool:
    return kind.tied


def _one_headed(kind: Kind) -> bool:
    """PEFT cannot adapt a linear of a head that it saves as a whole; it also fails with two such linears."""
    return _not_gpt2(kind) and kind.name != "distilbert"


def _tied_decoder(kind: Kind) -> bool:
    """In PEFT, the stacks of T5 do not use the adapter of their shared table."""
    return kind.tied and kind.is_decoder


def _with_table(kind: Kind) -> bool:
    return bool(kind.table) and not kind.tied and kind.family != "t5"


def _gpt2(kind: Kind) -> bool:
    return kind.name == "gpt2"


@dataclass(frozen=True)
class Adapter:
    """The parts that an adapter trains. `options`: of LoraConfig. `store`: changes the folder that PEFT wrote.
    `may_be_refused`: why a refusal is correct too, if it is."""

    options: Options = _nothing
    store: Callable[[Path], Path] = field(default=lambda folder: folder)
    applies: Callable[[Kind], bool] = _not_gpt2
    may_be_refused: str | None = None


def _with_config(folder: Path) -> Path:
    """Adds the base's config.json, like some trainers."""
    shutil.copyfile(folder.parent / "base-config.json", folder / "config.json")
    return folder


def _pickled(folder: Path) -> Path:
    """Stores the weights in the format of older PEFT versions."""
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def _ranks(kind: Kind) -> dict[str, Any]:
    first, second = kind.trained
    return {"rank_pattern": {first: 2}, "alpha_pattern": {second: 3}}


def _everything(kind: Kind) -> dict[str, Any]:
    return {"target_modules": "all-linear"}


def _table_too(kind: Kind) -> dict[str, Any]:
    return {"target_modules": [*kind.trained, kind.table.rpartition(".")[2]]}


def _saves(*names: str) -> Options:
    return lambda kind: {"modules_to_save": [name or kind.table.rpartition(".")[2] for name in names]}


def _own_head(kind: Kind) -> dict[str, Any]:
    return {"modules_to_save": list(kind.head)}


MOVES = "its initialisation moves the base: what PEFT reloads, or a refusal by name"
UNTIES = "it unties the output layer from the table: what PEFT makes of it, or a refusal that says how"
ADAPTERS = {
    "lora": Adapter(),
    "rslora": Adapter(lambda kind: {"use_rslora": True}),
    "dora": Adapter(lambda kind: {"use_dora": True}),
    "ranks": Adapter(_ranks, applies=lambda kind: len(kind.trained) == 2),
    "all-linear": Adapter(_everything, applies=_one_headed),
    "bias-all": Adapter(lambda kind: {"bias": "all"}),
    "bias-lora_only": Adapter(lambda kind: {"bias": "lora_only"}),
    "head": Adapter(_own_head, applies=_untied),
    "table": Adapter(_table_too, applies=_with_table),
    "config-beside": Adapter(store=_with_config),
    "bin": Adapter(store=_pickled, may_be_refused="pickled adapters may be asked for as safetensors"),
    "pissa": Adapter(lambda kind: {"init_lora_weights": "pissa"}, may_be_refused=MOVES),
    "olora": Adapter(lambda kind: {"init_lora_weights": "olora"}, may_be_refused=MOVES),
    "gaussian": Adapter(lambda kind: {"init_lora_weights": "gaussian"}),
    "fan": Adapter(lambda kind: {"fan_in_fan_out": True}, applies=_gpt2),
    "fan-dora": Adapter(lambda kind: {"fan_in_fan_out": True, "use_dora": True}, applies=_gpt2),
    "tied-head": Adapter(_own_head, applies=_tied, may_be_refused=UNTIES),
    "tied-table": Adapter(_saves(""), applies=_tied, may_be_refused=UNTIES),
    "tied-both": Adapter(_saves("", "lm_head"), applies=_tied, may_be_refused=UNTIES),
    "tied-lora-table": Adapter(_table_too, applies=_tied_decoder, may_be_refused=UNTIES),
    "tied-ensured": Adapter(
        lambda kind: {**_saves("", "lm_head")(kind), "ensure_weight_tying": True}, applies=_tied, may_be_refused=UNTIES
    ),
}


@dataclass(frozen=True)
class Trained:
    """An adapter's folder, and the merged model of PEFT."""

    path: Path
    model: Any


def trained(kind: Kind, name: str, base: Path, place: Path, which: str = "a", cast: Form = plain) -> Trained:
    """Writes an adapter of the base to `place`; each expert has its own seed. `cast`: converts to the types that the
    base is stored in."""
    from peft import LoraConfig, PeftModel, get_peft_model

    adapter, seed = ADAPTERS[name], {"a": 1, "b": 2}[which]
    options = {"target_modules": list(kind.trained), "init_lora_weights": False, **adapter.options(kind)}
    torch.manual_seed(seed)
    with quiet():
        wrapped = get_peft_model(
            _start(kind, cast), LoraConfig(r=4, lora_alpha=6, task_type=_task_type(kind), **options)
        )
        _train(wrapped, seed)
        wrapped.eval().peft_config["default"].base_model_name_or_path = str(base)
        wrapped.save_pretrained(place)
        reloaded = PeftModel.from_pretrained(_start(kind, cast), place).eval()  # the model that a user would get
        merged = _untied(kind, copy.deepcopy(reloaded)).merge_and_unload()
    shutil.copyfile(base / "config.json", place.parent / "base-config.json")
    _check_same(kind, merged.eval(), reloaded.base_model.model)
    return Trained(adapter.store(place), merged)


def _start(kind: Kind, cast: Form) -> Any:
    """The model that the adapter is trained on: the base with its head, or the tower alone."""
    whole = copy.deepcopy(model(kind.name, "base"))
    with torch.no_grad():
        for name, rounded in cast(kind, dict(whole.named_parameters())).items():
            whole.get_parameter(name).copy_(rounded)
    return body_of(kind, whole) if kind.name == "clip" else whole


def _untied(kind: Kind, wrapped: Any) -> Any:
    """The same model with a separate output layer: in a tied one, the adapter of the table would change both."""
    if kind.is_decoder or kind.family == "t5":
        for module in wrapped.base_model.model.lm_head.modules():
            if "weight" in dict(module.named_parameters(recurse=False)):
                module.weight = nn.Parameter(module.weight.detach().clone())
    return wrapped


def _check_same(kind: Kind, merged: Any, unmerged: Any) -> None:
    """Asserts that the merged model and the model with the adapter have equal outputs."""
    own, live = (outputs(kind, made if kind.name == "clip" else body_of(kind, made)) for made in (merged, unmerged))
    assert torch.allclose(own, live, rtol=1e-4, atol=1e-4), float((own - live).abs().max())


def _task_type(kind: Kind) -> str | None:
    return None if kind.name == "vit" else kind.task_type


def _train(wrapped: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
