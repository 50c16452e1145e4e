"""Runs in an environment that has GPTQModel: quantizes a decoder and saves the dequantized weights as a dense model.

usage: gptqmodel_side.py METHOD MODEL TOKENS BITS GROUP OUT

METHOD: gptq, symmetric, else with GPTQModel's defaults, which leave out the output layer; its scales are float16.
TOKENS is a JSON file with lists of tokens of one length, all of which are used.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # the least that it starts with

import torch
from gptqmodel import BACKEND, GPTQConfig, GPTQModel
from transformers import AutoModelForCausalLM

_, source, tokens, bits, group, out = sys.argv[1:]
torch.set_num_threads(1)
source, tokens, out = (str(Path(path).absolute()) for path in (source, tokens, out))
os.chdir(tempfile.mkdtemp())  # it writes logs into the working folder
rows = json.loads(Path(tokens).read_text(encoding="utf-8"))
data = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows]
config = GPTQConfig(bits=int(bits), group_size=int(group), sym=True, device="cpu", offload_to_disk=False)
peer = GPTQModel.load(source, config, dtype=torch.float32)
peer.quantize(data, batch_size=1, backend=BACKEND.GPTQ_TORCH)
with tempfile.TemporaryDirectory() as folder:
    peer.save(folder)
    packed = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model.eval()
dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
with torch.no_grad():
    for name, module in packed.named_modules():
        if hasattr(module, "qweight"):
            dense.get_submodule(name).weight.copy_(module.dequantize_weight().T)
dense.save_pretrained(out)
