"""Measures speed and memory of linears on torch's int4 kernel and as dense matrices of each type.

    OMP_NUM_THREADS=1 python benchmarks/inference.py
    OMP_NUM_THREADS=1 python benchmarks/inference.py --models b32 --batches 1 16 --repeats 3 --kinds int4 float32
    python benchmarks/inference.py --device cuda
    OMP_NUM_THREADS=1 python benchmarks/inference.py --load 6
    OMP_NUM_THREADS=1 python benchmarks/inference.py --generate MODEL

Weights are random, of 4 bits in groups of 128. The models are stacks of two blocks of linears and activations;
attention is left out, because it is the same for all. Times are for one block. In a batch of images, all tokens are
rows (50, 197 or 257 per image). In a batch of texts that a decoder writes, each text has one row. The kinds take turns
in one process, and the table shows medians. int4 gets and returns the types that it has in a model from epmq_cli.load:
float32 on the CPU, bfloat16 on a GPU.

Two limits keep the whole benchmark at about ten minutes on one core. Batches of more than 2000 rows run through one
block only, since cached weights matter only if few rows share them. A batch gets no further turns after 20 seconds. The
first turn is a warm-up, unless it is the only one; `turns` is the number of turns that count.

With `--generate MODEL`, the folder of a decoder, the script rounds it to nearest and measures with each kernel the
tokens that it writes in a second of processor time, and how far their log-probabilities are from those of one call.

With `--load N`, the script instead measures the peak memory of loading a decoder of N blocks from a float16 checkpoint
with each kernel, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

import epmq_cli
from epmq_cli.checkpoint.compressed_tensors import CompressedTensorsExporter
from epmq_cli.checkpoint.int4_linear import Int4Linear
from epmq_cli.checkpoint.write import Contents, write_checkpoint
from epmq_cli.quantize.formats.format import Grid, QuantizedWeight
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.rtn import rtn
from epmq_cli.report.stage_timer import Stages

FORMAT = IntFormat(4, 128, "none")
DENSE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("int4", *DENSE)
TEXTS = IntFormat(4, 64, "none")
PROMPT = torch.arange(100, 132)[None]
LONG = 20.0  # seconds after which a batch gets no further turns
MANY = 2000  # rows; larger batches run through one block only


@dataclass(frozen=True)
class Model:
    """The shape of a block.

    `width` is that of the residual stream, `inner` that of the feed-forward, and `gated` says whether the feed-forward
    is gated. `tokens` is the number of tokens of one image, or 1 for a text that is being written.
    """

    name: str
    width: int
    inner: int
    gated: bool
    tokens: int


MODELS = {
    "b32": Model("CLIP ViT-B/32", 768, 3072, False, 50),
    "b16": Model("CLIP ViT-B/16", 768, 3072, False, 197),
    "l14": Model("CLIP ViT-L/14", 1024, 4096, False, 257),
    "1b": Model("decoder of 1B", 2048, 8192, True, 1),
}


def linear(kind: str, inputs: int, outputs: int, device: torch.device) -> nn.Module:
    """Returns a linear without bias; its random weights are the same for every kind."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    values = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.full((outputs, inputs // FORMAT.group_size), inputs**-0.5 / 5)
    weight = QuantizedWeight(values.to(device), Grid(scale.to(device), None), FORMAT, torch.float32)
    if kind == "int4":
        return Int4Linear(weight, None)
    found = nn.Linear(inputs, outputs, bias=False, device="meta")
    found.weight = nn.Parameter(weight.dequantize().to(DENSE[kind]), requires_grad=False)
    return found


class Block(nn.Module):
    """The linears of a block, with residual connections and the activation between them."""

    def __init__(self, model: Model, kind: str, device: torch.device) -> None:
        super().__init__()
        width, inner = model.width, model.inner
        self.q, self.k, self.v, self.o = (linear(kind, width, width, device) for _ in "qkvo")
        self.gate = linear(kind, width, inner, device) if model.gated else None
        self.up, self.down = linear(kind, width, inner, device), linear(kind, inner, width, device)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (rows, width) to (rows, width)."""
        x = x + self.o(self.q(x) + self.k(x) + self.v(x))
        inner = gelu(self.up(x)) if self.gate is None else silu(self.gate(x)) * self.up(x)
        return x + self.down(inner)


def weight_bytes(module: nn.Module) -> int:
    """Returns the bytes of all weights, scales included."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def seconds(calls: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> tuple[list[float], int]:
    """Runs the calls in turn; returns the median time of each call and the number of turns that count."""
    taken: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for _ in range(1 + repeats):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        if time.perf_counter() - begin > LONG:
            break
    counted = [times[1:] or times for times in taken]
    return [median(times) for times in counted], len(counted[0])


def input_type(kind: str, device: torch.device) -> torch.dtype:
    """Returns the type of the inputs and outputs of a kind."""
    return DENSE.get(kind, torch.float32 if device.type == "cpu" else torch.bfloat16)


def compare(model: Model, stacks: dict[str, nn.Sequential], options: argparse.Namespace) -> None:
    """Prints one table row per batch, with the times of one block."""
    for batch in options.batches:
        rows = batch * model.tokens
        blocks = 1 if rows > MANY else options.blocks
        x = torch.randn(rows, model.width, generator=torch.Generator().manual_seed(0)).to(options.device)
        calls = [partial(stack[:blocks], x.to(input_type(kind, options.device))) for kind, stack in stacks.items()]
        with torch.inference_mode():
            times, turns = seconds(calls, options.repeats, options.device)
        each = [1000 * value / blocks for value in times]
        cells = " | ".join(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in each)
        ratios = " | ".join(f"{value / times[0]:.2f}" for value in times[1:])
        print(f"| {model.name} | {batch} | {rows} | {cells} | {ratios} | {turns} |", flush=True)


def head(columns: Sequence[str]) -> None:
    """Prints the first two lines of a table."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def tables(options: argparse.Namespace) -> None:
    """Prints times and bytes of each model; ratios are relative to the time of the first kind."""
    kinds, sizes = options.kinds, {}
    ratios = [f"{kind} / {kinds[0]}" for kind in kinds[1:]]
    head(["a block of", "batch", "rows", *(f"{kind}, ms" for kind in kinds), *ratios, "turns"])
    for model in (MODELS[name] for name in options.models):
        stacks = {
            kind: nn.Sequential(*(Block(model, kind, options.device) for _ in range(options.blocks))) for kind in kinds
        }
        compare(model, stacks, options)
        sizes[model.name] = [f"{weight_bytes(stack[0]) / 1e6:.2f}" for stack in stacks.values()]
    head(["weights of a block, MB", *kinds])
    for name, found in sizes.items():
        print(f"| {name} | {' | '.join(found)} |")


def write_decoder(folder: Path, blocks: int) -> None:
    """Writes a float16 checkpoint of a random decoder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = MODELS["1b"]
    sizes = {"hidden_size": shape.width, "intermediate_size": shape.inner, "num_hidden_layers": blocks}
    write(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, vocab_size=1024)).half(), FORMAT, folder)


def write(model: Any, format: IntFormat, folder: Path) -> None:
    """Writes a checkpoint; the linears of the blocks are rounded to nearest."""
    model.config.save_pretrained(folder / "base")
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }
    weights = {
        name: rtn(module.weight.detach().float(), format, "minmax", model.dtype) for name, module in linears.items()
    }
    dtype = str(model.dtype).removeprefix("torch.")
    exporter = CompressedTensorsExporter(dtype=dtype, shard_size="5GB", engine=None, open_clip=False)
    contents = Contents(exporter, model, weights, False, {}, folder / "base", {}, model.dtype)
    write_checkpoint(folder / "checkpoint", contents, 5 * 10**9)


def measure(folder: Path, kernel: str, device: torch.device) -> dict[str, int]:
    """Returns the peak bytes of each stage: of this process on the CPU, of the device on a GPU."""
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM and epmq_cli.load  # import them before the measurements
    stages = Stages(device)
    with stages.stage("before"):
        pass
    with stages.stage("load"):
        model = epmq_cli.load(folder, str(device), kernel)
    with stages.stage("after"):
        pass
    with stages.stage("call"), torch.inference_mode():
        model(torch.arange(16, device=device)[None])
    key = "peak_host_bytes" if device.type == "cpu" else "peak_device_bytes"
    return {name: record[key] for name, record in stages.records.items()}


def peaks(options: argparse.Namespace) -> None:
    """Prints the memory to load a decoder with each kernel, and to make the first call after that."""
    per_block = 4 * MODELS["1b"].width ** 2 + 3 * MODELS["1b"].width * MODELS["1b"].inner
    print(f"\nlinears of {options.load} blocks as float32: {4 * options.load * per_block / 1e6:.0f} MB")
    head(["kernel", "before, MB", "peak of load, MB", "after, MB", "peak of a call of 16 tokens, MB"])
    with tempfile.TemporaryDirectory() as folder:
        write_decoder(Path(folder), options.load)
        for kernel in ("int4", "exact", "dequantize"):
            own = [sys.executable, __file__, "--measure", f"{folder}/checkpoint", kernel]
            printed = subprocess.run([*own, "--device", str(options.device)], check=True, stdout=subprocess.PIPE).stdout
            found: dict[str, int] = json.loads(printed)
            print(f"| {kernel} | {' | '.join(f'{value / 1e6:.0f}' for value in found.values())} |", flush=True)


@torch.inference_mode()
def written(model: Any, count: int) -> tuple[float, float]:
    """Generates `count` tokens after a prompt. Returns the tokens in a second, without the prompt, and the mean
    difference of log-probabilities from one call over all tokens."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    starts = list[float]()
    hook = model.register_forward_pre_hook(lambda module, inputs: starts.append(time.process_time()))
    found = model.generate(PROMPT, **options, output_logits=True, return_dict_in_generate=True)
    hook.remove()
    speed = (count - 1) / (time.process_time() - starts[1])
    whole = model(found.sequences[:, :-1]).logits[:, PROMPT.shape[1] - 1 :].float().log_softmax(-1)
    error = torch.stack(found.logits, 1).float().log_softmax(-1) - whole
    return speed, float(error.abs().mean())


def speeds(options: argparse.Namespace) -> None:
    """Prints the speed of a decoder with each kernel; the kinds take turns."""
    from transformers import AutoModelForCausalLM

    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(AutoModelForCausalLM.from_pretrained(options.generate, dtype=torch.bfloat16), TEXTS, folder)
        load = partial(epmq_cli.load, folder / "checkpoint", str(options.device))
        models = {f"{kernel}, float32": load(kernel) for kernel in ("int4", "exact", "dequantize")}
        models["dequantize, bfloat16"] = load("dequantize", torch.bfloat16)
    for _ in range(1 + options.repeats):
        for name, model in models.items():
            found.setdefault(name, []).append(written(model, options.tokens))
    dense = median(speed for speed, _ in found["dequantize, bfloat16"][1:])
    head(["kernel, activations", "linears, MB", "tokens a second", "to bfloat16", "mean difference"])
    for name, turns in found.items():
        speed, size = median(speed for speed, _ in turns[1:]), weight_bytes(models[name].model.layers) / 1e6
        print(f"| {name} | {size:.0f} | {speed:.1f} | {speed / dense:.2f} | {turns[0][1]:.1e} |")


def main() -> None:
    """Parses the command line and prints the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 128], help="numbers of images or texts")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--load", type=int, metavar="N")
    parser.add_argument("--generate", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=32, help="that --generate writes")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "KERNEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1], options.device)))
        return
    where = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    if options.load:
        peaks(options)
    elif options.generate:
        speeds(options)
    else:
        tables(options)


if __name__ == "__main__":
    main()
