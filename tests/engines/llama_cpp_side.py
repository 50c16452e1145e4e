"""Runs in an environment that has xllamacpp: prints what a GGUF file writes after a prompt, most likely token by token.

usage: llama_cpp_side.py FILE TOKENS COUNT
"""

import json
import sys

import xllamacpp as llama

params = llama.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 64, 1, 1, False
params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
request = {"prompt": json.loads(sys.argv[2]), "n_predict": int(sys.argv[3]), "logprobs": 1, "ignore_eos": True}
answer = llama.Server(params).handle_completions({**request, "temperature": 0, "top_k": 1, "cache_prompt": False})
found = answer if isinstance(answer, dict) else json.loads(answer)
print(json.dumps([(token["id"], token["logprob"]) for token in found["choices"][0]["logprobs"]["content"]]))
