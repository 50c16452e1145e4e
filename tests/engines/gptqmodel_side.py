"""Runs in an environment that has GPTQModel: prints what it writes after a prompt, with checkpoints of pack=gptq.

usage: gptqmodel_side.py TOKENS COUNT FOLDER...

The last line of the output is JSON: for each folder its "error", or its "result": the most likely tokens with their
log-probabilities.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
from gptqmodel import BACKEND, GPTQModel


def written(folder: str, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """The most likely tokens after the prompt, each computed from all tokens before it."""
    model: Any = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model.eval()
    tokens, found = [*prompt], []
    with torch.inference_mode():
        for _ in range(count):
            values = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
            tokens.append(int(values.argmax()))
            found.append((tokens[-1], float(values.max())))
    return found


def main() -> None:
    """Answers for each folder."""
    prompt, count = json.loads(sys.argv[1]), int(sys.argv[2])
    answers = []
    for folder in sys.argv[3:]:
        try:
            answers.append({"result": written(folder, prompt, count)})
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
