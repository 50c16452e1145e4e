"""Oracle: outputs of transformers with the factors in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from epmq_cli.families import FAMILIES
from epmq_cli.families.family import load_model
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.weights import copy_into
from tests.conftest import TASKS
from tests.helpers.lone import merged_folder, suite_of
from tests.helpers.minihub import build
from tests.helpers.tiers import first


@pytest.mark.parametrize("kind", first(1, ["beit", "dinov2", "dinov2-registers"]))
def test_a_folded_model_has_factors_of_one_and_the_same_outputs(kind: str, tmp_path: Path) -> None:
    hub, family = build(tmp_path, kind), FAMILIES[kind.partition("-")[0]]
    folder = family.folded(ModelFolder(hub / "first", "expert"))
    names = family.tensor_names(folder)
    tensors = {name: folder.tensor(stored) for name, stored in names.items()}
    factors = [name for name in names if family.is_folded(name)]
    assert len(factors) == 4
    assert all(bool((tensors[name] == 1).all()) for name in factors)
    model = load_model(family, hub / "first", torch.device("cpu"))
    assert not any(bool((model.get_parameter(name) == 1).all()) for name in factors)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    with torch.inference_mode():
        wanted = family.features(model, batch)
        copy_into(model, tensors)
        torch.testing.assert_close(family.features(model, batch), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", first(1, ["dinov2", "beit"]))
def test_a_lone_expert_of_a_merge_has_its_outputs_whatever_the_base_s_factors_are(kind: str, tmp_path: Path) -> None:
    hub = build(tmp_path, kind)
    suite = suite_of(kind, hub / "base", {"first": hub / "first"})
    assert SuiteModels(suite, FAMILIES[kind]).rewritten
    merged: Any = AutoModel.from_pretrained(merged_folder(tmp_path / "merged", suite)).eval()
    expert: Any = AutoModel.from_pretrained(hub / "first").eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, wanted = (model(pixel_values=pixels).last_hidden_state for model in (merged, expert))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_an_adapter_is_folded_with_the_base_s_factors(tmp_path: Path) -> None:
    """Equals the adapter merged into the base by hand: out = factor * ((W + B A) x + b)."""
    from peft import LoraConfig, get_peft_model

    hub = build(tmp_path, "dinov2")
    base: Any = AutoModel.from_pretrained(hub / "base")
    tuned: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj", "fc2"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    suite = suite_of("dinov2", hub / "base", dict.fromkeys(TASKS, tmp_path / "adapter"))
    source = SuiteModels(suite, FAMILIES["dinov2"]).source
    own = dict(tuned.merge_and_unload().named_parameters())
    for part, scale in (("attention.o_proj", "layer_scale1"), ("mlp.fc2", "layer_scale2")):
        block = "encoder.layer.0"
        wanted = own[f"{block}.{scale}.lambda1"][:, None] * own[f"{block}.{part}.weight"]
        torch.testing.assert_close(source.expert("first", f"{block}.{part}.weight"), wanted.detach())
