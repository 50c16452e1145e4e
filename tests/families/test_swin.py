"""Swin. Oracles: the forward pass and the hidden states of transformers, the names of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, SwinConfig, SwinForImageClassification, SwinModel

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.merge.average import Average
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.windows import WindowedLayer, in_windows
from tests.helpers.architectures import built
from tests.helpers.lone import assert_same, merged_folder, suite_of
from tests.helpers.minihub import SWIN, build

FAMILY = FAMILIES["swin"]
PICTURES = {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def model_of(**changes: Any) -> Any:
    return built(lambda: SwinModel(SwinConfig(**{**SWIN, **changes})))


@torch.inference_mode()
def test_blocks_in_windows_compute_what_those_of_transformers_do() -> None:
    own, other = model_of(), model_of()
    in_windows(own)
    assert sum(isinstance(module, WindowedLayer) for module in own.modules()) == 4
    found, wanted = (model(**PICTURES, output_hidden_states=True, output_attentions=True) for model in (own, other))
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state)
    for one, two in zip(found.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(one, two)


@torch.inference_mode()
@pytest.mark.parametrize("window", [1, 2, 4])
def test_stages_hand_on_what_those_of_transformers_do(window: int) -> None:
    """Also where three stages have an odd number of patches on each side."""
    sizes = {"image_size": 20, "depths": [1, 2, 1], "num_heads": [2, 2, 4]} if window == 1 else {}
    model = model_of(window_size=window, **sizes)
    side = model.config.image_size
    batch = {"pixel_values": PICTURES["pixel_values"][..., :side, :side]}
    wanted = model(**batch, output_hidden_states=True)
    in_windows(model)
    stacks = FAMILY.stacks(model)
    for stack, before, behind in zip(stacks, wanted.hidden_states[:-1], wanted.hidden_states[1:], strict=True):
        hidden, edge = before, round(before.shape[1] ** 0.5)
        for block in stack.blocks:
            hidden = block.module(hidden, (edge, edge))[0]
        if stack.handed is not None:
            hidden = batch[stack.handed] = stack.readout.module(hidden)
        torch.testing.assert_close(hidden, behind)
        torch.testing.assert_close(FAMILY.features(model, batch), wanted.pooler_output)


def test_files_with_older_names_are_read_under_the_models_own(tmp_path: Path) -> None:
    """Those that save_pretrained writes, and the buffers that files of earlier versions have."""
    model = built(lambda: SwinForImageClassification(SwinConfig(**SWIN)))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    index = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    save_file({**tensors, index: torch.zeros(16, 16, dtype=torch.int64)}, file, {"format": "pt"})
    folder = ModelFolder(tmp_path, "base")
    names = FAMILY.tensor_names(folder)
    own = model.swin.state_dict()
    assert {*names} == {*own}
    for name, stored in names.items():
        assert torch.equal(folder.tensor(stored), own[name]), name


@pytest.mark.parametrize(
    ("changes", "stage"), [({"image_size": 40}, 1), ({"image_size": 48}, 2), ({"image_size": [32, 16]}, 1)]
)
def test_windows_that_do_not_fill_a_picture_are_refused(changes: dict[str, Any], stage: int, tmp_path: Path) -> None:
    """Transformers fills such windows up with zeros behind the norm."""
    SwinModel(SwinConfig(**{**SWIN, **changes})).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"windows that fill the picture: those of stage {stage} have 4 x 4 patches"):
        FAMILY.settings(ModelFolder(tmp_path, "base"))


@pytest.mark.slow
def test_a_merge_of_one_expert_is_that_expert(tmp_path: Path) -> None:
    hub = build(tmp_path, "swin")
    suite = suite_of("swin", hub / "base", {"first": hub / "first"})
    merged = merged_folder(tmp_path / "merged", suite, method=Average())
    assert_same(AutoModel.from_pretrained(merged), AutoModel.from_pretrained(hub / "first"), PICTURES)
