"""`epmq export CHECKPOINT FILE`: writes a checkpoint in the format of another engine, without calibrating again."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.commands.output_file import check_output
from epmq_cli.config.validate import check_choice
from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.runtime.console import console, plain
from epmq_cli.runtime.units import size

DESCRIPTION = """Writes a checkpoint of epmq run as one GGUF file for llama.cpp. The file has the 4-bit or 8-bit
weights of the checkpoint as they are: nothing is rounded again. For decoders: Llama, Mistral, Qwen, Gemma, Granite,
OLMo 2, Phi 3, SmolLM 3."""
SUFFIX = ".gguf"
DENSE = ("f16", "bf16", "f32", "q8_0")


def main(arguments: list[str]) -> None:
    """Writes the file and prints what is in it."""
    parser = argparse.ArgumentParser(prog="epmq export", description=DESCRIPTION)
    parser.add_argument("checkpoint", type=Path, help="the checkpoint folder that epmq run wrote")
    parser.add_argument("file", type=Path, help="the file to write, such as model.gguf")
    parser.add_argument(
        "--dense", default="f16", help=f"how embeddings and other dense matrices are stored: {', '.join(DENSE)}"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    chosen = parser.parse_args(arguments)
    export(chosen.checkpoint, chosen.file, chosen.dense, chosen.force)


def export(checkpoint: Path, file: Path, dense: str, force: bool) -> None:
    """Writes the file; see `main`. ConfigError if the engine cannot load such a model, or the file exists already."""
    check_choice("--dense", dense, DENSE)
    if file.suffix != SUFFIX:
        raise ConfigError(f"epmq export writes files whose names end in {SUFFIX}, got {file}")
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} is not a checkpoint; give the checkpoint folder that epmq run wrote")
    check_output("epmq export", file)
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; choose another name, or add --force to replace it")
    quiet_libraries()
    if find_spec("gguf") is None:
        raise ConfigError("epmq export needs the package gguf; install it with pip install 'epmq-cli[gguf]'")
    from epmq_cli.checkpoint.gguf.write import GgufFile

    written = GgufFile(checkpoint, dense).write(file)
    exact = "as in the checkpoint" if not written.rounding else f"within {written.rounding:.2g} steps of the grid"
    text = f"{file}: {size(written.size)}, {written.linears} quantized linears {exact}"
    console.print(plain(text), markup=False, highlight=False, soft_wrap=True)
