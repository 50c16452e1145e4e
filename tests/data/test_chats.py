"""Oracle: the original messages of a conversation, in both conventions and as read back from parquet."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from epmq_cli.data.chats import Chat
from epmq_cli.data.documents import Documents
from epmq_cli.data.samples import Samples
from epmq_cli.data.table import Table
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.pipeline.keys import hash_samples

MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello\nthere"},
    {"role": "assistant", "content": ""},
]
SHARED = [
    {"from": who, "value": each["content"]} for who, each in zip(("system", "human", "gpt"), MESSAGES, strict=True)
]
PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
    {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]},
    {"role": "assistant", "content": [{"type": "text", "text": ""}]},
]


def load(folder: Path, rows: list[Any], name: str = "a.jsonl") -> list[Chat]:
    path = folder / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"chat": row} for row in rows]), path)
    else:
        path.write_text("".join(json.dumps({"chat": row}) + "\n" for row in rows))
    return list(Documents(str(path), str(path), text="chat").load("train").inputs)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("stored", [MESSAGES, SHARED, PARTS, json.dumps(SHARED), str(SHARED)])
def test_conventions_give_the_same_conversation(stored: list[Any], name: str, tmp_path: Path) -> None:
    shorter = json.dumps(SHARED[:2]) if isinstance(stored, str) else stored[:2]
    chats = load(tmp_path, [stored, shorter], name)
    assert [list(chat.messages) for chat in chats] == [MESSAGES, MESSAGES[:2]]
    assert chats[1].where == f"{tmp_path / name}, row 2"
    assert str(chats[1]) == "be kind\nhello\nthere"
    assert copy.deepcopy(chats[0]).messages == chats[0].messages


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_arguments_of_tool_calls_are_objects(name: str, tmp_path: Path) -> None:
    """OpenAI stores them as JSON text, and parquet fills objects up with null."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    rows = [[*MESSAGES[:2], {"role": "assistant", "content": None, "tool_calls": [call]}], MESSAGES]
    with_call, without = load(tmp_path, rows, name)
    wanted = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert with_call.messages[2] == {"role": "assistant", "content": "", "tool_calls": [wanted]}
    assert list(without.messages) == MESSAGES


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ({"role": "user"}, "message 2 has no content"),
        ({"role": "user", "content": 3}, r"message 2 has a number \(3\) as its content, which must be text"),
        ({"role": "user", "content": {}}, "message 2 has an object with the keys none as its content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "message 2 has a part of type image_url",
        ),
        ({"role": "user", "content": "a\ud800"}, "message 2: the text holds"),
        ({"role": 3, "content": "a"}, "message 2 is from 3, which is not one of human, user"),
        ({"from": "alien", "value": "a"}, "message 2 is from 'alien', which is not one of human, user"),
        (
            {"speaker": "a", "text": "b"},
            "message 2 must have role and content, or from and value, but has speaker, text",
        ),
        ({"role": "assistant", "tool_calls": [{"id": 1}]}, "message 2 has a tool call without the name of a function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "message 2 has a tool call whose arguments are not JSON",
        ),
    ],
)
def test_invalid_messages_are_named(message: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"a.jsonl, row 1, {wrong}") as raised:
        load(tmp_path, [[MESSAGES[0], message]])
    assert "\n" not in str(raised.value)


def test_conversations_and_texts_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2: column chat holds a conversation, and other rows hold texts"):
        load(tmp_path, ["text", MESSAGES])


def test_a_pair_or_a_prompt_takes_no_conversations(tmp_path: Path) -> None:
    load(tmp_path, [MESSAGES])
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="column chat holds a list .*data.prompt takes texts and numbers"):
        Documents(path, path, prompt="{chat}").load("train")
    with pytest.raises(ConfigError, match="data.prompt must have placeholders that are columns"):
        Documents(path, path, prompt="chat")
    (tmp_path / "b.jsonl").write_text(json.dumps({"chat": MESSAGES, "label": 0}))
    with pytest.raises(DataError, match="row 1: column chat holds a list"):
        Table(str(tmp_path / "b.jsonl"), path, text=["chat", "chat"]).load("train")


def test_hashes_of_conversations_depend_on_roles_and_contents(tmp_path: Path) -> None:
    rows = [MESSAGES, [*MESSAGES[:2], {"role": "user", "content": ""}], MESSAGES[:2]]
    chats = load(tmp_path, rows)
    found = {hash_samples(Samples([chat], torch.zeros(1, dtype=torch.int64))) for chat in [*chats, str(chats[0])]}
    assert None not in found
    assert len(found) == 4


def test_messages_written_by_pandas_to_csv_are_refused(tmp_path: Path) -> None:
    """pandas writes the repr of an array of messages; other texts in brackets stay texts."""
    stored = str(np.array(MESSAGES, dtype=object))
    with pytest.raises(
        DataError, match="row 1: column chat holds a text that cannot be read .*; store it as JSON lines"
    ):
        load(tmp_path, [stored])
    plain = ["[{x}] is code", "[{'a': 1}]", "[{1, 2}]", "[{'role': 1}]"]
    assert load(tmp_path, plain) == plain
