"""Tasks whose answers a model generates from sounds, such as transcripts of speech."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.sounds import Sound
from epmq_cli.data.suite import Task
from epmq_cli.errors import ConfigError
from epmq_cli.families.processors import own_tokenizer
from epmq_cli.families.sound_features import sounds
from epmq_cli.families.tasks.generated_text import GeneratedText, room
from epmq_cli.models.processor_folder import Processor

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 4  # tokens that Whisper's answers may start with: start, language, task, no timestamps


class SpokenText(GeneratedText):
    """Answers to sounds. A task's own processor reads its sounds only; the base's tokenizer reads the answers."""

    reads = "sounds"
    pipeline = "automatic-speech-recognition"
    sample_types = (Sound,)

    def check_task(self, task: Task) -> None:
        """Requires room for more than the tokens that answers start with."""
        super().check_task(task)
        if task.written <= FIRST:
            raise ConfigError(
                f"suite.tasks.{task.name}.answer_length must be more than {FIRST}, the tokens that answers may start "
                f"with, got {task.written}"
            )

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Turns sounds into the features that the model's own extractor makes."""
        features = sounds(folder, processor)
        return lambda samples: {**features(samples), **room(task, len(samples))}

    def tokenizer(self, folder: Path, processor: Processor | None) -> Any:
        """The base's tokenizer."""
        return own_tokenizer(folder)

    def generate(self, model: Any, batch: Batch, length: int) -> Tensor:
        """The tokens of answers with those that they start with."""
        given = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True}
        most = length - FIRST  # which transformers adds to the tokens that answers start with
        found: Tensor = model.generate(**batch, max_length=most, force_unique_generate_call=True, **given)["sequences"]
        return found
