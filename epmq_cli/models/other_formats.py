"""Folders without a model in safetensors: what they hold instead, and how to make a model folder of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from epmq_cli.errors import ModelError

CONFIG, ADAPTER, WEIGHTS = "config.json", "adapter_config.json", "*.safetensors*"
STATES = ("optimizer.*", "scheduler.pt", "rng_state*", "training_args.bin", "trainer_state.json", "global_step*")
BESIDE = "*token* *vocab* *merges* *.model *.codes *processor* *template*"
"""What a tokenizer and processors are made of, for the command that converts a model."""
SHOWN = 5  # sub-folders that are named


def refuse_other_formats(folder: Path, role: str) -> None:
    """ModelError where a folder has no config.json or no safetensors: it names what is there, and a way out."""
    if (folder / CONFIG).is_file() and any(folder.glob(WEIGHTS)):
        return
    explanation = next((said for look in _LOOKS if (said := look(folder, role))), None)
    if explanation is None:
        missing = CONFIG if not (folder / CONFIG).is_file() else "*.safetensors"
        explanation = f"has no {missing}; give the folder that save_pretrained of transformers wrote"
    raise ModelError(f"{role}: {folder} {explanation}")


def conversion(folder: Path, options: str = "") -> str:
    """The command that makes a model folder in safetensors of one that transformers reads; `options`: further
    arguments of from_pretrained."""
    code = (
        f"import pathlib, shutil, transformers as t; {_places(folder)}; "
        f't.{_class_of(folder)}.from_pretrained(s, dtype="auto"{options}).save_pretrained(d); '
        f'[shutil.copy(f, d) for p in "{BESIDE}".split() for f in pathlib.Path(s).glob(p)]'
    )
    return f"python -c {shlex.quote(code)}"


def _places(folder: Path) -> str:
    """Code for the source `s` and the destination `d` of a conversion."""
    source = str(folder.resolve())
    return f"s, d = {_literal(source)}, {_literal(f'{source}-safetensors')}"


def _literal(text: str) -> str:
    """A text as Python has it, in double quotes, since the shell has single ones around the code."""
    return json.dumps(text, ensure_ascii=False)


def _class_of(folder: Path) -> str:
    """The class of transformers that config.json names."""
    try:
        names = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError, RecursionError):
        names = None
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and name.isidentifier() else "AutoModel"


def _named(folder: Path, *patterns: str) -> str | None:
    """The first file of one of these names."""
    return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def _models_within(folder: Path, role: str) -> str | None:
    """A trainer's folder, or one of named adapters."""
    inner = sorted(
        (path for path in folder.iterdir() if path.is_dir() and any((path / n).is_file() for n in (CONFIG, ADAPTER))),
        key=lambda path: (len(path.name), path.name),  # checkpoint-500 before checkpoint-1000
    )
    if not inner:
        return None
    names = ", ".join(str(path) for path in inner[:SHOWN])
    more = f" and {len(inner) - SHOWN} more" if len(inner) > SHOWN else ""
    return f"holds no model itself, but folders of models; give one of them: {names}{more}"


def _pickles(folder: Path, role: str) -> str | None:
    name = _named(folder, "pytorch_model.bin.index.json", "pytorch_model*.bin")
    if name is None or not (folder / CONFIG).is_file():
        return None
    alone = name == "pytorch_model.bin" and role.startswith("expert")
    file = f", or give the file {folder / name} itself" if alone else ""
    return f"holds its weights as a pickle ({name}); convert it and give the new folder: {conversion(folder)}{file}"


def _gguf(folder: Path, role: str) -> str | None:
    name = _named(folder, "*.gguf")
    if name is None:
        return None
    code = (
        f"import transformers as t; {_places(folder)}; o = dict(gguf_file={_literal(name)}); "
        "t.AutoModelForCausalLM.from_pretrained(s, **o).save_pretrained(d); "
        "t.AutoTokenizer.from_pretrained(s, **o).save_pretrained(d)"
    )
    return (
        f"holds weights of llama.cpp ({name}), usually quantized; give the model that they were made from, or convert "
        f"them (with pip install gguf): python -c {shlex.quote(code)}"
    )


def _meta(folder: Path, role: str) -> str | None:
    name = _named(folder, "consolidated.*.pth", "consolidated.safetensors")
    if name is None or (folder / CONFIG).is_file():
        return None
    return (
        f"holds weights under their makers' own names ({name}); give the folder of the same model for transformers, "
        "which the hub usually has beside it, or convert it with the script convert_*_weights_to_hf.py of transformers"
    )


def _other_libraries(folder: Path, role: str) -> str | None:
    name = _named(folder, "tf_model*.h5", "flax_model*.msgpack")
    if name is None:
        return None
    option, extra = ("from_tf", "tensorflow") if name.endswith(".h5") else ("from_flax", "flax")
    return (
        f"holds weights of another library alone ({name}), which transformers 5 no longer reads; convert it with "
        f"transformers 4 (pip install 'transformers<5' torch {extra}): {conversion(folder, f', {option}=True')}"
    )


def _onnx(folder: Path, role: str) -> str | None:
    name = _named(folder, "*.onnx", "onnx/*.onnx")
    return name and f"holds an exported graph ({name}), whose weights cannot be merged; give the model it comes from"


def _distributed(folder: Path, role: str) -> str | None:
    if name := _named(folder, "*.distcp", "pytorch_model_fsdp_0/*.distcp", "*/*.distcp"):
        return (
            f"holds parts of a model of several processes ({name}); put them together with accelerate merge-weights "
            f"{shlex.quote(str(folder))} OUT"
        )
    if name := _named(folder, "zero_to_fp32.py", "*zero_pp_rank_*", "global_step*"):
        return (
            f"holds the state of DeepSpeed ({name}) and no model; put it together with python zero_to_fp32.py . OUT "
            "--safe_serialization in that folder, and copy config.json and the tokenizer to OUT"
        )
    return None


def _state(folder: Path, role: str) -> str | None:
    name = _named(folder, *STATES)
    return name and f"holds the state of a trainer ({name}) and no weights; give the folder that has *.safetensors"


_LOOKS: tuple[Callable[[Path, str], str | None], ...] = (
    _pickles,
    _models_within,
    _gguf,
    _meta,
    _other_libraries,
    _onnx,
    _distributed,
    _state,
)
"""What a folder may be, tried in this order; each gives what to say of it, or None."""
