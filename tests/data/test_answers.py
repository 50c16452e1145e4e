"""Oracles: marks of one kind weigh nothing against each other."""

from __future__ import annotations

import pytest
import torch

from epmq_cli.data.answers import PROMPTS, TEXTS, check_answers, unmarked
from epmq_cli.data.samples import Samples
from epmq_cli.errors import DataError


def test_marks_of_one_kind_are_left_out() -> None:
    ids = torch.arange(4)
    for marks, kind in (([1, 1, 1, 1], TEXTS), ([0, 0, 0, 0], PROMPTS), ([0, 0, 1, 0], None)):
        sequence = torch.stack([ids, torch.tensor(marks)], 1)
        found, lacks = unmarked(Samples([sequence, sequence[:2]]))
        assert lacks == kind
        assert [each.tolist() for each in found.inputs] == [
            (own if kind is None else own[:, 0]).tolist() for own in (sequence, sequence[:2])
        ]


def test_some_task_must_have_both(caplog: pytest.LogCaptureFixture) -> None:
    check_answers({})
    check_answers({"a": TEXTS, "b": None})
    assert not caplog.text
    check_answers({"a": PROMPTS, "b": None})
    assert "task a calibrates on conversations without an answer of the assistant" in caplog.text
    with pytest.raises(DataError, match="a has texts, not conversations, b has conversations without an answer"):
        check_answers({"a": TEXTS, "b": PROMPTS})
