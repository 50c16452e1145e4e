"""Oracles: the files that the models on the hub come with."""

from __future__ import annotations

from transformers import BertTokenizer, CamembertTokenizer, DebertaV2Tokenizer, T5Tokenizer, XLMRobertaTokenizer
from transformers import CLIPTokenizer as Clip
from transformers import RobertaTokenizer as Roberta

from epmq_cli.checkpoint.processor_files import TOKENIZER, matches


def test_a_checkpoint_takes_the_vocabulary_of_every_tokenizer_along() -> None:
    kinds = (BertTokenizer, CamembertTokenizer, Clip, DebertaV2Tokenizer, Roberta, T5Tokenizer, XLMRobertaTokenizer)
    for kind in kinds:
        assert all(matches(name, TOKENIZER) for name in kind.vocab_files_names.values()), kind
