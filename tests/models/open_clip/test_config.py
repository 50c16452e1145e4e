"""Oracle: the architectures that open_clip lists, and options of other ones by hand."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import open_clip
import pytest

from epmq_cli.errors import ModelError
from epmq_cli.models.open_clip.config import clip_config
from epmq_cli.models.open_clip.convert import _described
from tests.end_to_end.test_fuzz import with_an_odd_value
from tests.helpers.counts import FUZZED, TRIED
from tests.models.open_clip.test_tensors import MODEL


def changed(**options: Any) -> dict[str, Any]:
    """A config with these options of model_cfg, given as part__option."""
    config = copy.deepcopy(MODEL)
    for key, value in options.items():
        part, _, name = key.rpartition("__")
        (config[part] if part else config)[name] = value
    return {"model_cfg": config}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (changed(vision_cfg__timm_model_name="convnext_base"), "timm_model_name is 'convnext_base'"),
        (changed(vision_cfg__layers=[3, 4, 6, 3]), r"layers is \[3, 4, 6, 3\] \(a ResNet\)"),
        (changed(vision_cfg__attentional_pool=True), "attentional_pool is True"),
        (changed(vision_cfg__ls_init_value=1e-5), "ls_init_value is 1e-05"),
        (changed(vision_cfg__pool_type="avg"), "vision_cfg.pool_type is 'avg'"),
        (changed(vision_cfg__patch_size=[16, 8]), r"patch_size is \[16, 8\]"),
        (changed(text_cfg__hf_model_name="roberta-base"), "hf_model_name is 'roberta-base'"),
        (changed(text_cfg__vocab_size=32000), "vocab_size is 32000"),
        (changed(text_cfg__act_kwargs={"approximate": "tanh"}), "act_kwargs is"),
        (changed(multimodal_cfg={"width": 8}), "model_cfg.multimodal_cfg is"),
        (changed(init_logit_bias=-10), "model_cfg.init_logit_bias is -10"),
        ({"model_cfg": {"embed_dim": 8}}, "model_cfg.vision_cfg is missing"),
    ],
)
def test_other_architectures_are_refused_by_name(config: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError, match=rf"base: .*{found}.* in x.json; family open_clip needs a plain"):
        clip_config(config, Path("x.json"), "base")


def plain(config: dict[str, Any]) -> bool:
    try:
        clip_config({"model_cfg": config}, Path("x.json"), "base")
    except ModelError:
        return False
    return True


def test_every_architecture_of_open_clip_is_classified() -> None:
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    taken = {name for name, config in configs.items() if plain(config)}
    assert {"ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14", "ViT-B-32-256"} <= taken
    for name in ("RN50", "coca_ViT-B-32", "ViT-B-16-SigLIP", "convnext_base", "roberta-ViT-B-32", "ViT-H-14-CLIPA"):
        assert name not in taken
    assert len(taken) > 20


def test_any_value_in_a_config_leads_to_sentences_only() -> None:
    given = {"resize_mode": "shortest", "interpolation": "bicubic", "mean": [0.1, 0.2, 0.3], "std": [0.1, 0.2, 0.3]}
    whole = json.loads(json.dumps({"model_cfg": MODEL, "preprocess_cfg": given}))
    whole["model_cfg"]["vision_cfg"]["norm_kwargs"] = {"eps": 1e-5}
    refused = 0
    for seed in range(300):
        config = with_an_odd_value(whole, random.Random(seed))
        try:
            _described(config if isinstance(config, dict) else {}, Path("x.json"), "base")
        except ModelError as error:
            refused += 1
            assert str(error).startswith("base: ")
            assert "\n" not in str(error)
        TRIED[FUZZED] += 1
    assert 50 < refused < 300
