"""Tiny random encoder-decoders that answer in text, by model type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {"d_model": 32, "max_position_embeddings": 24}
BART |= {f"{side}_layers": 2 for side in ("encoder", "decoder")}
BART |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
BART |= {f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")}
CLASSES = {
    "bart": ("BartForConditionalGeneration", "BartConfig"),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig"),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig"),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config"),
    "marian": ("MarianMTModel", "MarianConfig"),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig"),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config"),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig"),
    "plbart": ("PLBartForConditionalGeneration", "PLBartConfig"),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config"),
}
"""The classes of transformers of model and config, by model type."""
FORMS: dict[str, tuple[str, Mapping[str, Any]]] = {kind: (kind, {}) for kind in CLASSES} | {
    "bart-scaled": ("bart", {"scale_embedding": True}),
    "marian-apart": ("marian", {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}),
}
"""Model type and further settings, by kind."""


def family_of(kind: str) -> str:
    """The family of one of FORMS."""
    return "t5" if FORMS[kind][0].endswith("t5") else "bart"


def encoder_decoder(kind: str, vocabulary: int) -> Any:
    """The model of one of FORMS. Its tokens 0, 1 and 2 are those of padding, start and end."""
    import transformers as t

    name, settings = FORMS[kind]
    model, config = CLASSES[name]
    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    start = 0 if family_of(kind) == "t5" else 2
    sizes = T5 if family_of(kind) == "t5" else BART
    torch.manual_seed(0)
    made = getattr(t, model)(getattr(t, config)(**{**sizes, **ids, "decoder_start_token_id": start, **settings}))
    build: Callable[[], Any] = made.eval
    if hasattr(made, "final_logits_bias"):
        made.final_logits_bias.copy_(torch.randn(made.final_logits_bias.shape))
    return build()


WHISPER: dict[str, Any] = {name: value for name, value in BART.items() if name != "max_position_embeddings"}
WHISPER |= {"num_mel_bins": 8, "max_source_positions": 25, "max_target_positions": 130}
"""One second of sound, with the frames of `extractor`."""


def whisper(vocabulary: int) -> Any:
    """A Whisper whose tokens 0, 1 and 2 are those of padding, start and end."""
    import transformers as t

    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    ids |= {"decoder_start_token_id": 1}
    torch.manual_seed(0)
    config = t.WhisperConfig(**WHISPER, **ids)
    config.suppress_tokens = config.begin_suppress_tokens = None
    return t.WhisperForConditionalGeneration(config).eval()


def extractor() -> Any:
    """The feature extractor of that Whisper."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=320)
