"""Runs in an environment that has vLLM for CPUs: prints what it computes with checkpoints.

usage: vllm_side.py < JOBS

JOBS is JSON: a list of {"folder", "dtype"} with either "tokens" and "count" (greedy decoding), or "texts" or "pictures"
(embeddings; a picture is a file); "mixture": whether a reference multiplies with packed experts, for which vLLM has
kernels on GPUs and on processors with AMX only. The last line of the output is JSON: for each job its "error", or its
"result" and the "operator" that multiplied with packed weights.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from typing import Any

os.environ |= {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from torch import Tensor

WIDTH = 16
"""Neighbouring outputs that the int4 operator reads together."""


def numbers(packed: Tensor) -> Tensor:
    """The eight codes 0..15 of each int32, in a new last dimension; the lowest bits first."""
    return packed[..., None] >> torch.arange(0, 32, 4) & 15


def reference(
    input: Tensor,
    q_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> Tensor:
    """The int4 operator in plain arithmetic: input (..., in), q_weight int32 (out / 16, in * 2), scales (groups, out),
    zeros int32 (groups, out / 8)."""
    inputs, outputs = input.shape[-1], scales.shape[1]
    codes = numbers(q_weight.view(-1, inputs, WIDTH // 8)).reshape(-1, inputs, WIDTH)
    codes = codes.permute(1, 0, 2).reshape(inputs, outputs)
    points = torch.full_like(scales, 8) if zeros is None else numbers(zeros).reshape(scales.shape).to(scales.dtype)
    repeats = inputs // len(scales)
    weight = (codes - points.repeat_interleave(repeats, 0)) * scales.repeat_interleave(repeats, 0)
    result = input.float() @ weight.float()
    return (result if bias is None else result + bias).to(input.dtype)


def experts(self: Any, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, **options: Any) -> None:
    """The experts of a mixture in plain arithmetic, after vLLM has dequantized them: hidden_states (tokens, in), w1
    (experts, 2 inner, in), w2 (experts, in, inner)."""
    output.zero_()
    for row, (chosen, factors) in enumerate(zip(options["topk_ids"], options["topk_weights"], strict=True)):
        for expert, factor in zip(chosen.tolist(), factors, strict=True):
            gate, up = (w1[expert].float() @ hidden_states[row].float()).chunk(2)
            output[row] += (factor * (w2[expert].float() @ (torch.nn.functional.silu(gate) * up))).to(output.dtype)


def choose_experts() -> None:
    """Puts this reference in the place of a kernel of GPUs that multiplies with dequantized experts."""
    oracle = importlib.import_module("vllm.model_executor.layers.fused_moe.oracle.int_wna16")
    kernel = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe")
    oracle._get_priority_backends = lambda: [oracle.WNA16MoEBackend.EMULATION]
    kernel.Int4EmulationTritonExperts._supports_current_device = staticmethod(lambda: True)
    kernel.Int4EmulationTritonExperts.apply = experts


OWN = importlib.import_module("vllm._custom_ops").cpu_gemm_wna16


def choose_operator(dtype: str) -> str:
    """Lets vLLM multiply with its own int4 operator, or with the reference where it has none: for float32, and on
    processors without AVX-512. Returns which."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    own = dtype != "float32" and hasattr(torch.ops._C, "cpu_gemm_wna16")
    _custom_ops.cpu_gemm_wna16 = OWN if own else reference
    return "own" if own else "reference"


def answer(job: dict[str, Any]) -> Any:
    """What vLLM computes for a job."""
    from vllm import LLM, SamplingParams

    common = {
        "model": job["folder"],
        "dtype": job["dtype"],
        "enforce_eager": True,
        "max_num_seqs": 4,
        "gpu_memory_utilization": 0.1,
    }
    if "tokens" in job:
        llm = LLM(**common, max_model_len=64)
        settings = SamplingParams(temperature=0, max_tokens=job["count"], logprobs=1, ignore_eos=True, detokenize=False)
        [found] = llm.generate([{"prompt_token_ids": job["tokens"]}], settings, use_tqdm=False)
        [best] = found.outputs
        return [(token, step[token].logprob) for token, step in zip(best.token_ids, best.logprobs, strict=True)]
    llm = LLM(**common, runner="pooling")
    if "pictures" in job:
        from PIL import Image

        prompts = [{"prompt": "", "multi_modal_data": {"image": Image.open(path)}} for path in job["pictures"]]
    else:
        prompts = job["texts"]
    return [found.outputs.embedding for found in llm.embed(prompts, use_tqdm=False)]


def main() -> None:
    """Answers the jobs of the standard input."""
    answers = []
    for job in json.load(sys.stdin):
        try:
            operator = choose_operator(job["dtype"])
            if job.get("mixture"):
                choose_experts()
            answers.append({"result": answer(job), "operator": operator})
        except Exception as error:
            traceback.print_exc()
            answers.append({"error": f"{type(error).__name__}: {error}"})
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        gc.collect()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
