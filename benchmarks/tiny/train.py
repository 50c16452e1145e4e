"""Makes the models of the built-in suite `tiny`: a small CLIP and one expert per task.

    python benchmarks/tiny/train.py

The script draws the images and trains a tokenizer, a base on all tasks at once, and the vision tower of each expert on
one task. It writes them as float16 safetensors and prints a table of zero-shot accuracies. The base learns from plain
images (the split "web"), the experts from images in the scene of their task. So the base knows the subjects but does
poorly in the scenes, as a published CLIP does on the tasks it is merged for. conf/suite/tiny.yaml defines tasks,
classes and templates. The script takes about five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionModel

from epmq_cli.data.tiny.tasks import images

REPO = Path(__file__).resolve().parents[2]
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32  # limit of tokens per prompt
MEAN, STD = 0.5, 0.25  # of each channel, on the scale 0 to 1
TEMPERATURE = 100.0  # scale of the cosines; CLIP's own upper bound
TEST = 400  # samples per task, as in the suite

State = dict[str, Tensor]
Split = tuple[Tensor, Tensor]
Tokens = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """The training settings; they determine how good the experts are and how hard their merge is."""

    seed: int = 0
    pool: int = 12288  # training images per task
    base_steps: int = 900
    base_rate: float = 1.5e-3
    base_batch: int = 32  # images of each task
    expert_steps: int = 250
    expert_rate: float = 3e-4
    expert_batch: int = 64


def draw(task: str, split: str, count: int) -> Split:
    """Returns images in the processor's format, (count, 3, 32, 32), and labels (count,)."""
    pixels, labels = images(task, split, count)
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(MEAN).div(STD)
    return pictures.contiguous(), torch.from_numpy(labels)


def read_prompts() -> dict[str, list[list[str]]]:
    """Returns the prompts by task: one row per template, one column per class."""
    tasks = OmegaConf.load(REPO / "conf/suite/tiny.yaml").tasks
    return {
        str(name): [[template.format(label) for label in task.classes] for template in task.templates]
        for name, task in tasks.items()
    }


def tokenize(tokenizer: CLIPTokenizer, prompts: dict[str, list[list[str]]]) -> dict[str, Tokens]:
    """Returns, by task, one batch of token ids and mask per template."""
    return {
        task: [dict(tokenizer(row, padding=True, return_tensors="pt")) for row in rows]
        for task, rows in prompts.items()
    }


def train_tokenizer(prompts: list[str]) -> CLIPTokenizer:
    """Trains the byte-level BPE of a CLIP tokenizer on these prompts."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(prompts, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's own order: bytes, bytes that end a word, merged pieces, and the two special tokens last.
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Returns an untrained CLIP: width 64 in both towers, 32 x 32 images in 16 patches."""
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "hidden_act": "gelu"}
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    text = size | marks | {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    vision = size | {"num_hidden_layers": 4, "image_size": 32, "patch_size": 8}
    projection = {"projection_dim": 64}
    return CLIPModel(
        CLIPConfig(
            text_config=text | projection,
            vision_config=vision | projection,
            **projection,
            logit_scale_init_value=math.log(TEMPERATURE),
        )
    )


def class_embeddings(model: CLIPModel, tokens: Tokens) -> Tensor:
    """Returns (classes, 64): for each class, the normalized mean over templates of its normalized prompt embeddings."""
    each = [functional.normalize(model.get_text_features(**batch).pooler_output, dim=-1) for batch in tokens]
    return functional.normalize(torch.stack(each).mean(0), dim=-1)


def logits(vision: torch.nn.Module, projection: Tensor, head: Tensor, pictures: Tensor) -> Tensor:
    """Returns (n, classes): the temperature times the cosine between each image's and each class's embedding."""
    pooled = vision(pixel_values=pictures).pooler_output
    return TEMPERATURE * functional.normalize(pooled @ projection.T, dim=-1) @ head.T


def fit(
    parameters: list[torch.nn.Parameter],
    loss: Callable[[torch.Generator], Tensor],
    steps: int,
    peak: float,  # learning rate after 50 steps of warm-up; then cosine decay to zero
    seed: int,
) -> None:
    """Minimises `loss` over the parameters; `loss` draws its batches with the generator it gets."""
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss(generator).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def pick(split: Split, size: int, generator: torch.Generator) -> Split:
    """Draws a random batch from the split."""
    chosen = torch.randint(len(split[1]), (size,), generator=generator)
    return split[0][chosen], split[1][chosen]


def train_base(recipe: Recipe, tokenizer: CLIPTokenizer, tokens: dict[str, Tokens]) -> CLIPModel:
    """Trains a CLIP on the plain images of all tasks; it never sees the scenes of the tasks."""
    torch.manual_seed(recipe.seed)
    model = new_model(tokenizer)
    model.logit_scale.requires_grad_(False)
    data = {task: draw(task, "web", recipe.pool) for task in tokens}

    def loss(generator: torch.Generator) -> Tensor:
        total = torch.zeros(())
        for task, split in data.items():
            pictures, labels = pick(split, recipe.base_batch, generator)
            head = class_embeddings(model, tokens[task])
            scores = logits(model.vision_model, model.visual_projection.weight, head, pictures)
            total = total + functional.cross_entropy(scores, labels)
        return total / len(data)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit(trained, loss, recipe.base_steps, recipe.base_rate, recipe.seed)
    return model


def train_expert(recipe: Recipe, base: Path, task: str, head: Tensor) -> CLIPVisionModel:
    """Trains the base's vision tower on one task; projection and text tower stay fixed."""
    clip = load_clip(base)
    vision, projection = clip.vision_model, clip.visual_projection.weight.detach()
    split = draw(task, "train", recipe.pool)

    def loss(generator: torch.Generator) -> Tensor:
        pictures, labels = pick(split, recipe.expert_batch, generator)
        return functional.cross_entropy(logits(vision, projection, head, pictures), labels)

    fit(list(vision.parameters()), loss, recipe.expert_steps, recipe.expert_rate, recipe.seed)
    return vision


def load_clip(folder: Path) -> CLIPModel:
    """Loads the base in float32; by default, transformers computes in the float16 of the files."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32)


def weights(vision: CLIPVisionModel) -> State:
    """Returns a copy of the tower's parameters."""
    return {name: parameter.detach().clone() for name, parameter in vision.named_parameters()}


def save(model: CLIPModel | CLIPVisionModel, folder: Path) -> None:
    """Writes config.json and model.safetensors in float16, without the path of the original model."""
    model.config._name_or_path = ""
    model.half().save_pretrained(folder)


def train_all(recipe: Recipe, out: Path) -> None:
    """Trains all models; writes `out`/base and `out`/experts/<task>."""
    prompts = read_prompts()
    tokenizer = train_tokenizer([prompt for rows in prompts.values() for row in rows for prompt in row])
    tokens = tokenize(tokenizer, prompts)
    shutil.rmtree(out, ignore_errors=True)
    base = out / "base"
    tokenizer.save_pretrained(base)
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(base)
    say("base")
    save(train_base(recipe, tokenizer, tokens), base)
    for task in tokens:
        say(f"expert {task}")
        with torch.no_grad():
            head = class_embeddings(load_clip(base), tokens[task])
        save(train_expert(recipe, base, task, head), out / "experts" / task)


@torch.no_grad()
def score_all(out: Path) -> dict[str, list[float]]:
    """Scores the written files; returns, by row, the accuracy in percent on each task's test split."""
    clip = load_clip(out / "base")
    tokens = tokenize(CLIPTokenizer.from_pretrained(out / "base"), read_prompts())
    base = weights(clip.vision_model)
    experts = {
        task: weights(CLIPVisionModel.from_pretrained(out / "experts" / task, dtype=torch.float32)) for task in tokens
    }
    total = {name: sum(expert[name] - weight for expert in experts.values()) for name, weight in base.items()}
    tests = {task: draw(task, "test", TEST) for task in tokens}

    def score(state: State, task: str) -> float:
        clip.vision_model.load_state_dict(state, strict=False)
        head = class_embeddings(clip, tokens[task])
        scores = logits(clip.vision_model, clip.visual_projection.weight, head, tests[task][0])
        return 100 * (scores.argmax(1) == tests[task][1]).float().mean().item()

    def moved(scale: float) -> State:
        return {name: weight + scale * total[name] for name, weight in base.items()}

    rows = {"base": base, "average": moved(1 / len(experts)), "task arithmetic 0.3": moved(0.3)}
    table = {row: [score(state, task) for task in tokens] for row, state in rows.items()}
    return {"experts": [score(experts[task], task) for task in tokens], **table}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / "epmq_cli/shipped/tiny", help="output folder")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    # At this width, a second thread costs more than it saves, and one thread sums in a fixed order.
    torch.set_num_threads(1)
    train_all(Recipe(seed=arguments.seed), arguments.out)
    tasks = list(read_prompts())
    print(f"{'':20}" + "".join(f"{task:>10}" for task in [*tasks, "mean"]))
    for row, scores in score_all(arguments.out).items():
        print(f"{row:20}" + "".join(f"{value:10.1f}" for value in [*scores, sum(scores) / len(scores)]))


if __name__ == "__main__":
    main()
