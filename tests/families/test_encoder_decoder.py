"""Oracles: models of transformers, loaded and called by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from epmq_cli.calibrate.embeddings import _numbers
from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from tests.helpers.encoder_decoders import FORMS, encoder_decoder
from tests.helpers.hubs import Scene, lone_expert, run_in, walk
from tests.helpers.minihub import Hub
from tests.helpers.tiers import only, slow

FAST = ("bart",)
ANSWER: dict[str, Any] = {"max_length": 10, "do_sample": False, "num_beams": 1}


@pytest.mark.parametrize("kind", only(FAST, FORMS))
def test_a_lone_expert_is_reproduced(kind: str, hub: Hub) -> None:
    far, found, wanted = lone_expert(hub(kind), "guidance.readout_weight=1", "calib.samples=40")
    error = (found - wanted).square().sum() / (far - wanted).square().sum()
    assert error < 0.05


ROUNDED = "bits=8 group_size=-1 quant.format=w8a8 quant=rtn"  # scored with rounded inputs
RELOADED = [*only([("bart", "guidance=feature")], ((kind, "guidance=feature") for kind in FORMS))]
RELOADED += [slow((kind, options)) for kind in ("bart", "marian", "umt5") for options in (ROUNDED, "quant=awq")]


@pytest.mark.parametrize(("kind", "options"), RELOADED)
def test_checkpoints_reload_with_equal_outputs_and_answers(kind: str, options: str, hub: Hub, tmp_path: Path) -> None:
    given = [*options.split(), "eval.samples=4"]
    checkpoint, scene = run_in(tmp_path / "run", hub(kind), *given), Scene(hub(kind), *given)
    public: Any = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    student: Any = walk(hub(kind), *given).student
    batch = scene.batches[0]
    with torch.inference_mode():
        assert torch.equal(public(**batch).logits, student(**batch).logits)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(public.generate(**prompt, **ANSWER), student.generate(**prompt, **ANSWER))


@pytest.mark.parametrize("kind", ["bart", "blenderbot"])
def test_the_rows_of_positions_are_those_that_the_model_looks_up(kind: str) -> None:
    """Oracle: the places of the rows that change a position's output, found one by one."""
    places = encoder_decoder(kind, 24).model.decoder.embed_positions
    options = {"position_ids": torch.arange(5)}
    found = _numbers(places, len(places.weight), (torch.zeros(1, 5, dtype=torch.int64), 0), options)
    assert torch.equal(places.weight[found].reshape(5, 32), places(torch.zeros(1, 5), 0, **options).reshape(5, 32))


def test_blocks_of_another_kind_are_refused_by_name() -> None:
    model = encoder_decoder("bart", 24)
    model.model.decoder.layers[1].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"base: model.decoder.layers.1 of Bart.* has extra.weight, which no step"):
        FAMILIES["bart"].blocks(model)
    del model.model.decoder.layers[1].extra, model.model.decoder.layers[1].fc1
    with pytest.raises(ModelError, match=r"model.decoder.layers.1 of Bart.* has no feed-forward that the family knows"):
        FAMILIES["bart"].blocks(model)
