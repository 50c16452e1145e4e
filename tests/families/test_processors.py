"""Oracle: the processor files of the models on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertTokenizer, CamembertTokenizer, DebertaV2Tokenizer, T5Tokenizer, XLMRobertaTokenizer
from transformers import CLIPTokenizer as Clip
from transformers import RobertaTokenizer as Roberta

from epmq_cli.errors import ModelError
from epmq_cli.families.processors import check_not_truncated
from epmq_cli.models.processor_files import TOKENIZER, matches


def test_a_checkpoint_contains_the_vocabulary_of_every_tokenizer() -> None:
    kinds = (BertTokenizer, CamembertTokenizer, Clip, DebertaV2Tokenizer, Roberta, T5Tokenizer, XLMRobertaTokenizer)
    for kind in kinds:
        assert all(matches(name, TOKENIZER) for name in kind.vocab_files_names.values()), kind


def test_a_tokenizer_that_drops_text_is_refused_by_name(tmp_path: Path) -> None:
    """Oracle: any tokenizer splits 3000 letters into more than a few tokens; spaces need not give any."""
    check_not_truncated(tmp_path, ["word " * 600], 600)
    check_not_truncated(tmp_path, [" " * 3000, "a"], 1)
    with pytest.raises(ModelError, match="reads 2400 characters of text as 1 token, so most of the text is lost"):
        check_not_truncated(tmp_path, ["word " * 600], 1)
