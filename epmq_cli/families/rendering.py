"""Conversations as text, by a tokenizer's chat template (https://huggingface.co/docs/transformers/chat_templating)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.chats import Chat
from epmq_cli.errors import DataError, ModelError, first_line, lacks_memory
from epmq_cli.families.processors import own_tokenizer, tokens
from epmq_cli.models.processor_folder import Processor, processor_files
from epmq_cli.runtime.console import log

if TYPE_CHECKING:
    from torch import Tensor

DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%H": "12"}
"""The date for templates that write one, so that a run gives the same bytes every day: the default of Llama's
template."""
CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{part}', '{value}')" for part, value in DATE.items())
    + " }}{% endmacro %}\n"
)
AS_RENDERED = {"add_special_tokens": False, "verbose": False}  # the chat template writes special tokens itself
WORDS = "Lorem ipsum"  # a user's words, to find the place of the first ones in a template
ANSWER = "Dolor sit"  # an answer to them
ASSISTANT = "assistant"
THOUGHT = "</think>"  # templates drop the text of earlier answers in front of it


def chat_ids(
    folder: Path, chats: Sequence[Chat], processor: Processor | None = None, answers: bool = False
) -> list[Tensor]:
    """The token ids (tokens,) of each conversation by the chat template of `processor`, or of `folder` if that has
    none; both as for TaskAdapter.collate. `answers`: (tokens, 2), with 1 beside the tokens of the assistant's words and
    the token behind them, which ends an answer, and 0 beside others."""
    encode = tokens(folder, processor=processor)
    processor, tokenizer = _templated(folder, processor)
    texts = rendered(tokenizer, processor.folder if processor else folder, chats)
    if not answers:
        return [encode(text, **AS_RENDERED)["input_ids"][0] for text in texts]
    found = []
    for chat, text in zip(chats, texts, strict=True):
        encoding = encode(text, return_offsets_mapping=True, **AS_RENDERED)
        marks = _answered(text, chat, encoding["offset_mapping"][0])
        found.append(torch.stack([encoding["input_ids"][0], marks.long()], 1))
    return found


def asked_ids(folder: Path, chats: Sequence[Chat], processor: Processor | None = None) -> list[Tensor]:
    """The token ids (tokens,) of each conversation with the start of an answer behind it, as inference servers give
    them to a model; `folder` and `processor` as for `chat_ids`."""
    encode = tokens(folder, processor=processor)
    processor, tokenizer = _templated(folder, processor)
    texts = rendered(tokenizer, processor.folder if processor else folder, chats, asked=True)
    return [encode(text, **AS_RENDERED)["input_ids"][0] for text in texts]


def answer_ends(folder: Path, processor: Processor | None = None) -> set[int]:
    """The token ids that end an answer: the end token of texts, and the special token that the chat template writes
    behind an answer; both as for `chat_ids`."""
    tokenizer = own_tokenizer(folder, processor)
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if getattr(_templated(folder, processor)[1], "chat_template", None):
        chat = Chat([{"role": "user", "content": WORDS}, {"role": ASSISTANT, "content": ANSWER}], str(folder))
        [ids] = chat_ids(folder, [chat], processor, answers=True)
        last = ids[ids[:, 1] == 1, 0][-1:].tolist()
        ends |= {number for number in last if number in tokenizer.all_special_ids}
    return ends


def _templated(folder: Path, processor: Processor | None) -> tuple[Processor | None, Any]:
    """The processor and its tokenizer; None and the tokenizer of the folder where only that has a chat template."""
    tokenizer = own_tokenizer(folder, processor)
    if processor and not tokenizer.chat_template and processor_files(folder, "texts"):
        return None, own_tokenizer(folder)
    return processor, tokenizer


def _answered(text: str, chat: Chat, offsets: Tensor) -> Tensor:
    """Which tokens (tokens,) are the assistant's. `offsets`: their first characters in the text and those behind them,
    (tokens, 2)."""
    marks, place = torch.zeros(len(offsets), dtype=torch.bool), 0
    starts, ends = offsets.T
    for message in chat.messages:
        words = message["content"].rpartition(THOUGHT)[2].strip()
        start = text.find(words, place)
        if start < 0:
            continue
        place = start + len(words)
        if message["role"] == ASSISTANT and words:
            own = (starts < place) & (ends > start)
            marks |= own
            if own.any() and (behind := int(own.nonzero()[-1]) + 1) < len(marks):
                marks[behind] = True
    return marks


def text_start(folder: Path, processor: Processor | None = None) -> Tensor:
    """The token ids (tokens,) that come in front of a user's first words by the chat template, or the start token of
    texts where there is no template; both as for `chat_ids`. ModelError if there is neither."""
    encode, tokenizer = tokens(folder, processor=processor), own_tokenizer(folder, processor)
    if getattr(tokenizer, "chat_template", None):
        chat = Chat([{"role": "user", "content": WORDS}], str(folder))
        before = rendered(tokenizer, processor.folder if processor else folder, [chat])[0].partition(WORDS)[0]
        ids: Tensor = encode(before, **AS_RENDERED)["input_ids"][0].long()
        if len(ids):
            return ids
    for number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if number is not None:
            return torch.tensor([number])
    raise ModelError(
        f"the tokenizer in {folder} has neither a chat template nor a start token, which calib.source=generate begins "
        "texts with; calibrate on data with calib.source=data"
    )


def rendered(tokenizer: Any, folder: Path, chats: Sequence[Chat], asked: bool = False) -> list[str]:
    """The text of each conversation with the special tokens of the template; DataError if there is no template or it
    refuses a conversation. `folder`: the tokenizer's, for messages. `asked`: whether the start of an answer follows.

    Templates run in the sandbox of transformers. epmq warns if a template leaves out messages, and raises if it leaves
    out tool calls.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{chats[0].where} holds a conversation, and the tokenizer in {folder} has no chat template to write it "
            "with; put a chat_template.jinja there, such as that of the experts, or choose a column of texts"
        )
    texts = [_text(tokenizer, folder, chat, asked) for chat in chats]
    omissions = [(chat, message) for chat, text in zip(chats, texts, strict=True) for message in _lost(chat, text)]
    if omissions:
        chat, message = omissions[0]
        log.warning(
            "the chat template in %s leaves out %d of %d messages, such as one with the role %s of %s",
            folder,
            len(omissions),
            sum(len(chat.messages) for chat in chats),
            message["role"],
            chat.where,
        )
    return texts


def _text(tokenizer: Any, folder: Path, chat: Chat, asked: bool) -> str:
    try:
        template = tokenizer.get_chat_template()
        template = CLOCK + template if "strftime_now" in template else template
        text: str = tokenizer.apply_chat_template(
            list(chat.messages),
            tools=list(chat.tools) or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=asked,
        )
    except Exception as error:  # a template may raise anything
        if lacks_memory(error):
            raise
        raise DataError(
            f"{chat.where}: the chat template in {folder} does not take the conversation ({first_line(error)}); leave "
            "the row out or change it"
        ) from error
    for message in chat.messages:
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise DataError(
                    f"{chat.where} has tool calls, which the chat template in {folder} leaves out; leave the row out, "
                    "or use a template that writes them"
                )
    return text


def _lost(chat: Chat, text: str) -> list[dict[str, Any]]:
    return [message for message in chat.messages if message["content"].rpartition(THOUGHT)[2].strip() not in text]
