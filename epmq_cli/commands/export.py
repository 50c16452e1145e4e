"""`epmq export CHECKPOINT FILE`: writes a checkpoint in the format of another engine, without calibrating again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.commands.output_file import check_output
from epmq_cli.config.schema import GGUF_DENSE
from epmq_cli.config.validate import check_choice
from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.runtime.console import console, plain
from epmq_cli.runtime.units import size

DESCRIPTION = """Writes a checkpoint of epmq run as one file for another engine. Decoders as GGUF for llama.cpp: Llama,
Mistral, Qwen, Gemma, Granite, OLMo 2, Phi 3, SmolLM 3. Encoders as ONNX for ONNX Runtime: CLIP, ViT, BERT, RoBERTa,
DistilBERT, DeBERTa, ModernBERT. The file has the integers and scales of the checkpoint as they are: nothing is rounded
again."""
PACKAGES = {".gguf": ("gguf",), ".onnx": ("onnx", "onnxscript")}
"""The packages that each kind of file needs; the extra has the name of the suffix."""
OWN = {"dense": ".gguf", "tower": ".onnx", "activations": ".onnx"}
"""The kind of file that each option is for."""
CHOICES = {
    "dense": GGUF_DENSE,
    "tower": ("vision", "text"),
    "activations": ("float32", "int8"),
}
HELP = {
    "dense": "GGUF: how embeddings and other dense matrices are stored",
    "tower": "ONNX: the tower of CLIP that is written",
    "activations": "ONNX: the type in which quantized linears multiply; int8 is faster and rounds their inputs",
}
"""The first choice is the default."""


def main(arguments: list[str]) -> None:
    """Writes the file and prints what is in it."""
    parser = argparse.ArgumentParser(prog="epmq export", description=DESCRIPTION)
    parser.add_argument("checkpoint", type=Path, help="the checkpoint folder that epmq run wrote")
    parser.add_argument("file", type=Path, help="the file to write, such as model.gguf or model.onnx")
    for name, text in HELP.items():
        parser.add_argument(f"--{name}", help=f"{text}: {', '.join(CHOICES[name])}")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    chosen = parser.parse_args(arguments)
    given = {name: getattr(chosen, name) for name in OWN if getattr(chosen, name) is not None}
    export(chosen.checkpoint, chosen.file, given, chosen.force)


def export(checkpoint: Path, file: Path, given: dict[str, str], force: bool) -> None:
    """Writes the file; see `main`. ConfigError if the engine cannot load such a model, or the file exists already."""
    kind = file.suffix
    if kind not in PACKAGES:
        raise ConfigError(f"epmq export writes files whose names end in {' or '.join(PACKAGES)}, got {file}")
    for name, value in given.items():
        check_choice(f"--{name}", value, CHOICES[name])
        if OWN[name] != kind:
            raise ConfigError(f"--{name} is for files whose names end in {OWN[name]}, got {file}")
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} is not a checkpoint; give the checkpoint folder that epmq run wrote")
    check_output("epmq export", file)
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; choose another name, or add --force to replace it")
    quiet_libraries()
    _check_packages(kind[1:], PACKAGES[kind])
    chosen = {name: given.get(name, CHOICES[name][0]) for name in OWN}
    exact = _gguf(checkpoint, file, chosen) if kind == ".gguf" else _onnx(checkpoint, file, given, chosen)
    text = f"{file}: {size(file.stat().st_size)}, {exact}"
    console.print(plain(text), markup=False, highlight=False, soft_wrap=True)


def _gguf(checkpoint: Path, file: Path, chosen: dict[str, str]) -> str:
    """Writes a GGUF file and says what is in it."""
    from epmq_cli.checkpoint.gguf.write import GgufFile

    written = GgufFile(checkpoint, chosen["dense"]).write(file)
    exact = "as in the checkpoint" if not written.rounding else f"within {written.rounding:.2g} steps of the grid"
    return f"{written.linears} quantized linears {exact}"


def _onnx(checkpoint: Path, file: Path, given: dict[str, str], chosen: dict[str, str]) -> str:
    """Writes an ONNX file and says what is in it."""
    from epmq_cli.checkpoint.onnx.write import OnnxFile

    written = OnnxFile(checkpoint, given.get("tower"), chosen["activations"]).write(file)
    names = f"inputs {', '.join(written.inputs)}, outputs {', '.join(written.outputs)}"
    return f"{written.linears} quantized linears as in the checkpoint; {names}"


def _check_packages(extra: str, packages: Sequence[str]) -> None:
    """ConfigError if a package is missing."""
    for package in packages:
        if find_spec(package) is None:
            raise ConfigError(
                f"epmq export needs the package {package}; install it with pip install 'epmq-cli[{extra}]'"
            )
