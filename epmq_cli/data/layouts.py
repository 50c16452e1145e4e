"""The usual columns of text and conversations for language models, so that a data set needs no settings.

`messages` and `prompt` with `completion` as in TRL (https://huggingface.co/docs/trl/dataset_formats), `conversations`
as in ShareGPT, `instruction`, `input` and `output` as in Alpaca (https://github.com/tatsu-lab/stanford_alpaca).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from epmq_cli.data.chats import Chat, chat_of, stored_value, text_or_chat
from epmq_cli.data.texts import kind_of, text_of
from epmq_cli.errors import DataError

Row = Mapping[str, Any]
BETWEEN = "\n\n"  # the instruction and its input


@dataclass(frozen=True)
class Layout:
    """Columns that make a sample.

    `columns`: those that every row has. `optional`: those that a data set, or a row, may lack. `build`: the text or
    conversation of a row, whose place `where` is for errors.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Row, str], str]


def _text(row: Row, where: str) -> str:
    return text_or_chat(row, "text", where)


def _conversation(column: str) -> Callable[[Row, str], str]:
    def build(row: Row, where: str) -> str:
        value = stored_value(row, column, where)
        if not isinstance(value, list | tuple):
            raise DataError(
                f"{where}: column {column} holds {kind_of(value)}, not a list of messages; set data.text to the "
                "column that holds the text"
            )
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return chat_of([*system, *value], column, where, _tools(row, where))

    return build


def _completion(row: Row, where: str) -> str:
    """Two texts are joined; two lists of messages make a conversation."""
    prompt, completion = (stored_value(row, name, where) for name in ("prompt", "completion"))
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        return chat_of([*prompt, *completion], "prompt", where, _tools(row, where))
    return text_of(prompt, "prompt", where) + text_of(completion, "completion", where)


def _instruction(answer: str, context: str) -> Callable[[Row, str], str]:
    def build(row: Row, where: str) -> str:
        asked = [text_of(row[name], name, where) for name in ("instruction", context) if row.get(name)]
        turns = [("system", row.get("system")), ("user", BETWEEN.join(asked)), ("assistant", row[answer])]
        return Chat([{"role": role, "content": text_of(said, role, where)} for role, said in turns if said], where)

    return build


LAYOUTS = (
    Layout(("text",), (), _text),
    Layout(("messages",), ("tools",), _conversation("messages")),
    Layout(("conversations",), ("system", "tools"), _conversation("conversations")),
    Layout(("prompt", "completion"), ("tools",), _completion),
    Layout(("instruction", "output"), ("input", "system"), _instruction("output", "input")),
    Layout(("instruction", "response"), ("context", "system"), _instruction("response", "context")),
)
"""The first layout that fits counts."""


def layout_of(available: Collection[str], where: str, option: str) -> Layout:
    """The layout of a data set with these columns; DataError if none fits. `option`: names the column of the text."""
    for layout in LAYOUTS:
        if set(layout.columns) <= set(available):
            return layout
    known = "; ".join(" and ".join(layout.columns) for layout in LAYOUTS)
    raise DataError(
        f"{where} has the columns {', '.join(map(str, available)) or 'none'}, and epmq knows {known}; set {option} to "
        "the column of the text or the conversation, or data.prompt to a text with {column} placeholders"
    )


def _tools(row: Row, where: str) -> list[Any]:
    """The descriptions of the tools that a conversation may call, as JSON text or as a list."""
    value = row.get("tools")
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value or []
    except ValueError as error:
        raise DataError(f"{where}: column tools is not JSON ({error}); correct it, or leave the column out") from error
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: column tools holds {kind_of(tools)}, not a list of tools; leave the column out")
    return list(tools)
