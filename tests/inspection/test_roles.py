"""Oracle: the run's own code on the loaded model: the linears that it quantizes and the tensors that it merges."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES, claiming
from epmq_cli.families.family import linear_shapes
from epmq_cli.inspection.opened import open_headers
from epmq_cli.inspection.roles import HEAD, LEFT, QUANTIZED, roles_of
from epmq_cli.models.model_folder import ModelFolder
from tests.helpers.architectures import SEEING, TAKEN
from tests.helpers.tiers import first


def check_against_run(path: Path) -> None:
    folder = ModelFolder(path, "base")
    family = claiming(folder.config)
    model = family.load(path, weights=False)
    stored = family.tensor_names(folder)
    name, roles = roles_of(folder.config, folder.infos, path)
    assert name == family.name
    assert {own for own, (_, kind) in roles.items() if kind == QUANTIZED} == {
        stored[f"{linear}.weight"] for linear, _ in linear_shapes(model, family)
    }
    assert {own for own, (_, kind) in roles.items() if kind not in (HEAD, LEFT)} == {*stored.values()}


@pytest.mark.parametrize("kind", first(1, sorted(TAKEN | SEEING)))
def test_roles_of_decoders_are_those_of_a_run(kind: str, tmp_path: Path) -> None:
    (TAKEN | SEEING)[kind]().save_pretrained(tmp_path)
    check_against_run(tmp_path)


def test_roles_of_encoders_are_those_of_a_run(clip_hub: Path, bert_hub: Path) -> None:
    check_against_run(clip_hub / "base")
    check_against_run(bert_hub / "base")


def test_an_expert_has_a_head_and_every_part_has_its_tensors(bert_hub: Path) -> None:
    opened = open_headers(str(bert_hub / "first"))
    _, roles = roles_of(opened.config, opened.infos, bert_hub / "first")
    assert {name for name, (_, kind) in roles.items() if kind == HEAD} == {"classifier.weight", "classifier.bias"}
    assert roles["bert.embeddings.word_embeddings.weight"] == ("embeddings", "merged")
    assert roles["bert.encoder.layer.1.output.LayerNorm.weight"] == ("norms", "merged")
    assert roles["bert.encoder.layer.0.intermediate.dense.weight"] == ("blocks", QUANTIZED)
    assert roles["bert.pooler.dense.weight"] == ("readout", "merged")


def test_the_patches_of_a_vit_are_embeddings(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    opened = open_headers(str(tmp_path))
    family, roles = roles_of(opened.config, opened.infos, tmp_path)
    assert family == "vit"
    assert {part for name, (part, _) in roles.items() if "embeddings." in name} == {"embeddings"}
    assert {part for part, _ in roles.values()} == {"embeddings", "blocks", "norms", "heads"}


def test_a_model_of_no_family_is_refused_as_by_a_run(tmp_path: Path) -> None:
    config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, state_size=2, vocab_size=10)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    opened = open_headers(str(tmp_path))
    with pytest.raises(ModelError) as refused:
        roles_of(opened.config, opened.infos, tmp_path)
    with pytest.raises(ModelError) as wanted:
        claiming(opened.config)
    assert str(refused.value) == str(wanted.value)
    assert "mamba" not in {kind for family in FAMILIES.values() for kind in family.model_types}
