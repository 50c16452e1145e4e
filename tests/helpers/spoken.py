"""A miniature hub of Whispers: a random base, two experts, and noise as speech."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np

from tests.conftest import TASKS, WORDS, write_suite
from tests.helpers.encoder_decoders import extractor, whisper
from tests.helpers.minihub import VOCABULARY, models, tokenizer

RATE = 16000


def write_wav(path: Path, values: np.ndarray, rate: int = RATE, width: int = 2) -> Path:
    """Writes values (samples, channels) from -1 to 1 as whole numbers of so many bytes."""
    whole = np.round(values * (2 ** (8 * width - 1) - 1)).astype("<i4")
    shifted = whole + 128 if width == 1 else whole
    content = shifted[..., None].view(np.uint8).reshape(*values.shape, 4)[..., :width]
    with wave.open(str(path), "wb") as file:
        file.setparams((values.shape[1], width, rate, len(values), "NONE", "not compressed"))
        file.writeframes(content.tobytes())
    return path


def whisper_hub(folder: Path, train: int = 24, test: int = 6) -> Path:
    """Whispers, a tokenizer, an extractor, and sounds with texts."""
    models(folder, whisper(len(VOCABULARY)))
    tokenizer(folder / "base", end=True)
    extractor().save_pretrained(folder / "base")
    generator, entries = np.random.default_rng(0), {}
    for task in TASKS:
        data = {"_target_": "epmq_cli.data.sounds.SoundTable"}
        for split, count in (("train", train), ("test", test)):
            rows = []
            for number in range(count):
                name = f"{task}_{split}_{number}.wav"
                size = int(generator.integers(400, 4000))
                write_wav(folder / name, 0.2 * generator.standard_normal((size, 1)).clip(-4, 4))
                words = generator.choice(WORDS, generator.integers(1, 5))
                rows.append(json.dumps({"audio": name, "text": " ".join(words)}))
            data[split] = str(folder / f"{task}_{split}.jsonl")
            Path(data[split]).write_text("\n".join(rows) + "\n")
        entries[task] = {"expert": str(folder / task), "metric": "wer", "answer_length": 12, "data": data}
    write_suite(folder, {"family": "whisper", "base": str(folder / "base"), "tasks": entries})
    return folder
