"""Matches an adapter's tensor names to the base's. They may differ in prefix or spelling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

Spelling = Callable[[str], str]
"""Maps a stored name to the model's own name, if the files use another spelling."""

SHOWN = 3  # modules per error message


def matched(
    adapted: Collection[str],
    names: Iterable[str],
    base: Collection[str],
    spelling: Spelling,
    fits: Callable[[str, str], bool],
    preferred: Collection[str],
) -> list[dict[str, str]]:
    """The best matches of all `adapted` tensors to the base, as maps from `names` to the base's names.

    `names`: the adapter's names, including `adapted`. The list has one map if the match is unique, several if other
    matches are as good, and none if a tensor has no match.

    If the adapter was trained on a model that wraps the base, or on a part of the base, all its names have another
    prefix. An equal prefix ranks first, then a longer or shorter one, then a different one. Ties are resolved by the
    number of `preferred` tensors. `fits(name, base name)`: whether the tensor can belong there.
    """
    stored = {spelling(name): name for name in base}
    own = {name: spelling(name) for name in names}
    ranked: dict[tuple[int, int], list[dict[str, str]]] = {}
    for strip, add in sorted(_candidates([own[name] for name in adapted], stored)):
        places = {name: stored.get(_moved(other, strip, add)) or stored.get(other) for name, other in own.items()}
        if not all((place := places[name]) is not None and fits(name, place) for name in adapted):
            continue
        rank = bool(strip) + bool(add), -sum(places[name] in preferred for name in adapted)
        match = {name: place or name for name, place in places.items()}
        if match not in ranked.setdefault(rank, []):
            ranked[rank].append(match)
    return ranked[min(ranked)] if ranked else []


def lacking(adapted: Collection[str], base: Collection[str], spelling: Spelling) -> str:
    """Describes the adapted modules that the base lacks under the best prefix, and what the base has instead."""
    stored, own = {spelling(name) for name in base}, [spelling(name) for name in adapted]
    candidates = sorted({*_candidates(own, stored), ("", "")})
    lists = ([name for name in (_moved(other, *pair) for other in own) if name not in stored] for pair in candidates)
    missing = min(lists, key=len)
    modules = [name.rpartition(".")[0] for name in missing]
    more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
    return f"{', '.join(modules[:SHOWN])}{more}; {_instead(modules[0], stored)}"


def _instead(module: str, stored: Collection[str]) -> str:
    """Describes the children of the nearest parent module that the base has."""
    parent = module
    while parent := parent.rpartition(".")[0]:
        inside = (name.removeprefix(f"{parent}.") for name in stored if name.startswith(f"{parent}."))
        beside = sorted({name.partition(".")[0] for name in inside})
        if beside:
            return f"its {parent} has {', '.join(beside)}"
    return f"its tensors begin with {', '.join(sorted({name.partition('.')[0] for name in stored}))}"


def _candidates(names: Sequence[str], stored: Collection[str]) -> set[tuple[str, str]]:
    """All pairs (prefix to remove, prefix to add) that map the first name, or the first name in a layer, to a stored
    name."""
    layered = next((name for name in names if any(part.isdigit() for part in name.split("."))), names[0])
    return {pair for name in dict.fromkeys((layered, names[0])) for pair in _prefixes(name, stored)}


def _prefixes(name: str, stored: Collection[str]) -> set[tuple[str, str]]:
    """All pairs (prefix to remove, prefix to add), without layer numbers, that map this name to a stored name."""
    pairs = set()
    parts = name.split(".")
    ends = {".".join(parts[start:]) for start in _starts(parts)}
    for other in stored:
        others = other.split(".")
        for start in _starts(others):
            end = ".".join(others[start:])
            if end in ends:
                pairs.add((name[: len(name) - len(end)], other[: len(other) - len(end)]))
                break
    return pairs


def _starts(parts: list[str]) -> range:
    """The positions at which a name may be split: up to its first number or, without one, up to its last segment."""
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return range(max(first, 1) if first is not None else max(len(parts) - 1, 1))


def _moved(name: str, strip: str, add: str) -> str:
    return add + name.removeprefix(strip) if name.startswith(strip) else name
