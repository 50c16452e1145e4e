"""The Python code of a model card: how each engine loads the checkpoint, and how the head of a task is attached."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from epmq_cli.checkpoint.engine import Engine
from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.checkpoint.gguf.exporter import NAME as GGUF
from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.structure import MEAN, FirstAndMean
from epmq_cli.families.tasks.classifier import Classifier
from epmq_cli.families.tasks.embedding import Embedding
from epmq_cli.quantize.formats.format import NumberFormat

if TYPE_CHECKING:
    from torch import nn

FOLDER = "path/of/this/folder"
"""The folder in all code."""
SENTENCES_CODE = f"""from sentence_transformers import SentenceTransformer

folder = "{FOLDER}"  # or huggingface_hub.snapshot_download("owner/name")
model = SentenceTransformer(folder)
embeddings = model.encode(["a text", "another text"])
print(model.similarity(embeddings, embeddings))"""
INT4 = (2, 3, 4)
"""The bits of integers that stay packed in `epmq_cli.load`."""


def transformers_code(
    family: Family, model: nn.Module, formats: Sequence[NumberFormat], exporter: Exporter, own: bool = False
) -> str:
    """Loads the model and its tokenizer or image processor, and reads one sample; a model without heads of tasks writes
    a text. `own`: whether epmq loads the model, not transformers."""
    if isinstance(family.tasks, Embedding):
        return SENTENCES_CODE
    name, pictures = type(model).__name__, family.reads == "pictures"
    if family.reads == "sounds":
        return _transcribing_code(name, exporter)
    options = family.architecture.options if isinstance(family.architecture, Encoder) else {}
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    reader = "AutoImageProcessor" if pictures else "AutoTokenizer"
    packages = f"  # needs: pip install {' '.join(exporter.requires)}" if exporter.requires else ""
    lines = [
        *(["from PIL import Image"] if pictures else []),
        *(["import epmq_cli"] if own else []),
        f"from transformers import {reader if own else ', '.join(sorted((reader, name)))}{packages}",
        "",
        f'folder = "{FOLDER}"  # or huggingface_hub.snapshot_download("owner/name")',
        "model = epmq_cli.load(folder)" if own else f"model = {name}.from_pretrained(folder{given})",
    ]
    if name in ("CLIPModel", "SiglipModel") and len(formats) > 1 and exporter.packs:
        lines.append("model.hf_quantizer.compressor.decompress_model(model)")
    if pictures:
        lines += [
            "processor = AutoImageProcessor.from_pretrained(folder)",
            'image = Image.open("picture.png").convert("RGB")',
            'inputs = processor(images=image, return_tensors="pt").to(model.dtype)',
        ]
    else:
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            'inputs = tokenizer("a text", return_tensors="pt")',
        ]
    if family.vocabulary:
        lines += ["tokens = model.generate(inputs.input_ids, max_new_tokens=20)", "print(tokenizer.decode(tokens[0]))"]
    return "\n".join(lines)


def _transcribing_code(name: str, exporter: Exporter) -> str:
    """Loads a model that writes what it hears, and its two processors, and transcribes a sound."""
    packages = f"  # needs: pip install {' '.join(exporter.requires)}" if exporter.requires else ""
    lines = [
        "import numpy",
        f"from transformers import AutoFeatureExtractor, AutoTokenizer, {name}{packages}",
        "",
        f'folder = "{FOLDER}"  # or huggingface_hub.snapshot_download("owner/name")',
        f"model = {name}.from_pretrained(folder)",
        "extractor = AutoFeatureExtractor.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'sound = numpy.zeros(extractor.sampling_rate, "float32")  # one second of silence; give it yours, mono',
        'inputs = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")',
        "tokens = model.generate(inputs.input_features.to(model.dtype))",
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def head_code(family: Family, model: nn.Module, task: str) -> str:
    """Attaches the head of a task to the outputs of the model in `transformers_code`: logits (samples, classes)."""
    activation = ["from transformers.activations import ACT2FN"] if _named_activation(family) else []
    features = list(_features(family, model))
    lines = [
        *(["import torch"] if any("torch." in line for line in features) else []),
        "from safetensors.torch import load_file",
        "from torch.nn import functional as F",
        *activation,
        "",
        'heads = load_file(f"{folder}/heads/heads.safetensors")',
        *features,
        *_logits(family, task),
    ]
    return "\n".join(lines)


def _features(family: Family, model: nn.Module) -> Iterator[str]:
    """What the head reads of the model's outputs: features (samples, width)."""
    architecture = family.architecture
    if not isinstance(architecture, Encoder):
        yield "features = model.get_image_features(**inputs).pooler_output.float()"
        return
    token = architecture.read_token(model)
    if architecture.reads_pooler:
        yield "features = model(**inputs).pooler_output.float()"
    elif token == MEAN:
        yield 'mask = inputs["attention_mask"][..., None]'
        yield "features = (model(**inputs).last_hidden_state.float() * mask).sum(1) / mask.sum(1)"
    elif isinstance(token, FirstAndMean):
        yield "hidden = model(**inputs).last_hidden_state.float()"
        yield f"features = torch.cat([hidden[:, 0], hidden[:, {token.start}:].mean(1)], -1)"
    else:
        yield f"features = model(**inputs).last_hidden_state[:, {token}].float()"


def _logits(family: Family, task: str) -> Iterator[str]:
    """The layers of the head."""
    if not isinstance(family.tasks, Classifier):
        yield f"logits = 100 * F.normalize(features, dim=-1) @ heads[{_literal(f'{task}.weight')}].T"
        return
    head = family.tasks.modules
    if head.dense is not None:
        name = head.activation if isinstance(head.activation, str) else None
        activation = f"ACT2FN[model.config.{name}]" if name else _own(head.activation)
        yield f"features = {activation}({_linear(f'{task}.dense_')})"
    if head.norm is not None:
        parts = f"heads[{_literal(f'{task}.norm_weight')}], heads.get({_literal(f'{task}.norm_bias')})"
        yield f"features = F.layer_norm(features, features.shape[-1:], {parts}, model.config.{head.eps})"
    yield f"logits = {_linear(f'{task}.')}"


def _linear(prefix: str) -> str:
    return f"F.linear(features, heads[{_literal(f'{prefix}weight')}], heads.get({_literal(f'{prefix}bias')}))"


def _named_activation(family: Family) -> bool:
    head = family.tasks.modules if isinstance(family.tasks, Classifier) else None
    return head is not None and head.dense is not None and isinstance(head.activation, str)


def _own(activation: object) -> str:
    """A function of torch by its name in torch.nn.functional."""
    return f"F.{getattr(activation, '__name__', '')}"


def _literal(text: str) -> str:
    """The text as Python code on one line that a page cannot take for HTML."""
    quoted = repr(text).replace("<", "\\x3c").replace("`", "\\x60")
    return f'"{text}"' if re.fullmatch(r"[\w.-]+", text) else quoted


def other_code(formats: Sequence[NumberFormat], exporter: Exporter) -> dict[str, str]:
    """The Python code of further packages that load this checkpoint, by package."""
    code = {}
    bits = {format.bits for format in formats if format.name == f"int{format.bits}"}
    if formats and exporter.packs and bits & {*INT4}:
        code["epmq, with weights that stay packed"] = (
            f'import epmq_cli\n\nmodel = epmq_cli.load("{FOLDER}")  # torch\'s int4 kernels'
        )
    if exporter.open_clip:
        code["open_clip"] = (
            "import open_clip\n\n"
            f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{FOLDER}/open_clip")'
        )
    return code


def shell_commands(engines: Sequence[Engine], family: Family, exporter: Exporter) -> dict[str, str]:
    """The commands of engines that load this checkpoint in a shell, by the names of the engines.

    In `Engine.command`, `{folder}` is the checkpoint, `{runner}` an option for encoders, `{file}` the GGUF file, and
    `{export}` the command that writes it, unless the checkpoint has it.
    """
    inside = exporter.gguf is not None
    parts = {
        "folder": FOLDER,
        "runner": "" if family.vocabulary else " --runner pooling",
        "file": f"{FOLDER}/{GGUF}" if inside else GGUF,
        "export": "" if inside else f"epmq export {FOLDER} {GGUF}\n",
    }
    names: dict[str, list[str]] = {}
    for engine in engines:
        if engine.command:
            names.setdefault(engine.command.format(**parts), []).append(engine.label)
    return {" and ".join(labels): command for command, labels in names.items()}
