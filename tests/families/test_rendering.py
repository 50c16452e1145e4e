"""Oracle: transformers' own apply_chat_template, conversation by conversation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from epmq_cli.data.chats import Chat
from epmq_cli.errors import DataError
from epmq_cli.families.inputs import check_inputs
from epmq_cli.families.tasks.language_model import LanguageModel
from tests.helpers.minihub import IDS, SIZE, tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] | trim }} {{ eos_token }}{% endfor %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
USER_ONLY = "{% for m in messages if m['role'] == 'user' %} {{ m['content'] }}{% endfor %}"
DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}{% endif %}"
CHATS = [
    Chat([{"role": "user", "content": " red film "}, {"role": "assistant", "content": "good"}], "row 1"),
    Chat([{"role": "system", "content": "film"}, {"role": "user", "content": "blue"}], "row 2"),
]


def folder(path: Path, template: str | None) -> Path:
    tokenizer(path, end=False)
    LlamaConfig(**SIZE, **IDS).save_pretrained(path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def test_conversations_are_the_tokens_of_the_chat_template(tmp_path: Path) -> None:
    """The tokenizer adds a start token to plain texts, but conversations contain it only once."""
    own = AutoTokenizer.from_pretrained(folder(tmp_path, TEMPLATE))
    wanted = [own.apply_chat_template(list(chat.messages), return_dict=False) for chat in CHATS]
    ids = LanguageModel().tokens(tmp_path, CHATS)
    assert ids.tolist() == [token for each in wanted for token in each]
    assert (ids == own.bos_token_id).sum() == 2


def test_plain_texts_ignore_the_template(tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(folder(tmp_path, TEMPLATE))
    assert LanguageModel().tokens(tmp_path, ["red", "blue"]).tolist() == own("red\n\nblue")["input_ids"]


def test_without_a_template_conversations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 holds a conversation, and the tokenizer in .* has no chat template"):
        LanguageModel().tokens(folder(tmp_path, None), CHATS)


@pytest.mark.parametrize(
    ("template", "reason"),
    [(STRICT, "System role not supported"), ("{{ messages[0].x.y }}", "has no attribute 'x'"), ("{% if", ".+")],
)
def test_errors_of_a_template_are_reported_in_one_sentence(template: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"row \d: the chat template in .* does not take .* \(.*{reason}.*\)"
    ) as raised:
        LanguageModel().tokens(folder(tmp_path, template), CHATS)
    assert "\n" not in str(raised.value)


def test_messages_that_a_template_omits_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "epmq"):
        LanguageModel().tokens(folder(tmp_path, USER_ONLY), CHATS)
    wanted = f"the chat template in {tmp_path} leaves out 2 of 4 messages, such as one with the role assistant of row 1"
    assert caplog.messages == [wanted]


def test_thoughts_that_a_template_omits_cause_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    thinking = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    chat = Chat([{"role": "assistant", "content": "<think>red</think> good"}], "row 1")
    with caplog.at_level(logging.WARNING, "epmq"):
        LanguageModel().tokens(folder(tmp_path, thinking), [chat])
    assert not caplog.messages


def test_tool_calls_are_rendered_or_refused(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "red", "arguments": {}}}
    chat = Chat([{"role": "assistant", "content": "", "tool_calls": [call]}], "row 1")
    with pytest.raises(DataError, match="row 1 has tool calls, which the chat template in .* leaves out"):
        LanguageModel().tokens(folder(tmp_path / "a", TEMPLATE), [chat])
    calls = "{% for c in messages[0].tool_calls %}{{ c.function.name }}{% endfor %}"
    ids = LanguageModel().tokens(folder(tmp_path / "b", calls), [chat])
    assert ids.tolist() == AutoTokenizer.from_pretrained(tmp_path / "b")("red", add_special_tokens=False)["input_ids"]


def test_dates_in_templates_are_fixed(tmp_path: Path) -> None:
    from epmq_cli.families.rendering import rendered

    own = AutoTokenizer.from_pretrained(folder(tmp_path, DATED))
    assert rendered(own, tmp_path, CHATS[:1])[0].startswith("26 Jul 2024 2024-07-26")


@pytest.mark.parametrize(
    ("family", "inputs", "message"),
    [
        ("bert", CHATS, "task t: row 1 holds conversations, and family bert reads texts or pairs of texts; choose"),
        ("t5", CHATS, "task t: row 1 holds conversations, and family t5 reads texts or pairs of texts"),
        ("clip", ["a text"], "task t: its data are texts, and family clip reads images"),
        ("causal_lm", [("a", "pair")], "task t: its data are pairs of texts, and family causal_lm reads texts or conv"),
        ("vit", [torch.zeros(3)], "task t: its data are Tensor, and family vit reads images"),
    ],
)
def test_inputs_of_another_kind_than_the_familys_are_refused(family: str, inputs: list[Any], message: str) -> None:
    from epmq_cli.families import FAMILIES

    with pytest.raises(DataError, match=message):
        check_inputs(FAMILIES[family], "t", inputs)
    check_inputs(FAMILIES["causal_lm"], "t", CHATS)
    check_inputs(FAMILIES[family], "t", [])


def test_the_answers_are_the_words_of_the_assistant_and_the_token_behind_them(tmp_path: Path) -> None:
    said = [
        ("system", "film"),
        ("user", "good red"),
        ("assistant", "good"),
        ("user", "blue"),
        ("assistant", "red film"),
    ]
    chat = Chat([{"role": role, "content": content} for role, content in said], "row 3")
    own = AutoTokenizer.from_pretrained(folder(tmp_path, TEMPLATE))
    found = LanguageModel().each(tmp_path, [chat, *CHATS], answers=True)
    assert [len(ids) for ids in found] == [len(ids) for ids in LanguageModel().each(tmp_path, [chat, *CHATS])]
    answers = [own.convert_ids_to_tokens(ids[ids[:, 1] == 1, 0].tolist()) for ids in found]
    end = own.eos_token
    assert answers == [["good", end, "red", "film", end], ["good", end], []]


def test_plain_texts_are_answers(tmp_path: Path) -> None:
    ids = LanguageModel().tokens(folder(tmp_path, TEMPLATE), ["red", "blue"], answers=True)
    assert ids[:, 1].tolist() == [1] * len(LanguageModel().tokens(tmp_path, ["red", "blue"]))
