"""Oracle: the messages and texts that the rows were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.data.chats import Chat
from epmq_cli.data.documents import Documents
from epmq_cli.errors import DataError

ASKED = {"role": "user", "content": "two and two?"}
TOLD = {"role": "assistant", "content": "four"}
SYSTEM = {"role": "system", "content": "be brief"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def load(folder: Path, *rows: dict[str, Any], text: str | None = None) -> list[Any]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Documents(str(path), str(path), text=text)
    source.check_first("train")
    return list(source.load("train").inputs)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASKED, TOLD], "source": "x"}, [ASKED, TOLD]),
        ({"conversations": [{"from": "human", "value": "two and two?"}]}, [ASKED]),
        ({"system": "be brief", "conversations": [{"from": "human", "value": "two and two?"}]}, [SYSTEM, ASKED]),
        ({"prompt": [SYSTEM, ASKED], "completion": [TOLD]}, [SYSTEM, ASKED, TOLD]),
        ({"instruction": "two and two?", "input": "", "output": "four"}, [ASKED, TOLD]),
        ({"instruction": "two and two?", "output": "four", "system": "be brief"}, [SYSTEM, ASKED, TOLD]),
        (
            {"instruction": "two", "input": "two?", "output": "4"},
            [{**ASKED, "content": "two\n\ntwo?"}, {**TOLD, "content": "4"}],
        ),
        ({"instruction": "two and two?", "context": "", "response": "four"}, [ASKED, TOLD]),
    ],
)
def test_the_usual_columns_are_conversations(row: dict[str, Any], messages: list[Any], tmp_path: Path) -> None:
    (chat,) = load(tmp_path, row)
    assert isinstance(chat, Chat)
    assert list(chat.messages) == messages


def test_texts_stay_texts(tmp_path: Path) -> None:
    """A prompt and its completion are joined as in TRL, and a column `text` comes before all others."""
    assert load(tmp_path, {"prompt": "The sky is", "completion": " blue."}) == ["The sky is blue."]
    assert load(tmp_path, {"text": "a", "messages": [ASKED]}) == ["a"]
    assert load(tmp_path, {"text": "a", "prompt": "b"}, text="prompt") == ["b"]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), "", None])
def test_tools_go_with_the_conversation(tools: Any, tmp_path: Path) -> None:
    (chat,) = load(tmp_path, {"messages": [ASKED], "tools": tools})
    assert list(chat.tools) == ([TOOL] if tools else [])


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (
            {"question": "a", "answer": "b"},
            "has the columns question, answer, and epmq knows text; messages; .*; set data.text to",
        ),
        ({"messages": "hello"}, r"row 1: column messages holds a value of type str \(hello\), not a list of messages"),
        ({"messages": [ASKED], "tools": "{"}, "row 1: column tools is not JSON"),
        ({"messages": [ASKED], "tools": "{}"}, "row 1: column tools holds an object"),
        ({"prompt": [ASKED], "completion": "four"}, "row 1: column prompt holds a list"),
        ({"instruction": 3, "output": "four"}, r"row 1: column instruction holds a number \(3\), not text"),
        ({"instruction": "a"}, "has the columns instruction, and epmq knows"),
    ],
)
def test_other_columns_are_refused(row: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=wrong) as raised:
        load(tmp_path, row)
    assert "\n" not in str(raised.value)
