"""Reads conversations in two formats: `messages`, a list of {role, content}
(https://huggingface.co/docs/transformers/chat_templating), and `conversations`, a list of {from, value} (ShareGPT)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from epmq_cli.data.texts import check_text, kind_of, text_of
from epmq_cli.errors import DataError, literal

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Maps the speakers in ShareGPT's `from` to the roles of chat templates."""

MESSAGES = re.compile(r"""\s*\[\{\s*(['"])(role|content|from|value)\1\s*:""")
"""The start of a list of messages that is stored as text."""

LINES = "\n"  # joins the parts of one message, as in inference servers
EXTRAS = ("name", "tool_call_id", "reasoning_content")
"""Further fields of a message that templates read, beside its tool calls."""


class Chat(str):
    """A conversation, which a tokenizer's chat template turns into text. The string itself holds the messages, one per
    line, for code that counts and compares texts.

    `messages`: {role, content, ...}, each content a text. `where`: its row in the source. `tools`: descriptions of the
    tools that it may call, as JSON objects.
    """

    messages: tuple[dict[str, Any], ...]
    where: str
    tools: tuple[Mapping[str, Any], ...]

    def __new__(cls, messages: Sequence[dict[str, Any]], where: str, tools: Sequence[Mapping[str, Any]] = ()) -> Chat:
        """Builds the string from the messages."""
        chat = super().__new__(cls, LINES.join(message["content"] for message in messages))
        chat.messages, chat.where, chat.tools = tuple(messages), where, tuple(tools)
        return chat

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Makes copies and pickles keep the messages."""
        return self.messages, self.where, self.tools


def has_chats(documents: Iterable[object]) -> bool:
    """Whether any document is a conversation."""
    return any(isinstance(document, Chat) for document in documents)


def stored(value: Any) -> Any:
    """The list of messages if a text holds one, as JSON or as a Python list in a csv; any other value unchanged.
    ValueError if the text looks like such a list but cannot be read."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        messages = _literal(value)
    if messages is None:
        return value
    is_chat = all(
        isinstance(each, dict) and ({"role", "content"} <= each.keys() or "from" in each) for each in messages
    )
    return messages if is_chat else value


def text_or_chat(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column of a row, or the conversation in it; DataError if it holds neither."""
    value = stored_value(row, column, where)
    return chat_of(value, column, where) if isinstance(value, list | tuple) else text_of(value, column, where)


def stored_value(row: Mapping[str, Any], column: str, where: str) -> Any:
    """See `stored`; DataError instead of ValueError."""
    try:
        return stored(row[column])
    except ValueError as error:
        raise DataError(
            f"{where}: column {column} holds a text that cannot be read ({error}); store it as JSON lines, or choose "
            "the column that holds the text"
        ) from error


def _literal(text: str) -> list[Any] | None:
    """The Python list in a text; None if the text holds none. ValueError if the text looks like messages but is not a
    Python list, for example an array that numpy printed."""
    try:
        return list(ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        if MESSAGES.match(text):
            raise ValueError("it looks like a list of messages and is neither JSON nor a Python list") from None
        return None


def chat_of(value: Sequence[Any], column: str, where: str, tools: Sequence[Mapping[str, Any]] = ()) -> Chat:
    """The conversation in a list; DataError if the list holds none. `tools`: see Chat."""
    if not value or not all(isinstance(message, Mapping) for message in value):
        raise DataError(
            f"{where}: column {column} holds {kind_of(value)}, not text; a list must be a conversation, "
            "whose messages have role and content, or from and value; choose the column that holds the text"
        )
    messages = [_message(each, f"{where}, message {i}") for i, each in enumerate(value, 1)]
    return Chat(messages, where, [_filled(tool) for tool in tools])


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = {key: each for key, each in message.items() if each is not None}  # parquet adds null fields
    if not {"role", "from"} & fields.keys():
        names = ", ".join(map(str, message)) or "nothing"
        raise DataError(f"{where} must have role and content, or from and value, but has {names}")
    role = fields["role"] if "role" in fields else ROLES.get(str(fields["from"]).lower())
    content = fields.get("content", fields.get("value"))
    if not isinstance(role, str):
        raise DataError(
            f"{where} is from {literal(fields.get('from', role))}, which is not one of {', '.join(ROLES)}; rename it, "
            "or store messages with role and content"
        )
    calls = _tool_calls(fields.get("tool_calls") or (), where)
    if content is None and not calls:
        raise DataError(f"{where} has no content; leave its row out")
    extras = {key: check_text(str(fields[key]), where) for key in EXTRAS if key in fields}
    text = _content(content, where) if content is not None else ""
    return {"role": check_text(role, where), "content": text, **extras, **({"tool_calls": calls} if calls else {})}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return check_text(content, where)
    if not isinstance(content, list | tuple) or not content:
        raise DataError(f"{where} has {kind_of(content)} as its content, which must be text; leave its row out")
    return LINES.join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    """The text of one part of a content that is a list: {type: text, text}, or a text."""
    if isinstance(part, str):
        return check_text(part, where)
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return check_text(part["text"], where)
    kind = f"a part of type {part['type']}" if isinstance(part, Mapping) and part.get("type") else kind_of(part)
    raise DataError(f"{where} has {kind} in its content, and epmq reads text only; leave its row out")


def _tool_calls(calls: Iterable[Any], where: str) -> list[dict[str, Any]]:
    """Tool calls in the form of chat templates, with arguments as objects; OpenAI stores the arguments as JSON."""
    entries = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where} has a tool call without the name of a function; leave its row out")
        arguments = function.get("arguments")
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError as error:
            raise DataError(
                f"{where} has a tool call whose arguments are not JSON ({error}); leave its row out"
            ) from error
        entries.append(
            {"type": "function", "function": {"name": function["name"], "arguments": _filled(arguments or {})}}
        )
    return entries


def _filled(value: Any) -> Any:
    """The value without the null fields that parquet adds to objects."""
    if isinstance(value, Mapping):
        return {key: _filled(each) for key, each in value.items() if each is not None}
    return [_filled(each) for each in value] if isinstance(value, list | tuple) else value
