"""Oracles: the header of a PNG, the colours of the page, and a picture drawn twice."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from PIL import Image

from epmq_cli.report.page import pictures
from tests.helpers.reports import content

score_pictures = pictures.score_pictures  # runs in tests have a shorter one
SCORES = content({"a": (0.1, 0.5, 0.8, 0.9), "<b> $x$ \u4e2d": (0.2, 0.4, 0.3, 0.9)})["scores"]


def test_a_picture_has_the_colours_of_a_light_page_and_the_same_bytes_again() -> None:
    (name,) = found = score_pictures(SCORES)
    assert (name, found) == ("scores.png", score_pictures(SCORES))
    assert found[name].alt == (
        "Accuracy in % of base, merge, result and experts by task. average: base 15.0, merged 45.0, quantized 55.0, "
        "experts 90.0; 22% of the gap from the merge to the experts is closed."
    )
    pixels = np.array(Image.open(io.BytesIO(found[name].png)).convert("RGB"))
    assert pixels.shape[1] == 2 * pictures.WIDTH
    colours = {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
    assert {(255, 255, 255), (0x0A, 0x5F, 0xB4), (0x1B, 0x1F, 0x24)} <= colours  # paper, accent, ink
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert not colours & {(0x0E, 0x0E, step) for step in range(16)}  # placeholders


def test_perplexities_have_a_picture_of_their_own() -> None:
    mixed = content({"a": (0.1, 0.5, 0.8, 0.9), "b": (30.0, 12.0, 9.0, 8.0)})["scores"]
    mixed["metrics"]["b"] = "perplexity"
    assert list(score_pictures(mixed)) == ["scores.png", "perplexities.png"]
    assert score_pictures({"tasks": {}, "metrics": {}, "average": {}}) == {}


def test_a_failure_to_draw_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(panel: object, scores: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(pictures, "_png", fail)
    with caplog.at_level(logging.WARNING, "epmq"):
        assert score_pictures(SCORES) == {}
    assert caplog.messages == ["the model card has no picture of the scores (RuntimeError: no fonts)"]
