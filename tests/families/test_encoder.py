"""Oracles: transformers' reading of two spellings of one config; the readout of each family by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.families.deberta import DEBERTA
from epmq_cli.families.encoder import Encoder
from epmq_cli.families.modernbert import MODERNBERT
from epmq_cli.families.structure import MEAN, Norm
from epmq_cli.models.model_folder import ModelFolder
from tests.helpers.hubs import Scene
from tests.helpers.minihub import Hub


def with_settings(hub: Path, folder: Path, **settings: object) -> ModelFolder:
    shutil.copytree(hub / "base", folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return ModelFolder(folder, "base")


def test_a_setting_in_another_spelling_is_the_same_setting(hub: Hub, tmp_path: Path) -> None:
    """`p2c|c2p` in the files of DeBERTa 3, and the list that transformers writes for experts."""
    spelled = [["p2c", "c2p"], "p2c|c2p"]
    folders = [with_settings(hub("deberta"), tmp_path / str(i), pos_att_type=each) for i, each in enumerate(spelled)]
    assert DEBERTA.settings(folders[0]) == DEBERTA.settings(folders[1])
    usual = with_settings(hub("deberta"), tmp_path / "usual", position_buckets=...)
    assert DEBERTA.settings(usual)["position_buckets"] != DEBERTA.settings(folders[0])["position_buckets"]


def test_a_setting_that_the_steps_do_not_describe_is_refused(hub: Hub, tmp_path: Path) -> None:
    folder = with_settings(hub("deberta"), tmp_path / "base", conv_kernel_size=3)
    with pytest.raises(ModelError, match="has conv_kernel_size 3, family deberta takes 0 only"):
        DEBERTA.settings(folder)


@pytest.mark.parametrize(("kind", "token", "lone"), [("modernbert", MEAN, None), ("modernbert-cls", 0, 0)])
def test_the_pooling_of_the_config_determines_the_readout(kind: str, token: object, lone: int | None, hub: Hub) -> None:
    (stack,) = MODERNBERT.stacks(Scene(hub(kind)).model)
    assert (stack.read_token, stack.lone_token) == (token, lone)
    assert stack.readout.steps == (Norm("final_norm"),)


def test_every_encoder_is_a_row() -> None:
    """Oracle: the architectures of the families. Only families with several stacks, two towers or layouts detected by
    name are not rows."""
    rows = {name for name, family in FAMILIES.items() if type(family.architecture) is Encoder}
    assert {*FAMILIES} - rows == {"bart", "beit", "causal_lm", "clip", "open_clip", "siglip", "swin", "t5", "whisper"}
