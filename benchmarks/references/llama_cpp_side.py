"""Runs in an environment that has xllamacpp: prints the loss and the speed of a GGUF file in llama.cpp, on one thread.

usage: llama_cpp_side.py FILE TEXTS REPEATS

TEXTS is a JSON file with lists of tokens. Prints the sum of the negative log-probabilities of all tokens behind the
first one of each text, their number, and the tokens a second of each generation of 64 tokens. The server has no
log-probabilities of prompts: each token is written behind those before it, chosen by a bias that comes after them.
"""

import json
import sys
from pathlib import Path

import xllamacpp as llama

BIAS = 1000.0
WRITTEN = 64

params = llama.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 512, 1, 1, True
params.cpuparams_batch.n_threads = 1
server = llama.Server(params)


def complete(prompt: list[int], count: int, **options: object) -> dict:
    """The answer of llama.cpp's server."""
    request = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
    answer = server.handle_completions({**request, **options})
    return answer if isinstance(answer, dict) else json.loads(answer)


texts = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
loss, count = 0.0, 0
for text in texts:
    for place in range(1, len(text)):
        found = complete(text[:place], 1, logprobs=1, logit_bias=[[text[place], BIAS]], ignore_eos=False)
        (token,) = found["choices"][0]["logprobs"]["content"]
        assert token["id"] == text[place]
        loss -= token["logprob"]
        count += 1
speeds = [complete(texts[0][:8], WRITTEN)["timings"]["predicted_per_second"] for _ in range(int(sys.argv[3]))]
print(json.dumps({"loss": loss, "count": count, "speeds": speeds}))
