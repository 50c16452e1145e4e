"""Ways to save a model: the names of tensors, which ones are stored, their types, and the files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.end_to_end.foreign.kinds import Kind, body_of, model, quiet

Tensors = dict[str, Tensor]
Form = Callable[[Kind, Tensors], Tensors]
"""Changes the stored tensors of a model."""

PRETRAINING = {"bert": "BertForPreTraining", "roberta": "RobertaForMaskedLM", "distilbert": "DistilBertForMaskedLM"}
PRETRAINING |= {"deberta": "DebertaV2ForMaskedLM"}


@cache
def saved(kind: Kind, which: str, role: str, store: Path) -> Path:
    """The folder that save_pretrained writes for a model in a role; written once to `store`.

    Roles: "whole", the model with its head; "body", the encoder or tower alone; "pretraining", the encoder with the
    head that it was trained with, which is tied to the table.
    """
    folder = store / f"{kind.name}-{which}-{role}"
    whole = model(kind.name, which)
    with quiet():
        made = whole if role == "whole" else body_of(kind, whole) if role == "body" else _pretraining(kind, whole)
        made.save_pretrained(folder)
    if kind.name == "t5v1.1":  # transformers 5 writes true
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def _pretraining(kind: Kind, whole: object) -> object:
    import transformers

    torch.manual_seed(5)
    made = getattr(transformers, PRETRAINING[kind.name])(body_of(kind, whole).config).eval()
    body_of(kind, made).load_state_dict(body_of(kind, whole).state_dict(), strict=False)
    made.tie_weights()
    return made


def copies(kind: Kind, tensors: Tensors) -> dict[str, str]:
    """The tied tensors of this kind: copy -> source, by their names in files."""
    if kind.family == "t5":
        names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        return dict.fromkeys(names if kind.tied else names[:2], "shared.weight")
    if kind.is_decoder:
        return {"lm_head.weight": f"{kind.table}.weight"} if kind.tied else {}
    table = f"{kind.body}{kind.table}.weight"
    found = {"cls.predictions.decoder.weight": table} if "cls.predictions.bias" in tensors else {}
    found |= {"lm_head.decoder.weight": table} if "lm_head.dense.weight" in tensors else {}
    return found | ({"vocab_projector.weight": table} if "vocab_projector.bias" in tensors else {})


def plain(kind: Kind, tensors: Tensors) -> Tensors:
    """Unchanged."""
    return tensors


def twice(kind: Kind, tensors: Tensors) -> Tensors:
    """Stores tied tensors under all of their names."""
    return tensors | {copy: tensors[source].clone() for copy, source in copies(kind, tensors).items()}


def copy_only(kind: Kind, tensors: Tensors) -> Tensors:
    """Stores tied tensors under all names except that of the source."""
    sources = set(copies(kind, tensors).values())
    return {name: tensor for name, tensor in twice(kind, tensors).items() if name not in sources}


def live(kind: Kind, tensors: Tensors) -> Tensors:
    """Uses the names of the modules in memory, like torch.save(model.state_dict()), where files have older names."""
    for old, new in LIVE.get(kind.name, ()):
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


LIVE = {
    "vit": (
        (r"encoder\.layer\.(\d+)\.attention\.attention\.query\.", r"layers.\1.attention.q_proj."),
        (r"encoder\.layer\.(\d+)\.attention\.attention\.key\.", r"layers.\1.attention.k_proj."),
        (r"encoder\.layer\.(\d+)\.attention\.attention\.value\.", r"layers.\1.attention.v_proj."),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
        (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
        (r"encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
        (r"encoder\.layer\.", "layers."),
    )
}


def gamma_beta(kind: Kind, tensors: Tensors) -> Tensors:
    """Uses the names of layer norms in the first files of BERT."""
    renamed = (
        (name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"), tensor)
        for name, tensor in tensors.items()
    )
    return dict(renamed)


def bfloat16(kind: Kind, tensors: Tensors) -> Tensors:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def float16(kind: Kind, tensors: Tensors) -> Tensors:
    return {name: tensor.to(torch.float16) for name, tensor in tensors.items()}


def mixed(kind: Kind, tensors: Tensors) -> Tensors:
    """Vectors in float32, the rest in bfloat16."""
    return {name: tensor if tensor.dim() < 2 else tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def buffers(kind: Kind, tensors: Tensors) -> Tensors:
    """Adds buffers that older versions of transformers stored and current ones ignore."""
    extra: Tensors = {}
    if kind.is_decoder and kind.name != "gpt2":
        layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
        extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in layers}
    elif kind.name == "gpt2":
        extra = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 40, 40).tril() for layer in range(2)}
    elif kind.name == "clip":
        extra = {f"{_prefix(kind, tensors)}embeddings.position_ids": torch.arange(5)[None]}
    elif kind.family == "t5":
        name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        extra = {name: torch.zeros(32, 2)}
    elif kind.is_text_classifier:
        extra = {f"{_prefix(kind, tensors)}embeddings.position_ids": torch.arange(40)[None]}
    return tensors | extra


def _prefix(kind: Kind, tensors: Tensors) -> str:
    return kind.body if any(name.startswith(kind.body) for name in tensors) else ""


def compose(*forms: Form) -> Form:
    """Applies the forms in order."""
    return lambda kind, tensors: reduce(lambda found, form: form(kind, found), forms, tensors)


def prefixed(prefix: str) -> Form:
    """Puts a wrapper's prefix before every name."""
    return lambda kind, tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def inside(wrapper: str) -> Form:
    """Puts a wrapper around each layer, like torch.compile and FSDP."""

    def wrapped(kind: Kind, tensors: Tensors) -> Tensors:
        return {
            re.sub(r"(\.|^)((?:layers?|block|h)\.\d+\.)", rf"\1\2{wrapper}", name): t for name, t in tensors.items()
        }

    return wrapped


@dataclass(frozen=True)
class Layout:
    """How tensors are written to files. `write` returns the path that a suite names."""

    write: Callable[[Path, Tensors, Path], Path]


def _folder(place: Path, tensors: Tensors, template: Path) -> Path:
    _beside(place, template)
    save_file(_contiguous(tensors), place / "model.safetensors", metadata={"format": "pt"})
    return place


def _sharded(place: Path, tensors: Tensors, template: Path, suffix: str = "safetensors") -> Path:
    _beside(place, template)
    names, weight_map = list(tensors), {}
    for index, part in enumerate((names[::2], names[1::2]), 1):
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        file = f"{stem}-{index:05}-of-00002.{suffix}"
        shard = _contiguous({name: tensors[name] for name in part})
        if suffix == "safetensors":
            save_file(shard, place / file, metadata={"format": "pt"})
        else:
            torch.save(shard, place / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (place / f"{'model' if suffix == 'safetensors' else 'pytorch_model'}.{suffix}.index.json").write_text(
        json.dumps(index)
    )
    return place


def _sharded_bin(place: Path, tensors: Tensors, template: Path) -> Path:
    return _sharded(place, tensors, template, "bin")


def _bin(place: Path, tensors: Tensors, template: Path) -> Path:
    _beside(place, template)
    torch.save(tensors, place / "pytorch_model.bin")
    return place


def _file(place: Path, tensors: Tensors, template: Path) -> Path:
    path = place.with_suffix(".safetensors")
    save_file(_contiguous(tensors), path)
    return path


def _pickled(key: str | None) -> Callable[[Path, Tensors, Path], Path]:
    def write(place: Path, tensors: Tensors, template: Path) -> Path:
        path = place.with_suffix(".pt")
        torch.save({key: tensors, "epoch": 3} if key else tensors, path)
        return path

    return write


def _beside(place: Path, template: Path) -> None:
    """Copies everything in a folder except its weights."""
    shutil.copytree(template, place, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))


def _contiguous(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


FOLDER, SHARDED, FILE = Layout(_folder), Layout(_sharded), Layout(_file)
PT, STATE_DICT, MODEL, MODULE = (Layout(_pickled(key)) for key in (None, "state_dict", "model", "module"))
BIN, SHARDED_BIN = Layout(_bin), Layout(_sharded_bin)


def read(folder: Path) -> Tensors:
    """All tensors of a safetensors model folder."""
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.name != "heads.safetensors"]
    return {name: tensor for path in files for name, tensor in load_file(path).items()}
