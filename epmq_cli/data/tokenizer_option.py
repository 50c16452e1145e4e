"""`suite.tokenizer`: the tokenizer of a merge of models whose tokens differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from epmq_cli.config.field_types import check_types
from epmq_cli.config.validate import check_choice, check_keys, check_range
from epmq_cli.errors import ConfigError, literal

BASE, UNION, ZERO = "base", "union", "zero"
WHERE = "suite.tokenizer"


@dataclass(frozen=True)
class TokenSource:
    """Where the embedding of a token comes from in models that lack the token, or in all of them with `force`.

    `model`: `base`, a task, or `zero`; None for the base if it has the token, else the mean of those that have it.
    `like`: another token of that model in place of `token`; or `id`, the number of its row.
    """

    token: str
    model: str | None = None
    like: str | None = None
    id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerOption:
    """The tokenizer of the result.

    `source`: `base`, a task for its expert's, or `union`: the base's with the tokens that the experts add. `tokens`:
    the embeddings of single tokens, which the tokenizer gets if it lacks them. `pad_to_multiple_of`: of tables' rows.
    `chat_template`: Jinja, `chatml`, or `auto` for the one that most models have; None for that of the source.
    """

    source: str = BASE
    tokens: tuple[TokenSource, ...] = ()
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None


def tokenizer_option(value: Any, tasks: Sequence[str]) -> TokenizerOption | None:
    """The checked option; a text is its source. None if it is not set: all models have the tokens of the base."""
    if value is None:
        return None
    entry = {"source": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{WHERE} must be base, union, a task, or a mapping with a source, got {literal(value)}")
    check_keys(WHERE, entry, [field.name for field in fields(TokenizerOption)])
    check_choice(f"{WHERE}.source", entry.get("source", BASE), (BASE, UNION, *tasks))
    tokens = entry.get("tokens") or ()
    if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, Mapping) for token in tokens):
        raise ConfigError(f"{WHERE}.tokens must be a list of {{token, model}}, got {literal(tokens)}")
    sources = tuple(_token(f"{WHERE}.tokens[{index}]", token, tasks) for index, token in enumerate(tokens))
    if entry.get("pad_to_multiple_of") is not None:
        check_range(f"{WHERE}.pad_to_multiple_of", entry["pad_to_multiple_of"], 1, 1 << 20, integer=True)
    check_types(WHERE, TokenizerOption, {"chat_template": entry.get("chat_template")})
    return TokenizerOption(**{**entry, "tokens": sources})


def _token(where: str, entry: Mapping[str, Any], tasks: Sequence[str]) -> TokenSource:
    check_keys(where, entry, [field.name for field in fields(TokenSource)], ("token",))
    check_types(where, TokenSource, entry)
    if entry.get("model") is not None:
        check_choice(f"{where}.model", entry["model"], (BASE, ZERO, *tasks))
    chosen = [key for key in ("like", "id") if entry.get(key) is not None]
    if len(chosen) > 1 or (chosen and entry.get("model") in (None, ZERO)):
        raise ConfigError(f"{where} takes like or id, and the model that has it, got {literal(dict(entry))}")
    return TokenSource(**entry)
