"""Makes the vision3 models: a small CLIP and four experts on real images of letters, digits and alphabets.

    python benchmarks/vision3/train.py --data FOLDER
    python benchmarks/vision3/train.py --data FOLDER --suite vision6

FOLDER holds notmnist.npz, kannada.npz and omniglot.npz. The fourth task is scikit-learn's digits, which the script
enlarges and splits. The script trains the base briefly on all four tasks at once, then the vision tower of each expert
on one task. configs/suite/vision3.yaml defines tasks, classes and templates. The training settings come from a
prototype, where they were set for a base that is about 60% right. This script chooses nothing by a test sample and
scores the whole test splits at the end. It took 18 minutes on two cores shared with other work. It uses an accelerator
if one is available. It downloads nothing and needs scikit-learn. It keeps models that already exist in `--out`.

vision6 has six tasks: the classes of the first three data sets, divided into two halves each. Its experts take half as
many steps.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionModel, logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny.train import (
    LENGTH,
    MEAN,
    STD,
    TEMPERATURE,
    State,
    Tokens,
    class_embeddings,
    fit,
    load_clip,
    logits,
    pick,
    say,
    tokenize,
    train_tokenizer,
    weights,
)

SUITES = Path(__file__).with_name("configs") / "suite"
SETS = ("notmnist", "kannada", "omniglot")
TRAIN_DIGITS = 1437  # of 1797; the rest is for testing


@dataclass(frozen=True)
class Recipe:
    """The training settings."""

    seed: int = 0
    base_steps: int = 220
    base_rate: float = 1.5e-3
    base_batch: int = 48  # images of each task
    expert_steps: int = 600
    expert_rate: float = 8e-4
    expert_batch: int = 128


def write_digits(path: Path) -> None:
    """Writes scikit-learn's 8 x 8 digits as 32 x 32 images in the layout of the other tasks, split by a fixed seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("the task digits needs scikit-learn: pip install scikit-learn") from error

    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] / 16
    large = functional.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    images = large.mul(255).round().to(torch.uint8).numpy()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    train, test = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.partial.npz")
    np.savez(
        unfinished,
        train_images=images[train],
        train_labels=found.target[train],
        test_images=images[test],
        test_labels=found.target[test],
        classes=found.target_names.astype(str),
    )
    unfinished.rename(path)


def read_split(path: Path, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns images in the processor's format, (n, 3, 32, 32), and labels (n,)."""
    if not path.is_file():
        raise SystemExit(f"--data must hold notmnist.npz, kannada.npz and omniglot.npz, but {path} does not exist")
    with np.load(path, allow_pickle=False) as arrays:
        pixels, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    pictures = torch.from_numpy(pixels).float().div(255).sub(MEAN).div(STD)
    return pictures[:, None].expand(-1, 3, -1, -1).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)


def write_halves(path: Path, folder: Path) -> dict[str, Path]:
    """Writes the first and the second half of a data set's classes as tasks of their own. Returns them by name."""
    if not path.is_file():
        raise SystemExit(f"--data must hold notmnist.npz, kannada.npz and omniglot.npz, but {path} does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    found = {f"{path.stem}_{half}": folder / f"{path.stem}_{half}.npz" for half in ("a", "b")}
    with np.load(path, allow_pickle=False) as arrays:
        middle = len(arrays["classes"]) // 2
        for file, first, end in zip(found.values(), (0, middle), (middle, len(arrays["classes"])), strict=True):
            own = {"classes": arrays["classes"][first:end]}
            for split in ("train", "test"):
                labels = arrays[f"{split}_labels"]
                rows = (labels >= first) & (labels < end)
                own[f"{split}_images"], own[f"{split}_labels"] = arrays[f"{split}_images"][rows], labels[rows] - first
            np.savez(file, **own)
    return found


def read_prompts(suite: str) -> dict[str, list[list[str]]]:
    """Returns the prompts by task: one row per template, one column per class."""
    tasks = OmegaConf.load(SUITES / f"{suite}.yaml").tasks
    return {
        str(name): [[template.format(label) for label in task.classes] for template in task.templates]
        for name, task in tasks.items()
    }


def on(device: torch.device, tokens: dict[str, Tokens]) -> dict[str, Tokens]:
    """Moves the batches of token ids to a device."""
    return {
        task: [{name: ids.to(device) for name, ids in batch.items()} for batch in rows] for task, rows in tokens.items()
    }


def new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Returns an untrained CLIP: a vision tower of 6 blocks (width 128, 16 patches), a text tower of 2 (width 64)."""
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 6}
    text |= marks | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "projection_dim": 128}
    vision |= {"image_size": 32, "patch_size": 8, "projection_dim": 128}
    scale = math.log(TEMPERATURE)
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, logit_scale_init_value=scale)
    )


def train_base(
    recipe: Recipe, tokenizer: CLIPTokenizer, tokens: dict[str, Tokens], paths: dict[str, Path], device: torch.device
) -> CLIPModel:
    """Trains a CLIP briefly on all tasks at once."""
    torch.manual_seed(recipe.seed)
    model = new_model(tokenizer).to(device)
    model.logit_scale.requires_grad_(False)
    data = {task: read_split(path, "train", device) for task, path in paths.items()}

    def loss(generator: torch.Generator) -> Tensor:
        total = torch.zeros((), device=device)
        for task, split in data.items():
            pictures, labels = pick(split, recipe.base_batch, generator)
            head = class_embeddings(model, tokens[task])
            scores = logits(model.vision_model, model.visual_projection.weight, head, pictures)
            total = total + functional.cross_entropy(scores, labels)
        return total / len(data)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit(trained, loss, recipe.base_steps, recipe.base_rate, recipe.seed)
    return model


def train_expert(recipe: Recipe, clip: CLIPModel, tokens: Tokens, path: Path, device: torch.device) -> CLIPVisionModel:
    """Trains the base's vision tower on one task; projection and text tower stay fixed."""
    vision, projection = clip.vision_model, clip.visual_projection.weight.detach()
    with torch.no_grad():
        head = class_embeddings(clip, tokens)
    split = read_split(path, "train", device)

    def loss(generator: torch.Generator) -> Tensor:
        pictures, labels = pick(split, recipe.expert_batch, generator)
        return functional.cross_entropy(logits(vision, projection, head, pictures), labels)

    fit(list(vision.parameters()), loss, recipe.expert_steps, recipe.expert_rate, recipe.seed)
    return vision


def make(folder: Path, work: Callable[[Path], None]) -> None:
    """Calls `work` with a temporary folder and renames it to `folder`; does nothing if `folder` exists."""
    say(f"{folder.name} is there" if folder.exists() else folder.name)
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    work(unfinished)
    unfinished.rename(folder)


def make_all(
    recipe: Recipe, prompts: dict[str, list[list[str]]], paths: dict[str, Path], out: Path, device: torch.device
) -> None:
    """Trains the missing models; writes `out`/base and `out`/<task>."""
    tokenizer = train_tokenizer([prompt for rows in prompts.values() for row in rows for prompt in row])
    tokens = on(device, tokenize(tokenizer, prompts))

    def base(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        crop = {"height": 32, "width": 32}
        CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size=crop, image_mean=[MEAN] * 3, image_std=[STD] * 3
        ).save_pretrained(folder)
        train_base(recipe, tokenizer, tokens, paths, device).save_pretrained(folder)

    def expert(task: str, folder: Path) -> None:
        clip = load_clip(out / "base").to(device)
        vision = train_expert(recipe, clip, tokens[task], paths[task], device)
        vision.config._name_or_path = ""
        vision.save_pretrained(folder)

    out.mkdir(parents=True, exist_ok=True)
    make(out / "base", base)
    for task in paths:
        make(out / task, partial(expert, task))


@torch.no_grad()
def score_all(
    prompts: dict[str, list[list[str]]], paths: dict[str, Path], out: Path, device: torch.device
) -> dict[str, list[float]]:
    """Scores the written files; returns, by row, the accuracy in percent on each task's whole test split."""
    clip = load_clip(out / "base").to(device).eval()
    tokens = on(device, tokenize(CLIPTokenizer.from_pretrained(out / "base"), prompts))
    base = weights(clip.vision_model)
    experts = {
        task: weights(CLIPVisionModel.from_pretrained(out / task, dtype=torch.float32).to(device)) for task in paths
    }
    total = {name: sum(expert[name] - weight for expert in experts.values()) for name, weight in base.items()}
    tests = {task: read_split(path, "test", device) for task, path in paths.items()}
    heads = {task: class_embeddings(clip, tokens[task]) for task in paths}

    def score(state: State, task: str) -> float:
        clip.vision_model.load_state_dict(state, strict=False)
        pictures, labels = tests[task]
        scores = logits(clip.vision_model, clip.visual_projection.weight, heads[task], pictures)
        return 100 * (scores.argmax(1) == labels).float().mean().item()

    def moved(scale: float) -> State:
        return {name: weight + scale * total[name] for name, weight in base.items()}

    rows = {"base": base, "average": moved(1 / len(experts)), "task arithmetic 0.3": moved(0.3)}
    table = {row: [score(state, task) for task in paths] for row, state in rows.items()}
    return {"experts": [score(experts[task], task) for task in paths], **table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with the three npz files")
    parser.add_argument("--suite", choices=("vision3", "vision6"), default="vision3", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: runs/SUITE")
    parser.add_argument("--device", default="auto", help="auto uses an accelerator if one is available")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if arguments.device == "auto" else arguments.device)
    out, prompts, recipe = arguments.out or Path("runs") / arguments.suite, read_prompts(arguments.suite), Recipe()
    if arguments.suite == "vision6":
        halves = [write_halves(arguments.data / f"{name}.npz", out / "data") for name in SETS]
        paths = {task: path for found in halves for task, path in found.items()}
        recipe = Recipe(expert_steps=recipe.expert_steps // 2)
    else:
        paths = {task: arguments.data / f"{task}.npz" for task in SETS} | {"digits": out / "data" / "digits.npz"}
        if not paths["digits"].is_file():
            write_digits(paths["digits"])
    make_all(recipe, prompts, paths, out / "models", device)
    say("scores on the test splits")
    print(f"{'':20}" + "".join(f"{task:>12}" for task in [*paths, "mean"]))
    for row, scores in score_all(prompts, paths, out / "models", device).items():
        print(f"{row:20}" + "".join(f"{value:12.1f}" for value in [*scores, sum(scores) / len(scores)]))


if __name__ == "__main__":
    main()
