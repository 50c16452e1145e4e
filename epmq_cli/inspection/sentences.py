"""What `epmq inspect` says in sentences, in the terminal and on its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epmq_cli.runtime.units import size

ALLOWED = "nothing that epmq inspect checks would be refused; epmq run --plan also checks data and options"


def amount(number: int) -> str:
    """A number of parameters, in thousands, millions or billions."""
    for least, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= least:
            return f"{number / least:.3g} {unit}"
    return str(number)


def summary(content: Mapping[str, Any]) -> str:
    """What one path holds."""
    kind = content["kind"]
    names = content.get("architectures") or []
    facts = [kind, *([names[0]] if names else []), *([f"family {content['family']}"] if content.get("family") else [])]
    if content.get("written_by"):
        facts.append(f"written by {content['written_by']}")
    count = f"{content['tensors']} tensors"
    bits = "" if kind == "checkpoint" else f", {content['bits_per_weight']:g} bits a weight"
    number = "" if kind == "checkpoint" else f", {amount(content['parameters'])} parameters"
    return f"{', '.join(facts)}: {count}{number}, {size(content['bytes'])}{bits}"


def treatment(content: Mapping[str, Any]) -> str:
    """What a run does with the parameters."""
    return (
        f"a run merges {amount(content['merged'])} parameters, quantizes {amount(content['quantized'])} of them, and "
        f"leaves {amount(content['left'])} as the base has them"
    )


def left(content: Mapping[str, Any]) -> list[str]:
    """The names of the tensors that a run leaves."""
    names, more = content["left_names"], content["left_more"]
    return [f"left: {', '.join(names)}{f' and {more} more' if more else ''}"] if names else []


def adapter(content: Mapping[str, Any]) -> list[str]:
    """The kind, ranks and targets of an adapter."""
    kinds = [name for name in ("rslora", "dora") if content[name]]
    facts = [str(content["peft_type"]), *kinds, f"alpha {content['alpha']}", f"trained on {content['base']}"]
    lines = [", ".join(facts)]
    if content.get("targets"):
        ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in content["ranks"].items())
        lines.append(f"rank {ranks}; {', '.join(f'{name} x {count}' for name, count in content['targets'].items())}")
    names = [name for name in ("whole_tensors", "token_rows") if content.get(name)]
    return lines + [f"{name.replace('_', ' ')}: {', '.join(content[name])}" for name in names]


def checkpoint(content: Mapping[str, Any]) -> str:
    """The format of a checkpoint and the run that wrote it."""
    run = content.get("run") or {}
    suite = f", suite {run['suite']}, {run['quant']}" if run.get("suite") else ""
    return f"format {content['format']}{suite}, {content['linears']} quantized linears"


def unquantized(content: Mapping[str, Any]) -> list[str]:
    """The size of the tensors of a checkpoint that are not quantized; nothing for a dense one."""
    rest = content["bytes"] - sum(row["bytes"] for row in content["formats"])
    return [f"other tensors, which are not quantized: {size(rest)}"] if content["formats"] else []


def not_finite(values: Mapping[str, Any]) -> str:
    """The tensors with a NaN or an infinity."""
    bad = values["not_finite"]
    return f"NaN or infinity: {', '.join(f'{name} ({count})' for name, count in bad.items()) if bad else 'none'}"


def configs(differences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The keys of configs that differ."""
    lines = [
        f"configs differ in {key}: {', '.join(f'{name} {str(value)[:40]}' for name, value in values.items())}"
        for key, values in differences.items()
    ]
    return lines or ["configs: the same, but for classes, labels and versions"]


def experts(content: Mapping[str, Any]) -> str:
    """How many experts are compared with which base."""
    count = len(content["experts"])
    return f"{count} expert{'s' if count > 1 else ''} of {content['base']}"


def ties(content: Mapping[str, Any]) -> str:
    """What TIES would drop of task vectors, and the conflicts of their signs."""
    total = content["total"]
    return (
        f"TIES with merge.density={content['density']:g} trims {mean(total['trimmed']):.1f}% of the elements that an "
        f"expert changes and outvotes {mean(total['outvoted']):.1f}%, on average; {100 * total['sign_conflicts']:.1f}% "
        "of the changed elements have task vectors of both signs"
    )


def mean(shares: Mapping[str, float]) -> float:
    """The mean of shares, in %."""
    return 100 * sum(shares.values()) / len(shares)
