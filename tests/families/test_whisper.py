"""Oracles: Whisper in transformers, and its feature extractor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoTokenizer

from epmq_cli.data.sounds import Sound
from epmq_cli.errors import ConfigError, DataError, ModelError
from epmq_cli.evaluate.written import word_error_rate
from epmq_cli.families import FAMILIES
from epmq_cli.families.sound_features import resampled, sounds
from tests.helpers.edited import copied
from tests.helpers.encoder_decoders import extractor
from tests.helpers.hubs import Scene, run_in
from tests.helpers.minihub import Hub


def test_transcripts_are_scored_by_their_words(hub: Hub, tmp_path: Path) -> None:
    """The checkpoint transcribes in transformers as it is scored."""
    checkpoint = run_in(tmp_path, hub("whisper"), "eval.stages=[quantized]")
    scores = json.loads((tmp_path / "metrics.json").read_text())["scores"]["tasks"]
    model: Any = AutoModelForSpeechSeq2Seq.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(hub("whisper") / "base")
    family, job = FAMILIES["whisper"], Scene(hub("whisper")).job
    for task in job.suite.members:
        samples = task.data.load("test")
        features = sounds(hub("whisper") / "base")([*samples.inputs])["input_features"]
        given = model.generate(input_features=features, max_length=12 - 4, do_sample=False, num_beams=1)
        texts = tokenizer.batch_decode(given, skip_special_tokens=True)
        assert scores[task.name]["quantized"] == word_error_rate(texts, samples.references or ()).value
    assert family.reads == "sounds"


def test_answers_begin_as_whispers_do(hub: Hub) -> None:
    for batch in Scene(hub("whisper")).batches:
        assert batch["decoder_input_ids"].shape[1] < 12
        assert (batch["decoder_input_ids"][:, 0] == 1).all()
        assert batch["decoder_attention_mask"][:, 0].all()


def test_features_are_those_of_the_extractor(hub: Hub) -> None:
    values = np.sin(np.arange(1000) / 9).astype(np.float32)
    wanted = extractor()([values], sampling_rate=16000, return_tensors="pt")["input_features"]
    collate = sounds(hub("whisper") / "base")
    assert torch.equal(collate([Sound(values, 16000, "x.wav")])["input_features"], wanted)
    with pytest.raises(DataError, match=r"x.wav lasts 2.0 s, and the model reads 1 s at a time; cut it, or remove it"):
        collate([Sound(np.zeros(32000, np.float32), 16000, "x.wav")])


def test_other_rates_are_resampled() -> None:
    """A sine, up to its ends."""
    found = resampled(Sound(np.sin(np.arange(800) / 40).astype(np.float32), 8000, "x.wav"), 16000)
    assert len(found) == 1600
    np.testing.assert_allclose(found[100:-100], np.sin(np.arange(1600) / 80)[100:-100], atol=2e-3)


def test_an_extractor_of_another_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    source = copied(hub("whisper"), tmp_path / "hub")
    path = source / "base" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chunk_length": 2, "nb_max_frames": 100}))
    with pytest.raises(
        ModelError, match=r"makes features of \[8, 100\], and the model reads \[8, 50\]; set feature_size"
    ):
        run_in(tmp_path / "run", source)


def test_texts_and_short_answers_are_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="answer_length must be more than 4, the tokens that answers may start with"):
        run_in(tmp_path, hub("whisper"), "suite.tasks.first.answer_length=4")
    with pytest.raises(ConfigError, match=r"first.answer_length must be at most 130, the positions of the model"):
        run_in(tmp_path, hub("whisper"), "suite.tasks.first.answer_length=131")
