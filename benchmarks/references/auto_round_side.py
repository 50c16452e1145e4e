"""Runs in an environment that has AutoRound: quantizes a decoder and saves the rounded weights as a dense model.

usage: auto_round_side.py METHOD MODEL TOKENS BITS GROUP OUT

METHOD: autoround, symmetric, else with AutoRound's defaults, which leave out the output layer and take 200 steps;
autoround-N for N steps. TOKENS is a JSON file with lists of tokens of one length, all of which are used.
"""

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

method, source, tokens, bits, group, out = sys.argv[1:]
torch.set_num_threads(1)
rows = json.loads(Path(tokens).read_text(encoding="utf-8"))
data = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
steps = {"iters": int(method.removeprefix("autoround-"))} if method != "autoround" else {}
grid = {"bits": int(bits), "group_size": int(group), "sym": True}
sizes = {"nsamples": len(rows), "seqlen": len(rows[0])}
tokenizer = AutoTokenizer.from_pretrained(source)
peer = AutoRound(model, tokenizer, dataset=data, device_map="cpu", amp=False, **grid, **sizes, **steps)
rounded, _ = peer.quantize()
rounded.save_pretrained(out)
