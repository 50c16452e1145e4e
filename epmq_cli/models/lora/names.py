"""Where in the base the tensors of an adapter belong: its names may have another prefix, or another spelling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

Spelling = Callable[[str], str]
"""The model's own name of a stored tensor, where files spell it otherwise."""

SHOWN = 3  # modules named in an error


def matched(
    adapted: Collection[str],
    names: Iterable[str],
    base: Collection[str],
    spelling: Spelling,
    fits: Callable[[str, str], bool],
    preferred: Collection[str],
) -> list[dict[str, str]]:
    """The best ways to find all `adapted` tensors in the base: maps from the adapter's names (`names`, those of
    `adapted` among them) to the base's. One where it is clear, several where the base has as good a place elsewhere,
    none where it has no place for all of them.

    The adapter may have been trained on a model that wraps the base's, or on a part of it: then all its names have
    another prefix. The same prefix is better than a longer or a shorter one, that better than another one; among equals
    the one with more tensors that are `preferred`. `fits(name, base's name)`: whether a tensor may belong there.
    """
    stored = {spelling(name): name for name in base}
    own = {name: spelling(name) for name in names}
    found: dict[tuple[int, int], list[dict[str, str]]] = {}
    for strip, add in sorted(_candidates([own[name] for name in adapted], stored)):
        places = {name: stored.get(_moved(other, strip, add)) or stored.get(other) for name, other in own.items()}
        if not all((place := places[name]) is not None and fits(name, place) for name in adapted):
            continue
        rank = bool(strip) + bool(add), -sum(places[name] in preferred for name in adapted)
        kept = {name: place or name for name, place in places.items()}
        if kept not in found.setdefault(rank, []):
            found[rank].append(kept)
    return found[min(found)] if found else []


def lacking(adapted: Collection[str], base: Collection[str], spelling: Spelling) -> str:
    """What of the adapted tensors the base does not have, under the prefix that fits most, and what it has instead."""
    stored, own = {spelling(name) for name in base}, [spelling(name) for name in adapted]
    candidates = sorted({*_candidates(own, stored), ("", "")})
    lists = ([name for name in (_moved(other, *pair) for other in own) if name not in stored] for pair in candidates)
    missing = min(lists, key=len)
    modules = [name.rpartition(".")[0] for name in missing]
    more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
    return f"{', '.join(modules[:SHOWN])}{more}; {_instead(modules[0], stored)}"


def _instead(module: str, stored: Collection[str]) -> str:
    """What the base has in the nearest part of it that has the same name."""
    parent = module
    while parent := parent.rpartition(".")[0]:
        inside = (name.removeprefix(f"{parent}.") for name in stored if name.startswith(f"{parent}."))
        beside = sorted({name.partition(".")[0] for name in inside})
        if beside:
            return f"its {parent} has {', '.join(beside)}"
    return f"its tensors begin with {', '.join(sorted({name.partition('.')[0] for name in stored}))}"


def _candidates(names: Sequence[str], stored: Collection[str]) -> set[tuple[str, str]]:
    """All (prefix to take off, prefix to put on) that make a stored name of the first of these names, or of the first
    that is in a layer."""
    layered = next((name for name in names if any(part.isdigit() for part in name.split("."))), names[0])
    return {pair for name in dict.fromkeys((layered, names[0])) for pair in _prefixes(name, stored)}


def _prefixes(name: str, stored: Collection[str]) -> set[tuple[str, str]]:
    """All (prefix to take off, prefix to put on) that make a stored name of this one, neither with a layer's number."""
    found = set()
    parts = name.split(".")
    ends = {".".join(parts[start:]) for start in _starts(parts)}
    for other in stored:
        others = other.split(".")
        for start in _starts(others):
            end = ".".join(others[start:])
            if end in ends:
                found.add((name[: len(name) - len(end)], other[: len(other) - len(end)]))
                break
    return found


def _starts(parts: list[str]) -> range:
    """Where a name may be cut: before its first number, and before its module where it has none."""
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return range(max(first, 1) if first is not None else max(len(parts) - 1, 1))


def _moved(name: str, strip: str, add: str) -> str:
    return add + name.removeprefix(strip) if name.startswith(strip) else name
