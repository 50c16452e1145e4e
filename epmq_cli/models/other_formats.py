"""Recognizes folders that are not safetensors models and tells how to convert them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from epmq_cli.errors import ModelError

CONFIG, ADAPTER, WEIGHTS = "config.json", "adapter_config.json", "*.safetensors*"
STATES = ("optimizer.*", "scheduler.pt", "rng_state*", "training_args.bin", "trainer_state.json", "global_step*")
BESIDE = "*token* *vocab* *merges* *.model *.codes *processor* *template*"
"""Patterns of tokenizer and processor files, which the conversion command copies."""
SHOWN = 5  # subfolders per message


def refuse_other_formats(folder: Path, role: str) -> None:
    """Raises ModelError if a folder lacks config.json or safetensors files; the message says what to do instead."""
    if (folder / CONFIG).is_file() and any(folder.glob(WEIGHTS)):
        return
    explanation = next((text for look in _LOOKS if (text := look(folder, role))), None)
    if explanation is None:
        missing = CONFIG if not (folder / CONFIG).is_file() else "*.safetensors"
        explanation = f"has no {missing}; give the folder that save_pretrained of transformers wrote"
    raise ModelError(f"{role}: {folder} {explanation}")


def conversion(folder: Path, options: str = "") -> str:
    """The command that converts a folder that transformers reads to a safetensors model folder.

    `options`: further arguments of from_pretrained.
    """
    code = (
        f"import pathlib, shutil, transformers as t; {_places(folder)}; "
        f't.{_class_of(folder)}.from_pretrained(s, dtype="auto"{options}).save_pretrained(d); '
        f'[shutil.copy(f, d) for p in "{BESIDE}".split() for f in pathlib.Path(s).glob(p)]'
    )
    return f"python -c {shlex.quote(code)}"


def _places(folder: Path) -> str:
    """Python code that sets the source `s` and the destination `d` of a conversion."""
    source = str(folder.resolve())
    return f"s, d = {_literal(source)}, {_literal(f'{source}-safetensors')}"


def _literal(text: str) -> str:
    """A Python string literal in double quotes, because the shell puts single quotes around the code."""
    return json.dumps(text, ensure_ascii=False)


def _class_of(folder: Path) -> str:
    """The name of the transformers class in config.json, or "AutoModel"."""
    try:
        names = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError, RecursionError):
        names = None
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and name.isidentifier() else "AutoModel"


def _named(folder: Path, *patterns: str) -> str | None:
    """The name of the first file that matches a pattern."""
    return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def _models_within(folder: Path, role: str) -> str | None:
    """Recognizes the output folder of a trainer and a folder of named adapters."""
    inner = sorted(
        (path for path in folder.iterdir() if path.is_dir() and any((path / n).is_file() for n in (CONFIG, ADAPTER))),
        key=lambda path: (len(path.name), path.name),  # checkpoint-500 before checkpoint-1000
    )
    if not inner:
        return None
    names = ", ".join(str(path) for path in inner[:SHOWN])
    more = f" and {len(inner) - SHOWN} more" if len(inner) > SHOWN else ""
    return f"contains models in subfolders but no model itself; give one of them: {names}{more}"


def _pickles(folder: Path, role: str) -> str | None:
    name = _named(folder, "pytorch_model.bin.index.json", "pytorch_model*.bin")
    if name is None or not (folder / CONFIG).is_file():
        return None
    single = name == "pytorch_model.bin" and role.startswith("expert")
    file = f", or give the file {folder / name} itself" if single else ""
    return f"stores its weights as a pickle ({name}); convert it and give the new folder: {conversion(folder)}{file}"


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
        f"contains llama.cpp weights ({name}), which are usually quantized; give the original model, or convert the "
        f"weights (requires pip install gguf): python -c {shlex.quote(code)}"
    )


def _meta(folder: Path, role: str) -> str | None:
    name = _named(folder, "consolidated.*.pth", "consolidated.safetensors")
    if name is None or (folder / CONFIG).is_file():
        return None
    return (
        f"contains weights in their authors' own format ({name}); give the same model in the format of transformers, "
        "which the hub usually offers too, or convert it with the script convert_*_weights_to_hf.py of transformers"
    )


def _other_libraries(folder: Path, role: str) -> str | None:
    name = _named(folder, "tf_model*.h5", "flax_model*.msgpack")
    if name is None:
        return None
    option, extra = ("from_tf", "tensorflow") if name.endswith(".h5") else ("from_flax", "flax")
    return (
        f"contains only {extra} weights ({name}), which transformers 5 does not read; convert them with "
        f"transformers 4 (pip install 'transformers<5' torch {extra}): {conversion(folder, f', {option}=True')}"
    )


def _onnx(folder: Path, role: str) -> str | None:
    name = _named(folder, "*.onnx", "onnx/*.onnx")
    return name and f"contains an ONNX export ({name}), which epmq cannot merge; give the original model"


def _distributed(folder: Path, role: str) -> str | None:
    if name := _named(folder, "*.distcp", "pytorch_model_fsdp_0/*.distcp", "*/*.distcp"):
        return (
            f"contains a distributed checkpoint ({name}); merge its shards with accelerate merge-weights "
            f"{shlex.quote(str(folder))} OUT"
        )
    if name := _named(folder, "zero_to_fp32.py", "*zero_pp_rank_*", "global_step*"):
        return (
            f"contains a DeepSpeed checkpoint ({name}) but no model; convert it with python zero_to_fp32.py . OUT "
            "--safe_serialization in that folder, and copy config.json and the tokenizer to OUT"
        )
    return None


def _state(folder: Path, role: str) -> str | None:
    name = _named(folder, *STATES)
    return name and f"contains the state of a trainer ({name}) but no weights; give the folder that has *.safetensors"


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
"""The checks for other formats, in order. Each returns the rest of the error message, or None."""
