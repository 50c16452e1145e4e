"""T5 and FLAN-T5 (https://arxiv.org/abs/2210.11416), mT5 and umT5 in the form that transformers has.

Base and experts: `T5ForConditionalGeneration` and the like. Position biases stay as merged.
"""

from __future__ import annotations

from epmq_cli.families.encoder_decoder import EncoderDecoder
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.generated_text import GeneratedText

T5_FAMILY = Family(
    EncoderDecoder(
        name="t5",
        model_types=("t5", "mt5", "umt5"),
        shared=(
            *("num_heads", "feed_forward_proj", "layer_norm_epsilon", "relative_attention_num_buckets", "d_kv"),
            "scale_decoder_outputs",
        ),
    ),
    GeneratedText(),
)
