"""Whisper (https://arxiv.org/abs/2212.04356) in the form that transformers has.

Base and experts: `WhisperForConditionalGeneration`. The convolutions in front of the encoder stay as merged.
"""

from __future__ import annotations

from epmq_cli.families.encoder_decoder import UNSOLVED, EncoderDecoder
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.spoken_text import SpokenText

WHISPER = Family(
    EncoderDecoder(
        name="whisper",
        model_types=("whisper",),
        loader="AutoModelForSpeechSeq2Seq",
        shared=("encoder_attention_heads", "decoder_attention_heads", "activation_function", "scale_embedding"),
        unsolved=(*UNSOLVED, r"model\.encoder\.conv[12]\.(weight|bias)"),
    ),
    SpokenText(),
)
