"""BART (https://arxiv.org/abs/1910.13461) and the encoder-decoders that are built like it, in the form that
transformers has: PLBART and Blenderbot small have their norms behind attention and feed-forward as BART does, Marian
too; mBART, Pegasus, M2M-100, NLLB and Blenderbot have them in front.

Base and experts: `BartForConditionalGeneration` and the like. Learned positions are calibrated as tables.
"""

from __future__ import annotations

from epmq_cli.families.encoder_decoder import EncoderDecoder
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.generated_text import GeneratedText

BART = Family(
    EncoderDecoder(
        name="bart",
        model_types=(*("bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "pegasus", "plbart"),),
        shared=(
            "model_type",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "activation_function",
            "scale_embedding",
        ),
    ),
    GeneratedText(),
)
