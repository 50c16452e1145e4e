"""The inputs of same_bytes.py: a miniature base, two experts and data for every family, equal on every machine.

The models are those of transformers; their values come from NumPy's generator, which depends on no vector instructions.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import transformers as t
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

TASKS = ("first", "second")
WORDS = ["red", "blue", "green", "a", "photo", "of", "good", "bad", "film", "very", "not", "it", "is"]
CLASSES = ["red", "blue", "green"]
VOCABULARY = ["<pad>", "<s>", "<unk>", "<mask>", *WORDS, "</s>"]
END = len(VOCABULARY) - 1  # the last token, as in CLIP: its output is the text embedding
IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {"image_size": 16, "patch_size": 8}
TEXT = {**SIZE, **IDS, "max_position_embeddings": 40, "num_labels": 3}
DECODER = {**SIZE, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
DEBERTA = {
    "relative_attention": True,
    "type_vocab_size": 0,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "pooler_hidden_size": 32,
    "pooler_hidden_act": "gelu",
}
DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "num_labels": 3, "max_position_embeddings": 40}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
GEMMA = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, **PICTURE},
    "text_cfg": {"context_length": 32, "width": 32, "heads": 2, "layers": 1},
}

BUILD: dict[str, Callable[[], Any]] = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT)),
    "deberta": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**TEXT, **DEBERTA)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(vocab_size=len(VOCABULARY), **DISTILBERT)
    ),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZE, **PICTURE, num_labels=3)),
    "clip": lambda: t.CLIPModel(
        t.CLIPConfig(text_config={**SIZE, **IDS}, vision_config={**SIZE, **PICTURE}, projection_dim=32)
    ),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(**T5, **IDS, decoder_start_token_id=0, tie_word_embeddings=False)
    ),
    "t5_untied": lambda: _untied(t.T5ForConditionalGeneration(t.T5Config(**T5, **IDS, decoder_start_token_id=0))),
    "t5_tied": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, **IDS, decoder_start_token_id=0)),
    "causal_lm": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, head_dim=16)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**DECODER, **GEMMA)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**DECODER)),
    "open_clip": lambda: open_clip.CLIP(**copy.deepcopy(OPEN_CLIP)),
}
"""The model of each kind; every family except clip and open_clip has a kind of the same name."""

KINDS = (*BUILD, "lora")
"""The folders that `inputs` writes; lora contains adapters of the causal_lm base."""


def family(kind: str) -> str:
    """The family of epmq for a kind of model."""
    if kind in ("qwen3", "gemma3", "phi3", "lora"):
        return "causal_lm"
    return "t5" if kind.startswith("t5") else kind


def inputs(folder: Path) -> None:
    """Writes data/ and a folder with base and experts for each of KINDS."""
    folder.mkdir()
    _data(folder / "data")
    for kind in BUILD:
        (folder / kind).mkdir()
        model = _filled(BUILD[kind]().eval(), seed=0)
        if kind == "open_clip":
            _open_clip(folder / kind, model)
        else:
            _transformers(folder / kind, kind, model)
    _adapters(folder / "lora")


def suite(kind: str, targets: dict[str, str]) -> dict[str, Any]:
    """The suite of a kind, whose paths are relative to the folder of the inputs. `targets`: the locations of the
    classes Suite, Npz, Table and Documents."""
    pictures = family(kind) in ("clip", "open_clip", "vit")
    tasks: dict[str, Any] = {}
    for task in TASKS:
        tasks[task] = {"expert": f"{kind}/{task}" + (".pt" if kind == "open_clip" else "")}
        splits = {"train": f"data/{task}_train", "test": f"data/{task}_test"}
        if pictures:
            tasks[task]["data"] = {"_target_": targets["Npz"], "path": f"data/{task}.npz"}
            if kind != "vit":
                tasks[task] |= {"classes": CLASSES, "templates": ["a photo of a {}", "a {}"]}
        elif family(kind) == "causal_lm":
            files = {split: f"{path}.jsonl" for split, path in splits.items()}
            tasks[task]["data"] = {"_target_": targets["Documents"], **files}
            tasks[task] |= {"metric": "perplexity", "max_length": 12}
        else:
            files = {split: f"{path}.tsv" for split, path in splits.items()}
            tasks[task]["data"] = {"_target_": targets["Table"], **files}
            tasks[task] |= {"max_length": 16, **({"classes": CLASSES} if family(kind) == "t5" else {})}
    base = "causal_lm/base" if kind == "lora" else f"{kind}/base"
    return {"_target_": targets["Suite"], "name": kind, "family": family(kind), "base": base, "tasks": tasks}


def _filled(model: nn.Module, seed: int) -> nn.Module:
    """The model with random weights; gains and biases stay near their initial values."""
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.from_numpy(generator.standard_normal(parameter.shape))
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif parameter.ndim == 1:
                constant = bool((parameter == parameter[0]).all())  # else transformers has drawn it at random
                parameter.copy_(parameter.double() * constant + 0.1 * noise)
    return model


def _untied(model: Any) -> Any:
    """The model with a separate output layer, as in FLAN-T5."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def _expert(model: nn.Module, task: str) -> nn.Module:
    """A copy of the model with noise on every parameter, in place of fine-tuning."""
    generator, copied = np.random.default_rng(1 + TASKS.index(task)), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.copy_(parameter.double() + 0.05 * torch.from_numpy(generator.standard_normal(parameter.shape)))
    return copied


def _transformers(folder: Path, kind: str, model: Any) -> None:
    base = model.bert if kind == "bert" else model  # a body without a head; the other bases have one
    base.save_pretrained(folder / "base")
    for task in TASKS:
        _expert(model.vision_model if kind == "clip" else model, task).save_pretrained(folder / task)
    if kind == "vit":
        t.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "base")
        return
    if kind == "clip":
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        t.CLIPImageProcessor(**size).save_pretrained(folder / "base")
    if kind in ("t5", "t5_untied"):  # as in the files of FLAN-T5; transformers 5 writes true
        for name in ("base", *TASKS):
            path = folder / name / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    _tokenizer(folder / "base", "$A </s>" if family(kind) == "t5" else "<s> $A </s>")


def _open_clip(folder: Path, model: Any) -> None:
    (folder / "base").mkdir()
    save_file(model.state_dict(), folder / "base" / "open_clip_model.safetensors")
    (folder / "base" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    for task in TASKS:
        tensors = _expert(model.visual, task).state_dict()
        torch.save({f"model.visual.{name}": tensor for name, tensor in tensors.items()}, folder / f"{task}.pt")


def _adapters(folder: Path) -> None:
    """LoRA adapters of rank 2 on the queries and values of the causal_lm base."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"}
    for task in TASKS:
        generator, tensors = np.random.default_rng(1 + TASKS.index(task)), {}
        for layer in range(2):
            for module, rows in (("q_proj", 32), ("v_proj", 16)):
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                for part, shape in (("lora_A", (2, 32)), ("lora_B", (rows, 2))):
                    tensors[f"{name}.{part}.weight"] = torch.from_numpy(0.2 * generator.standard_normal(shape)).float()
        (folder / task).mkdir(parents=True)
        save_file(tensors, folder / task / "adapter_model.safetensors")
        text = json.dumps({**config, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "base"})
        (folder / task / "adapter_config.json").write_text(text)


def _tokenizer(folder: Path, template: str) -> None:
    """A tokenizer of whole words."""
    rules = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rules.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 1), ("</s>", END)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    t.PreTrainedTokenizerFast(
        tokenizer_object=rules, **names, mask_token="<mask>", padding_side="right"
    ).save_pretrained(folder)


def _data(folder: Path) -> None:
    """Random pictures, labelled texts and documents for each task."""
    folder.mkdir()
    for task in TASKS:
        generator, arrays = np.random.default_rng(TASKS.index(task)), {}
        for split, count in (("train", 40), ("test", 12)):
            arrays[f"{split}_images"] = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
            arrays[f"{split}_labels"] = generator.integers(0, 3, count)
            texts = [" ".join(generator.choice(WORDS, generator.integers(3, 20))) for _ in range(count)]
            rows = [f"{number % 3}\t{text}" for number, text in enumerate(texts)]
            (folder / f"{task}_{split}.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
            (folder / f"{task}_{split}.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
        np.savez(folder / f"{task}.npz", **arrays)
