"""Runs in an environment that has transformers and compressed-tensors, and not epmq: prints outputs of checkpoints.

usage: transformers_side.py < JOBS

JOBS is JSON: a list of {"folder", "family"}. The last line of the output is JSON: for each job its "error", or its
"result": the logits of causal_lm, the last hidden state of bert, the image features of clip; and before all the version
of transformers.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

TOKENS = [[5, 7, 9, 2, 3, 6]]
PIXELS = (torch.arange(3 * 16 * 16).reshape(1, 3, 16, 16) % 7 - 3) / 3


def outputs(folder: str, family: str) -> torch.Tensor:
    """The outputs of a model for fixed inputs, in float32."""
    loader: Any = AutoModelForCausalLM if family == "causal_lm" else AutoModel
    model = loader.from_pretrained(folder).eval()
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    with torch.inference_mode():
        if family == "clip":
            if compressor is not None and "packed" in str([*model.state_dict()]):  # as the model card says
                compressor.decompress_model(model)
            found = model.get_image_features(pixel_values=PIXELS)
            return getattr(found, "pooler_output", found).float()
        found = model(input_ids=torch.tensor(TOKENS))
    return (found.logits if family == "causal_lm" else found.last_hidden_state).float()


def main() -> None:
    """Answers the jobs of the standard input."""
    answers: list[Any] = [transformers.__version__]
    for job in json.load(sys.stdin):
        try:
            answers.append({"result": outputs(job["folder"], job["family"]).flatten().tolist()})
        except Exception as error:
            traceback.print_exc()
            answers.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
