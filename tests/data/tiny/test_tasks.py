"""Oracles: sums of the drawn bytes, invariants of the sampling, the scores that the shipped models were trained to
reach."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionModel

import epmq_cli
from epmq_cli.data.tiny import draw
from epmq_cli.data.tiny.tasks import CLASSES, Tiny, images
from epmq_cli.errors import ConfigError
from tests.helpers.tiers import first

SHIPPED = Path(epmq_cli.__path__[0]) / "shipped" / "tiny"
SUITE = Path(__file__).resolve().parents[3] / "conf" / "suite" / "tiny.yaml"

# Sum of all bytes of the first 20 training pictures of each task, and crc32 of their labels. The experts were trained
# on these; another processor's sine may differ in its last digit, which moves a sum of millions by a few units.
DRAWN = {
    "shapes": (11175980, 2171222446),
    "textures": (4289291, 408561306),
    "digits": (3490284, 2724460995),
    "arrows": (5888245, 2379414493),
    "counts": (5783480, 2327673296),
}


@pytest.mark.parametrize("task", CLASSES)
def test_the_pictures_are_those_that_the_experts_were_trained_on(task: str) -> None:
    pixels, labels = images(task, "train", 20)
    assert int(pixels.astype(np.int64).sum()) == pytest.approx(DRAWN[task][0], rel=1e-5)
    assert zlib.crc32(labels.tobytes()) == DRAWN[task][1]


@pytest.mark.parametrize("task", CLASSES)
def test_a_longer_list_starts_with_the_shorter_one(task: str) -> None:
    few, few_labels = images(task, "test", 30)
    many, many_labels = images(task, "test", 100)
    assert np.array_equal(few, many[:30])
    assert np.array_equal(few_labels, many_labels[:30])


@pytest.mark.parametrize("task", CLASSES)
def test_shapes_types_and_balance(task: str) -> None:
    pixels, labels = images(task, "train", 120)
    assert pixels.shape == (120, 32, 32, 3) and pixels.dtype == np.uint8
    assert labels.shape == (120,) and labels.dtype == np.int64
    assert set(np.bincount(labels)) == {120 // len(CLASSES[task])}


def test_splits_differ() -> None:
    train, test = (images("digits", split, 50)[0] for split in ("train", "test"))
    assert not any(np.array_equal(one, other) for one in train for other in test)


def test_load_returns_pictures_and_labels() -> None:
    source = Tiny(task="arrows", train=12, test=7)
    assert [len(source.load("train")), len(source.load("test"))] == [12, 7]
    samples = source.load("test")
    pixels, labels = images("arrows", "test", 7)
    assert np.array_equal(np.stack([np.asarray(each) for each in samples.inputs]), pixels)
    assert torch.equal(samples.labels, torch.from_numpy(labels))


def test_a_count_takes_the_first_pictures_or_a_draw() -> None:
    source = Tiny(task="counts", train=30, test=7)
    first, drawn = source.load("train", 5), source.load("train", 5, seed=2)
    pixels, labels = images("counts", "train", 30)
    rows = [next(i for i in range(30) if np.array_equal(np.asarray(image), pixels[i])) for image in drawn.inputs]
    assert np.array_equal(np.stack([np.asarray(each) for each in first.inputs]), pixels[:5])
    assert drawn.labels.tolist() == labels[rows].tolist()
    assert len(set(rows)) == 5 and rows != list(range(5))


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="one of shapes, textures, .* got 'cars'"):
        Tiny(task="cars", train=1, test=1)


@pytest.mark.parametrize(("train", "test"), [(0, 1), (1, 0), (-5, 1)])
def test_counts_below_one_are_refused(train: int, test: int) -> None:
    with pytest.raises(ConfigError, match=r"data.(train|test) must be a whole number in \[1, 1048576\], got"):
        Tiny(task="digits", train=train, test=test)


def test_the_suite_names_the_same_classes_in_the_same_order() -> None:
    tasks = OmegaConf.load(SUITE).tasks
    assert {str(name): tuple(task.classes) for name, task in tasks.items()} == CLASSES


def test_shipped_files_are_small_and_float16() -> None:
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5_000_000
    for file in SHIPPED.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_the_tokenizer_ends_prompts_where_the_text_tower_reads() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "base")
    config = CLIPConfig.from_pretrained(SHIPPED / "base")
    ids = tokenizer("A drawing of a circle.").input_ids
    assert [ids[0], ids[-1]] == [config.text_config.bos_token_id, config.text_config.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a drawing of a circle ."


@torch.no_grad()
@pytest.mark.parametrize("task", first(2, CLASSES))
def test_each_expert_scores_at_least_90_and_beats_the_base(task: str) -> None:
    clip = CLIPModel.from_pretrained(SHIPPED / "base", dtype=torch.float32)
    expert = CLIPVisionModel.from_pretrained(SHIPPED / "experts" / task, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "base")
    processor = CLIPImageProcessor.from_pretrained(SHIPPED / "base")
    entry = OmegaConf.load(SUITE).tasks[task]
    head = torch.zeros(len(entry.classes), clip.config.projection_dim)
    for template in entry.templates:
        prompts = tokenizer([template.format(name) for name in entry.classes], padding=True, return_tensors="pt")
        head += torch.nn.functional.normalize(clip.get_text_features(**prompts).pooler_output, dim=-1)
    samples = Tiny(task=task, train=1, test=400).load("test")
    pixels = processor(samples.inputs, return_tensors="pt").pixel_values

    def accuracy(vision: torch.nn.Module) -> float:
        scores = (
            clip.visual_projection(vision(pixel_values=pixels).pooler_output) @ (head / head.norm(dim=1)[:, None]).T
        )
        return (scores.argmax(1) == samples.labels).float().mean().item()

    assert accuracy(expert) >= 0.9
    assert accuracy(clip.vision_model) <= accuracy(expert) - 0.15


def test_subjects_on_plain_ground_have_two_distant_colours_in_either_order() -> None:
    """Like the split that the base was trained on. Either colour may be the brighter one."""
    numbers = np.random.default_rng(0).random((64, draw.COLUMNS))
    one, other = draw._two_colours(draw.Dice(numbers))
    assert one.shape == other.shape == (64, 1, 3)
    assert bool((abs(one - other) >= 0.2).all())
    brighter = (one > other).all(-1).ravel()
    assert 10 < brighter.sum() < 54
    plain = draw.paint("counts", draw.Dice(numbers), np.arange(64) % 4, in_scene=False)
    scene = draw.paint("counts", draw.Dice(numbers), np.arange(64) % 4, in_scene=True)
    assert plain.shape == scene.shape == (64, 32, 32, 3)
    assert not np.array_equal(plain, scene)
