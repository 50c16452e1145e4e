"""Runs in an environment that has llm-compressor: quantizes a decoder and saves it as compressed-tensors.

usage: llm_compressor_side.py METHOD MODEL TOKENS BITS GROUP OUT

METHOD: rtn, gptq or awq, symmetric, the output layer left out, else with llm-compressor's defaults; gptq-D for GPTQ
with a damping of D. TOKENS is a JSON file with lists of tokens of one length, all of which are used.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM

method, source, tokens, bits, group, out = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
rows = json.loads(Path(tokens).read_text(encoding="utf-8"))
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
weights = QuantizationArgs(num_bits=int(bits), type="int", symmetric=True, strategy="group", group_size=int(group))
groups = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}
if method == "awq":
    from llmcompressor.modifiers.awq import AWQModifier

    recipe = AWQModifier(**groups)
elif method == "rtn":
    recipe = QuantizationModifier(**groups)
else:
    damping = {"dampening_frac": float(method.removeprefix("gptq-"))} if method != "gptq" else {}
    recipe = GPTQModifier(**groups, **damping)
calibration = {} if method == "rtn" else {"dataset": data, "num_calibration_samples": len(rows)}
oneshot(model=model, recipe=recipe, max_seq_length=len(rows[0]), **calibration)
model.save_pretrained(out, save_compressed=True)
