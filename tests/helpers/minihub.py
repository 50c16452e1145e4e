"""Miniature hubs on disk for the families beyond CLIP and BERT: a random base, two experts, and their data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import TASKS, WORDS, drifted, write_pictures, write_suite
from tests.helpers.encoder_decoders import FORMS, encoder_decoder, family_of
from tests.helpers.tiers import only

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
VOCABULARY = [*SPECIAL, *WORDS, "acceptable", "unacceptable", "positive", "negative", "1.0", "2.0"]
IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer(folder: Path, end: bool) -> None:
    """Writes a tokenizer of whole words. Its texts start with <s>, or end with </s>, or both if `end` is None."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = "$A </s>" if end else "<s> $A"
    made.post_processor = processors.TemplateProcessing(
        single, pair=f"{single} $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    PreTrainedTokenizerFast(tokenizer_object=made, **names, padding_side="right").save_pretrained(folder)


def table(path: Path, seed: int, count: int) -> None:
    """Writes random texts with labels 0, 1 and 2."""
    generator = np.random.default_rng(seed)
    rows = [f"{i % 3}\t{' '.join(generator.choice(WORDS, generator.integers(1, 9)))}" for i in range(count)]
    path.write_text("\n".join(["label\ttext", *rows]) + "\n")


def models(folder: Path, base: nn.Module, save_base: Callable[[Path], None] | None = None) -> None:
    """Writes the folders base, first and second."""
    (save_base or base.save_pretrained)(folder / "base")  # type: ignore[operator]
    for seed, task in enumerate(TASKS):
        drifted(base, seed).save_pretrained(folder / task)  # type: ignore[operator]


def texts(folder: Path, **fields: Any) -> dict[str, Any]:
    """Writes tables for both tasks; returns their suite entries."""
    entries = {}
    for seed, task in enumerate(TASKS):
        paths = {split: folder / f"{task}_{split}.tsv" for split in ("train", "test")}
        for number, path in enumerate(paths.values()):
            table(path, 2 * seed + number, 30)
        data = {"_target_": "epmq_cli.data.table.Table", **{split: str(path) for split, path in paths.items()}}
        entries[task] = {"expert": str(folder / task), "max_length": 16, "data": data, **fields}
    return entries


def modernbert(pooling: str) -> Any:
    """A ModernBERT classifier with one block of global attention and one with a window of 5 tokens."""
    import transformers as t

    ids = {**IDS, "cls_token_id": 1, "sep_token_id": 2}
    sizes = {**SIZE, **ids, "num_labels": 3, "max_position_embeddings": 40, "local_attention": 4}
    return t.ModernBertForSequenceClassification(t.ModernBertConfig(**sizes, classifier_pooling=pooling))


SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
SWIN |= {"window_size": 4, "mlp_ratio": 2, "num_labels": 3}
"""Two stages: four windows, in the second block moved by half of one, and one window."""
ELECTRA: dict[str, Any] = {**SIZE, **IDS, "num_labels": 3, "max_position_embeddings": 40}


def encoder_models(kind: str) -> Any:
    """A text classifier: one of ENCODERS."""
    import transformers as t

    made: dict[str, Callable[[], Any]] = {
        "roberta": lambda: t.RobertaForSequenceClassification(
            t.RobertaConfig(**SIZE, **IDS, num_labels=3, max_position_embeddings=40)
        ),
        "deberta": lambda: t.DebertaV2ForSequenceClassification(
            t.DebertaV2Config(
                **SIZE,
                **IDS,
                num_labels=3,
                max_position_embeddings=40,
                relative_attention=True,
                type_vocab_size=0,
                position_buckets=8,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                position_biased_input=False,
                pooler_hidden_size=32,
                pooler_hidden_act="gelu",
            )
        ),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(
                dim=32,
                hidden_dim=64,
                n_layers=2,
                n_heads=4,
                vocab_size=len(VOCABULARY),
                num_labels=3,
                max_position_embeddings=40,
            )
        ),
        "electra": lambda: t.ElectraForSequenceClassification(t.ElectraConfig(**ELECTRA, embedding_size=32)),
        "electra-small": lambda: t.ElectraForSequenceClassification(t.ElectraConfig(**ELECTRA, embedding_size=16)),
        "modernbert": lambda: modernbert("mean"),
        "modernbert-cls": lambda: modernbert("cls"),
        "mpnet": lambda: t.MPNetForSequenceClassification(
            t.MPNetConfig(**SIZE, **IDS, num_labels=3, max_position_embeddings=40)
        ),
    }
    torch.manual_seed(0)
    return made[kind]().eval()


def encoder_hub(folder: Path, kind: str) -> Path:
    """Text classifiers: one of ENCODERS."""
    models(folder, encoder_models(kind))
    tokenizer(folder / "base", end=False)
    write_suite(folder, {"family": kind.partition("-")[0], "base": str(folder / "base"), "tasks": texts(folder)})
    return folder


def vit_hub(folder: Path, kind: str = "vit") -> Path:
    """Image classifiers: one of IMAGES. Layer scales are far from 1, and differ between experts."""
    import transformers as t

    torch.manual_seed(0)
    sizes = {**SIZE, "image_size": 16, "patch_size": 8, "num_labels": 3}
    made: dict[str, Callable[[], Any]] = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**sizes)),
        "deit": lambda: t.DeiTForImageClassification(t.DeiTConfig(**sizes)),
        "dinov2": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**{**sizes, "mlp_ratio": 2})),
        "dinov2-registers": lambda: t.Dinov2WithRegistersForImageClassification(
            t.Dinov2WithRegistersConfig(**{**sizes, "mlp_ratio": 2, "num_register_tokens": 2})
        ),
        "swin": lambda: t.SwinForImageClassification(t.SwinConfig(**SWIN)),
        "beit": lambda: t.BeitForImageClassification(t.BeitConfig(**sizes, use_relative_position_bias=True)),
        "beit-cls": lambda: t.BeitForImageClassification(
            t.BeitConfig(
                **sizes,
                use_mean_pooling=False,
                use_shared_relative_position_bias=True,
                use_absolute_position_embeddings=True,
            )
        ),
    }
    base = made[kind]().eval()
    for name, tensor in base.named_parameters():
        if "lambda" in name:
            tensor.data = torch.rand(tensor.shape) + 0.5
    models(folder, base)
    if kind not in ("vit", "deit"):
        _share_stem(folder)
    side = 32 if kind == "swin" else 16
    t.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder / "base")
    generator, entries = np.random.default_rng(0), {}
    for task in TASKS:
        data = write_pictures(folder / f"{task}.npz", generator, 30, 20)
        entries[task] = {"expert": str(folder / task), "data": data}
    write_suite(folder, {"family": kind.partition("-")[0], "base": str(folder / "base"), "tasks": entries})
    return folder


def _share_stem(folder: Path) -> None:
    """Gives the experts the base's tensors in front of the blocks and its biases of positions, which no step solves."""
    from safetensors.torch import load_file, save_file

    base = load_file(folder / "base" / "model.safetensors")
    for task in TASKS:
        path = folder / task / "model.safetensors"
        own = load_file(path)
        shared = {name for name in own if "embeddings" in name or "relative_position" in name}
        save_file({name: base[name] if name in shared else own[name] for name in own}, path, {"format": "pt"})


def t5_models(tied: bool = False, gated: bool = True) -> Any:
    """A T5 with a separate output layer, as in FLAN-T5, or a tied one."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    kind = "gated-gelu" if gated else "relu"
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": kind}
    ids = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(**sizes, **ids, tie_word_embeddings=tied)).eval()
    if not tied:
        base.lm_head.weight = nn.Parameter(torch.randn(len(VOCABULARY), 32))
    return base


def t5_hub(folder: Path, tied: bool = False, gated: bool = True) -> Path:
    """T5 models, a tokenizer, texts and answers."""
    models(folder, t5_models(tied, gated))
    for name in ("base", *TASKS):  # as in the files of FLAN-T5; transformers 5 writes true
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": tied}))
    return answering_hub(folder, "t5")


def answering_hub(folder: Path, family: str) -> Path:
    """A tokenizer, texts and answers beside the models of a folder."""
    tokenizer(folder / "base", end=True)
    entries = texts(folder, classes=["acceptable", "unacceptable", "positive"])
    write_suite(folder, {"family": family, "base": str(folder / "base"), "tasks": entries})
    return folder


def encoder_decoder_hub(folder: Path, kind: str) -> Path:
    """Encoder-decoders other than T5: one of FORMS."""
    models(folder, encoder_decoder(kind, len(VOCABULARY)))
    return answering_hub(folder, family_of(kind))


def decoder_hub(folder: Path, kind: str) -> Path:
    """Language models: llama, qwen3, gemma3 (sliding windows, tied) or phi3 (fused projections)."""
    import transformers as t

    sizes = {**SIZE, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**sizes)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**sizes, head_dim=16)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**sizes, sliding_window=4)),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(
                **sizes, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
            )
        ),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**sizes)),
    }
    torch.manual_seed(0)
    return decoder_files(folder, made[kind]().eval())


def decoder_files(folder: Path, base: Any) -> Path:
    """Writes language models based on `base`, their tokenizer, documents and suite."""
    models(folder, base)
    tokenizer(folder / "base", end=False)
    generator, entries = np.random.default_rng(0), {}
    for task in TASKS:
        for split, count in (("train", 40), ("test", 12)):
            documents = [" ".join(generator.choice(WORDS, generator.integers(3, 30))) for _ in range(count)]
            lines = "\n".join(json.dumps({"text": text}) for text in documents)
            (folder / f"{task}_{split}.jsonl").write_text(lines + "\n")
        data = {"_target_": "epmq_cli.data.documents.Documents"}
        data |= {split: str(folder / f"{task}_{split}.jsonl") for split in ("train", "test")}
        entries[task] = {"expert": str(folder / task), "data": data, "metric": "perplexity", "max_length": 12}
    write_suite(folder, {"family": "causal_lm", "base": str(folder / "base"), "tasks": entries})
    return folder


ENCODERS = ("roberta", "deberta", "distilbert", "electra", "electra-small", "modernbert", "modernbert-cls", "mpnet")
DECODERS = ("llama", "qwen3", "mistral", "gemma3", "phi3")
T5S = ("t5", "t5-tied", "t5-relu")
IMAGES = ("vit", "deit", "dinov2", "dinov2-registers", "beit", "beit-cls", "swin")
ANSWERING = (*T5S, "bart", "mbart", "marian", "whisper")
"""Encoder-decoders; their other model types are in tests/families/test_encoder_decoder.py."""
KINDS = (*ENCODERS, *IMAGES, *ANSWERING, *DECODERS)
TIERED = only(("deberta", "vit", "dinov2", "t5", "llama"), KINDS)
"""KINDS for `parametrize`; those that are similar to another kind are slow."""
Hub = Callable[[str], Path]
"""The miniature hub of a kind of model."""


def build(folder: Path, kind: str) -> Path:
    """Writes the miniature hub of one of KINDS, of FORMS, or of Whisper."""
    if kind in ENCODERS:
        return encoder_hub(folder, kind)
    if kind in DECODERS:
        return decoder_hub(folder, kind)
    if kind in IMAGES:
        return vit_hub(folder, kind)
    if kind in FORMS:
        return encoder_decoder_hub(folder, kind)
    if kind == "whisper":
        from tests.helpers.spoken import whisper_hub  # which imports this module

        return whisper_hub(folder)
    assert kind.startswith("t5"), kind
    return t5_hub(folder, tied="tied" in kind, gated="relu" not in kind)


def hub_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> Path:
    """The miniature hub of one of KINDS, or of clip or bert, whose hubs are fixtures."""
    hub: Path = request.getfixturevalue(f"{kind}_hub") if kind in ("clip", "bert") else build(folder, kind)
    return hub
