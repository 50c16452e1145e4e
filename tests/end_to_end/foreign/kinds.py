"""The families' models, tiny and random: a base and its fine-tuned experts, made once per process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 32  # a few more than the words of the vocabulary
SIZE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS: dict[str, Any] = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXTS: dict[str, Any] = {**SIZE, **IDS, "max_position_embeddings": 40}
PICTURES: dict[str, Any] = {**SIZE, "image_size": 16, "patch_size": 8}
DECODER: dict[str, Any] = {**TEXTS, "num_key_value_heads": 1, "head_dim": 8}
T5_SIZE: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
CLASSES = 3
SPREAD = 0.3  # standard deviation of matrices


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    `family`: its name in a suite. `make`: creates a whole model with its head, from classes of transformers. `body`:
    the prefix of the merged part's names; empty for the whole model. `trained`: the modules that adapters train.
    `table`: the module of the embeddings. `head`: the modules of its head. `task_type`: the task type in PEFT.
    """

    name: str
    family: str
    make: Callable[[], Any]
    body: str = ""
    trained: tuple[str, ...] = ()
    table: str = ""
    head: tuple[str, ...] = ()
    task_type: str | None = None
    tied: bool = False

    @property
    def is_decoder(self) -> bool:
        """Whether it is a language model."""
        return self.family == "causal_lm"

    @property
    def is_text_classifier(self) -> bool:
        """Whether it is an encoder of texts with a head."""
        return self.task_type == "SEQ_CLS" and self.name != "vit"

    @property
    def has_labels(self) -> bool:
        """Whether its experts have their own classifiers."""
        return self.task_type == "SEQ_CLS"


def _text(model: str, config: str, **options: Any) -> Callable[[], Any]:
    return lambda: _made(model, config, **{**TEXTS, "num_labels": CLASSES, **options})


def _decoder(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: _made(f"{name}ForCausalLM", f"{name}Config", **{**DECODER, **options})


def _made(model: str, config: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def _distilbert() -> Any:
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40}
    return _made(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=TOKENS,
        pad_token_id=0,
        num_labels=CLASSES,
        **sizes,
    )


def _clip() -> Any:
    return _made(
        "CLIPModel", "CLIPConfig", text_config={**TEXTS, "eos_token_id": 2}, vision_config=PICTURES, projection_dim=16
    )


def _t5(tied: bool) -> Callable[[], Any]:
    def make() -> Any:
        ids = {"vocab_size": TOKENS, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
        form = "relu" if tied else "gated-gelu"
        model = _made("T5ForConditionalGeneration", "T5Config", **T5_SIZE, **ids, feed_forward_proj=form)
        if not tied:  # as in T5 1.1 and FLAN-T5, by their config.json
            model.lm_head.weight = nn.Parameter(torch.randn(TOKENS, 16))
            model.config.tie_word_embeddings = False
        return model

    return make


DEBERTA = {
    "relative_attention": True,
    "type_vocab_size": 0,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "pooler_hidden_size": 16,
    "pooler_hidden_act": "gelu",
}
QV, FUSED = ("q_proj", "v_proj"), ("qkv_proj", "o_proj")


def _causal(name: str, make: Callable[[], Any], tied: bool = False, trained: tuple[str, ...] = QV) -> Kind:
    table = "transformer.wte" if name == "gpt2" else "model.embed_tokens"
    return Kind(name, "causal_lm", make, "", trained, table, ("lm_head",), "CAUSAL_LM", tied)


def _classifier(
    name: str, make: Callable[[], Any], trained: tuple[str, ...], head: tuple[str, ...], table: str = ""
) -> Kind:
    return Kind(name, name, make, f"{name}.", trained, table, head, "SEQ_CLS")


WORDS = "embeddings.word_embeddings"
KINDS = {
    kind.name: kind
    for kind in (
        _classifier(
            "bert", _text("BertForSequenceClassification", "BertConfig"), ("query", "value"), ("classifier",), WORDS
        ),
        _classifier(
            "roberta",
            _text("RobertaForSequenceClassification", "RobertaConfig"),
            ("query", "value"),
            ("classifier",),
            WORDS,
        ),
        _classifier("distilbert", _distilbert, ("q_lin", "v_lin"), ("pre_classifier", "classifier"), WORDS),
        _classifier(
            "deberta",
            _text("DebertaV2ForSequenceClassification", "DebertaV2Config", **DEBERTA),
            ("query_proj", "value_proj"),
            ("pooler", "classifier"),
            WORDS,
        ),
        Kind(
            "modernbert",
            "modernbert",
            _text(
                "ModernBertForSequenceClassification", "ModernBertConfig", classifier_pooling="mean", local_attention=4
            ),
            "model.",
            ("Wqkv",),
            "embeddings.tok_embeddings",
            ("head", "classifier"),
            "SEQ_CLS",
        ),
        _classifier(
            "vit",
            lambda: _made("ViTForImageClassification", "ViTConfig", **PICTURES, num_labels=CLASSES),
            ("q_proj", "v_proj"),
            ("classifier",),
        ),
        Kind("clip", "clip", _clip, "vision_model.", ("q_proj", "v_proj")),
        Kind("t5", "t5", _t5(True), "", ("q", "v"), "shared", ("lm_head",), "SEQ_2_SEQ_LM", tied=True),
        Kind("t5v1.1", "t5", _t5(False), "", ("q", "v"), "shared", ("lm_head",), "SEQ_2_SEQ_LM"),
        _causal("llama", _decoder("Llama")),
        _causal("llama-tied", _decoder("Llama", tie_word_embeddings=True), tied=True),
        _causal("qwen2", _decoder("Qwen2")),
        _causal("qwen3-tied", _decoder("Qwen3", tie_word_embeddings=True), tied=True),
        _causal("gemma", _decoder("Gemma"), tied=True),  # tied by the class, not by the config
        _causal("phi3", _decoder("Phi3"), trained=FUSED),
        _causal("smollm3", _decoder("SmolLM3"), tied=True),
        _causal(
            "gpt2",
            lambda: _made("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, n_positions=40, **IDS),
            tied=True,
            trained=("c_attn",),
        ),
    )
}
"""By name; gpt2 is a decoder whose files hold weights of linears as (in, out)."""


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the warnings and progress bars of the libraries that create and load the users' models."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


@cache
def model(kind: str, which: str) -> Any:
    """The base, or the expert "a" or "b" of a kind; must not be changed. Biases and norms differ from their usual
    values, so that swapped tensors are detected."""
    if which == "base":
        torch.manual_seed(0)
        with quiet():
            return with_noise(_spread_weights(KINDS[kind].make()), 7, 0.02)
    return with_noise(model(kind, "base"), {"a": 1, "b": 2}[which], 0.1)


@torch.no_grad()
def _spread_weights(made: Any) -> Any:
    """The same model with larger weights, so that its outputs depend on its inputs."""
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.mul_(SPREAD / parameter.std())
    return made


def with_noise(made: Any, seed: int, size: float) -> Any:
    """A copy with noise on every parameter, relative to the parameter's spread, with a lower bound."""
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in copied.parameters():
            spread = parameter.std(correction=0).clamp(min=0.05)
            parameter.add_(size * spread * torch.randn(parameter.shape, generator=generator))
    return copied.eval()


def part(kind: Kind, whole: Any) -> dict[str, Tensor]:
    """The parameters of the merged part of a whole model, by their names in the model of `loaded`; tied ones under
    each of their names."""
    names = dict(whole.named_parameters(remove_duplicate=False))
    return {
        name.removeprefix(kind.body): tensor.detach() for name, tensor in names.items() if name.startswith(kind.body)
    }


def inputs(kind: Kind) -> dict[str, Tensor]:
    """Inputs for the models of a kind."""
    generator = torch.Generator().manual_seed(3)
    if kind.name in ("vit", "clip"):
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}
    ids = torch.randint(5, TOKENS, (4, 9), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if kind.family == "t5" else {})}


@torch.inference_mode()
def outputs(kind: Kind, body: Any) -> Tensor:
    """The logits of a language model, or the last hidden state of an encoder or a tower."""
    found = body(**inputs(kind))
    result: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return result.float()


def body_of(kind: Kind, whole: Any) -> Any:
    """The merged part of a whole model, as a module."""
    return getattr(whole, kind.body.rstrip(".")) if kind.body else whole
