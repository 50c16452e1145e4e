"""Compares GPTQ in epmq with llm-compressor's `oneshot` and GPTQModel: a random Llama, 4 bits in groups of 128.

    python benchmarks/gptq.py [--repeats 3] [--device cpu]
    python benchmarks/gptq.py --device cuda

The model has hidden size 512, intermediate size 1408, 8 layers and 2000 tokens. All tools calibrate on the same 32
sequences of 256 tokens. The model is made once in runs/gptq, and so are the environments of the other tools (GPTQModel
requires a newer torch). Every round runs the tools as whole processes, one after the other. `quantize` is the time in
GPTQ itself (the stage in metrics.json, or the call of `oneshot` or `quantize`), and peak memory is that of the process.
No tool reorders columns. Each tool uses its own damping. All tools use one device. For `cpu`, no GPU is visible
(otherwise llm-compressor uses it). For `cuda`, only the first GPU is visible, and its peak is that of torch's tensors.

Errors compare the written checkpoints with the dense model on the calibration tokens. The error of the linears is
||X (W - Q)^T||^2 / ||X W^T||^2, each sum over all linears, with the dense model's inputs X. The other error is that of
the logits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epmq_cli.data.documents import token_blocks
from epmq_cli.data.sampling import task_seed

OTHERS = {"llm-compressor": ("llmcompressor==0.14.0.1", "torch==2.13.0"), "GPTQModel": ("gptqmodel==7.7.0",)}
SAMPLES, LENGTH, VOCABULARY, TEXT = 32, 256, 2000, 200_000
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
ONESHOT = """
import json, sys, time
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

folder, out, _ = sys.argv[1:]  # the device is unused: oneshot uses the first visible GPU
ids = torch.load(f"{folder}/ids.pt").tolist()
data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(ids[0])] * len(ids)})
model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], actorder=None)
options = {"max_seq_length": len(ids[0]), "num_calibration_samples": len(ids), "shuffle_calibration_samples": False}
start = time.perf_counter()
oneshot(model=model, dataset=data, recipe=recipe, **options)
if torch.cuda.is_available():
    torch.cuda.synchronize()
seconds = time.perf_counter() - start
model.save_pretrained(f"{out}/checkpoint", save_compressed=True)
device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
json.dump({"quantize": seconds, "device": device}, open(f"{out}/seconds.json", "w"))
"""
GPTQMODEL = """
import json, sys, time
import torch
from gptqmodel import GPTQModel, QuantizeConfig

folder, out, device = sys.argv[1:]
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in torch.load(f"{folder}/ids.pt").tolist()]
options = {"desc_act": False, "act_group_aware": False, "offload_to_disk": False, "device": device}
config = QuantizeConfig(bits=4, group_size=128, **options)
model = GPTQModel.load(f"{folder}/model", config, dtype=torch.float32)
start = time.perf_counter()
model.quantize(data, batch_size=1)
if torch.cuda.is_available():
    torch.cuda.synchronize()
seconds = time.perf_counter() - start
model.save(f"{out}/checkpoint")
device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
json.dump({"quantize": seconds, "device": device}, open(f"{out}/seconds.json", "w"))
"""


def make(folder: Path) -> None:
    """Makes the model, a tokenizer with one word per token, and the calibration tokens as text and as ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "ids.pt").is_file():
        return
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "model")
    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / "model")
    ids = torch.randint(VOCABULARY, (TEXT,))
    row = {"text": " ".join(f"w{index}" for index in ids.tolist()), "label": 0}
    (folder / "text.jsonl").write_text(json.dumps(row) + "\n")
    task = {"expert": str(folder / "model"), "metric": "perplexity", "max_length": LENGTH}
    text = str(folder / "text.jsonl")
    task["data"] = {"_target_": "epmq_cli.data.table.Table", "train": text, "test": text}  # type: ignore[assignment]
    suite = {"_target_": "epmq_cli.data.suite.Suite", "name": "gptq", "family": "causal_lm", "tasks": {"text": task}}
    (folder / "configs" / "suite").mkdir(parents=True, exist_ok=True)
    suite["base"] = str(folder / "model")
    (folder / "configs" / "suite" / "gptq.yaml").write_text(json.dumps(suite))  # JSON is YAML
    torch.save(token_blocks(ids, LENGTH, SAMPLES, task_seed(0, "text")), folder / "ids.pt")  # as epmq draws them


def environment(folder: Path, name: str) -> str:
    """Returns the Python of the environment of another tool, and makes the environment if it is missing."""
    place = folder / f"env-{name}"
    if not place.is_dir():
        venv.create(place, with_pip=True)
        subprocess.run([place / "bin" / "python", "-m", "pip", "install", "--quiet", *OTHERS[name]], check=True)
    return str(place / "bin" / "python")


def variables(device: str) -> dict[str, str]:
    """Returns environment variables that make only the one device visible."""
    if device == "cpu":  # by default GPTQModel uses only one of the two cores
        return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}
    return {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}


def sides(folder: Path, device: str) -> dict[str, list[str]]:
    """Returns the command of each tool; each writes to `out`."""
    start = [sys.executable, "-m", "epmq_cli", "run", "--config-dir", str(folder / "configs"), "suite=gptq"]
    options = ["merge=none", "guidance=merged", "bits=4", "group_size=128", f"calib.samples={SAMPLES}"]
    ours = [*start, *options, "eval.stages=[]", "cache=false", f"device={device}", f"out={folder / 'out'}"]
    return {
        "epmq": ours,
        "epmq quant.grid=minmax": [*ours, "quant.grid=minmax"],
        **{
            name: [environment(folder, name), "-c", script, str(folder), str(folder / "out"), device]
            for name, script in (("llm-compressor", ONESHOT), ("GPTQModel", GPTQMODEL))
        },
    }


def run(command: list[str], out: Path, environment: Mapping[str, str]) -> dict[str, float]:
    """Returns wall seconds, seconds of quantization, and peak MB of the process and of the GPU if there is one."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    start = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=out, env=environment, **quiet) as process:  # type: ignore[call-overload]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    if (out / "seconds.json").is_file():
        found = json.loads((out / "seconds.json").read_text())
    else:
        stages = json.loads((out / "metrics.json").read_text())["stages"]
        peaks = [record["peak_device_bytes"] for record in stages.values()]
        device = None if None in peaks else max(peaks)
        found = {"quantize": stages["calibrate and quantize"]["seconds"], "device": device}
    host = {"seconds": wall, "quantize": found["quantize"], "peak, MB": usage.ru_maxrss * 1024 / 1e6}
    return host if found["device"] is None else {**host, "device peak, MB": found["device"] / 1e6}


@torch.inference_mode()
def errors(folder: Path) -> tuple[float, float]:
    """Returns the relative squared errors of the linears and of the logits for the checkpoint in `out`."""
    from transformers import AutoModelForCausalLM

    ids = torch.load(folder / "ids.pt")
    if (folder / "out" / "checkpoint" / "quantize_config.json").is_file():
        make_dense(folder / "out" / "checkpoint")
    dense, packed = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder / "model", folder / "out" / "checkpoint")
    )
    own = packed(input_ids=ids).logits  # the first call: compressed-tensors unpacks the weights
    weights = packed.state_dict()
    sums = [0.0, 0.0]
    for name, module in dense.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook(weights[f"model.{name}.weight"], sums))
    expected = dense(input_ids=ids).logits
    return sums[0] / sums[1], ((own - expected).square().sum() / expected.square().sum()).item()


def make_dense(checkpoint: Path) -> None:
    """Unpacks GPTQModel's checkpoint in place, because transformers needs GPTQModel to read it.

    A word packs eight rows of the transposed weight, or eight columns of zero points minus one, lowest bits first.
    """
    tensors, config = load_file(checkpoint / "model.safetensors"), json.loads((checkpoint / "config.json").read_text())
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        words, zeros, groups, scales = (tensors.pop(f"{name}.{p}") for p in ("qweight", "qzeros", "g_idx", "scales"))
        values = (words[:, None] >> shifts[:, None] & 15).flatten(0, 1)
        zero = (zeros[:, :, None] >> shifts & 15).flatten(1) + 1
        tensors[f"{name}.weight"] = ((values - zero[groups]) * scales.float()[groups]).T.contiguous()
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "quantize_config.json").unlink()


def hook(quantized: Tensor, sums: list[float]):  # type: ignore[no-untyped-def]
    """Returns a forward hook that adds the squared error of a linear with these weights and its squared output."""

    def add(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        sums[0] += (args[0] @ (module.weight - quantized.float()).T).double().square().sum().item()
        sums[1] += output.double().square().sum().item()

    return add


def show(rounds: list[Mapping[str, dict[str, float]]], found: Mapping[str, tuple[float, float]]) -> None:
    """Prints medians over the rounds, and the median of the ratios of each round."""
    columns = list(rounds[0]["epmq"])
    titles = ["", *columns, "times epmq's", "error of linears", "of logits"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name, (linears, logits) in found.items():
        numbers = [f"{statistics.median(r[name][column] for r in rounds):.1f}" for column in columns]
        times = statistics.median(r[name]["quantize"] / r["epmq"]["quantize"] for r in rounds)
        print(f"| {name} | {' | '.join(numbers)} | {times:.2f} | {linears:.5f} | {logits:.5f} |")


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/gptq"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU and this machine has none; use --device cpu")
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make(folder)
    commands, found = sides(folder, arguments.device), {}
    rounds = []
    for _ in range(arguments.repeats):
        rounds.append({})
        for name, command in commands.items():
            rounds[-1][name] = run(command, folder / "out", variables(arguments.device))
            found[name] = errors(folder)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    print(f"Medians of {len(rounds)}, {where}\n")
    show(rounds, found)


if __name__ == "__main__":
    main()
