"""Zero-shot classification of images (Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.4).

A head holds the class embeddings from the base's text tower, or, with `heads: expert`, from the expert's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from epmq_cli.data.batching import Collate
from epmq_cli.data.suite import Task
from epmq_cli.errors import ConfigError, ModelError, literal
from epmq_cli.families.heads import zero_shot
from epmq_cli.families.processors import images, tokens
from epmq_cli.families.tasks.adapter import Head, TaskAdapter
from epmq_cli.families.text_tower import own_text_tower
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.processor_folder import Processor, processor_files
from epmq_cli.models.weights import swapped_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

LAST = 2  # the eos_token_id of old configs, for which transformers takes the largest id of a text


class ZeroShot(TaskAdapter):
    """Classification of images by heads that a text tower makes from the names of the classes."""

    reads = "pictures"
    pipeline = "zero-shot-image-classification"
    heads = "made"
    head_width = "projection_dim"
    sample_types = (Image,)
    head_parts = ("weight",)

    def check_task(self, task: Task) -> None:
        """Requires classes and templates, which make the head."""
        if not task.classes or not task.templates:
            raise ConfigError(
                f"suite.tasks.{task.name} needs classes and templates, which make its head, got "
                f"{literal(task.classes)} and {literal(task.templates)}"
            )

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Passes images through the image processor, as RGB."""
        return images(folder, processor)

    def head(self, model: nn.Module, base: Path, task: Task, expert: ModelFolder, device: torch.device) -> Head:
        """`weight` (classes, projection width): the class embeddings, each of length 1, from the text tower of the base
        or, with `heads: expert`, of the expert."""
        classes, templates = task.classes or (), task.templates or ()
        settings: Any = model.config
        longest = settings.text_config.max_position_embeddings
        own = own_text_tower(expert, model.state_dict()) if task.heads == "expert" else {}
        reader = Processor(expert.path) if own and processor_files(expert.path, "texts") else None
        tokenizer = tokens(base, longest, reader)

        def embed(texts: list[str]) -> Tensor:
            _check_fits(tokenizer(texts, padding=True, verbose=False), texts, longest, task.name)
            encoding = self.encoded(tokenizer, texts, settings.text_config, base)
            embedding: Tensor = model.get_text_features(**encoding.to(device)).pooler_output  # type: ignore[operator]
            return embedding

        with swapped_weights(model, own):
            return {"weight": zero_shot.class_embeddings(embed, classes, templates)}

    def encoded(self, tokenizer: Any, texts: list[str], config: Any, base: Path) -> Any:
        """The inputs of the text tower for texts that fit; `config`: of the tower, in the folder `base`."""
        encoding, end = tokenizer(texts, padding=True, truncation=True), config.eos_token_id
        if not _ends(encoding["input_ids"], end):
            raise ModelError(
                f"{base / 'config.json'} has a text_config.eos_token_id of {literal(end)}, the token at which text "
                "embeddings are read, and the tokenizer beside it does not end texts with it; fetch both again"
            )
        return encoding

    def head_inputs(self, model: nn.Module, features: Tensor, head: Head) -> Tensor:
        """The features, normalized to length 1."""
        return torch.nn.functional.normalize(features, dim=-1)

    def logits(self, model: nn.Module, features: Tensor, head: Head) -> Tensor:
        """100 x cosine; the rows of a head that was solved again need not have length 1."""
        return zero_shot.logits(features, head["weight"])


class PaddedZeroShot(ZeroShot):
    """The same for SigLIP, whose text tower reads texts that are padded to all of its positions, without a mask. Its
    sigmoid and its bias do not change which class is the most likely one."""

    head_width = "vision_config.hidden_size"

    def encoded(self, tokenizer: Any, texts: list[str], config: Any, base: Path) -> Any:
        """The inputs of the text tower."""
        longest = config.max_position_embeddings
        encoding = tokenizer(texts, padding="max_length", max_length=longest, truncation=True)
        for name in {*encoding} - {"input_ids"}:
            del encoding[name]
        return encoding


def _check_fits(encoding: Any, texts: list[str], longest: int, task: str) -> None:
    """Raises ConfigError if a text exceeds the text tower, which could cut off the class."""
    lengths = encoding["attention_mask"].sum(1).tolist()
    long = next((index for index, length in enumerate(lengths) if length > longest), None)
    if long is not None:
        raise ConfigError(
            f"suite.tasks.{task}: {texts[long]!r}, a template with its class, has {lengths[long]} tokens, and the text "
            f"tower of the base reads at most {longest}; shorten the class or the template"
        )


def _ends(ids: Tensor, end: object) -> bool:
    """Whether each text (texts, tokens) has the end token behind its first token. Otherwise transformers reads the
    embedding of the first token, which does not depend on the text."""
    if end == LAST or not isinstance(end, int):
        return end == LAST
    return bool(((ids == end).int().argmax(1) > 0).all())
