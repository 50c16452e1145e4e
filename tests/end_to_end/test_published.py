"""Oracles: the task lists of the published suites, and plain transformers, which loads their checkpoints.

End to end and offline: tiny models and data in a mirror of the hub, with the real ids and layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, T5ForConditionalGeneration

from epmq_cli.commands.run import run
from epmq_cli.config.instantiate import conf_dir
from epmq_cli.families import family_of
from epmq_cli.families.family import load_model
from epmq_cli.pipeline import reload
from tests.conftest import drifted
from tests.helpers.minihub import tokenizer
from tests.helpers.mirror import GLUE, LAYOUTS, glue_mirror, image_mirror, prepare
from tests.helpers.tiers import only

SIZES = {"b32": "base-patch32", "b16": "base-patch16", "l14": "large-patch14"}
COUNTS = {"ta8": 8, "tall14": 14, "tall20": 20}
CLIP_SUITES = [f"clip_vit_{size}_{count}" for size in SIZES for count in COUNTS]
QUICK = ("clip_vit_b32_ta8",)
SMALL = ("group_size=16", "device=cpu", "calib.samples=6", "eval.samples=4", "eval.batch_size=4", "guidance=expert")


def clip_models(root: Path, size: str) -> None:
    """A CLIPModel and the CLIPVisionModel of every task, stored with the prefix of the published files."""
    from transformers import CLIPConfig, CLIPImageProcessor

    from tests.helpers.minihub import VOCABULARY

    parts = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**parts, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    base = CLIPModel(CLIPConfig(text_config={**parts, **tokens}, vision_config=vision, projection_dim=16)).eval()
    place = root / "openai" / f"clip-vit-{SIZES[size]}"
    base.save_pretrained(place)
    tokenizer(place, end=True)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(place)
    for seed, task in enumerate(LAYOUTS):
        expert: Any = drifted(base.vision_model, seed)
        folder = root / "tanganke" / f"clip-vit-{SIZES[size]}_{task}"
        expert.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        renamed = {"vision_model." + name.removeprefix("vision_model."): tensor for name, tensor in stored.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set and every model of the published suites."""
    root = glue_mirror(image_mirror(tmp_path_factory.mktemp("mirror")))
    for size in SIZES:
        clip_models(root, size)
    flan_models(root)
    return root


def flan_models(root: Path) -> None:
    """FLAN-T5-base and its experts, whose files hold the shared table three times and a separate output layer."""
    from tests.helpers.minihub import t5_models

    base: nn.Module = t5_models()
    for seed, name in enumerate(["google/flan-t5-base", *(f"tanganke/flan-t5-base_glue-{task}" for task in GLUE)]):
        folder = root / name
        model: Any = drifted(base, seed) if seed else base
        model.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        copies = {f"{part}.embed_tokens.weight": stored["shared.weight"].clone() for part in ("encoder", "decoder")}
        save_file({**stored, **copies}, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tokenizer(root / "google/flan-t5-base", end=True)


def run_suite(folder: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    """Runs `epmq run` with these overrides; returns the metrics."""
    prepare(monkeypatch, folder / "cache")
    options = [f"data_root={mirror}", f"out={folder}", *SMALL, *overrides]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=options)
    run(cfg, folder, list(overrides), {"merge": "m", "guidance": "g", "quant": "q"})
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


@pytest.mark.parametrize("suite", only(QUICK, CLIP_SUITES))
def test_clip_suites_run_on_all_their_tasks_and_reload(
    suite: str, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = run_suite(tmp_path, mirror, monkeypatch, f"suite={suite}")
    tasks = metrics["scores"]["tasks"]
    assert list(tasks) == list(LAYOUTS)[: COUNTS[suite.rpartition("_")[2]]]
    assert all(set(scores) == {"base", "experts", "merged", "quantized"} for scores in tasks.values())
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        public: Any = CLIPModel.from_pretrained(tmp_path / "checkpoint").eval()
        own: Any = load_model(family_of("clip"), tmp_path / "checkpoint", torch.device("cpu"))
        assert torch.equal(
            public.get_image_features(pixels).pooler_output, own.get_image_features(pixels).pooler_output
        )


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["feature", "expert"])
def test_flan_t5_runs_on_glue_and_reloads(
    guidance: str, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = run_suite(tmp_path, mirror, monkeypatch, "suite=flan_t5_base_glue", f"guidance={guidance}")
    assert list(metrics["scores"]["tasks"]) == list(GLUE)
    assert metrics["scores"]["metrics"]["stsb"] == "spearman"
    names = [layer["name"] for layer in metrics["layers"]]
    assert any("EncDecAttention.k" in name for name in names)
    public: Any = T5ForConditionalGeneration.from_pretrained(tmp_path / "checkpoint").eval()
    own: Any = load_model(family_of("t5"), tmp_path / "checkpoint", torch.device("cpu"))
    ids = torch.randint(5, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(
            public(input_ids=ids, decoder_input_ids=ids).logits, own(input_ids=ids, decoder_input_ids=ids).logits
        )
    assert public.lm_head.weight.data_ptr() != public.shared.weight.data_ptr()


@pytest.mark.slow
def test_a_checkpoint_is_scored_with_its_data_in_another_place(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_suite(tmp_path, mirror, monkeypatch, "suite=flan_t5_base_glue", "eval.stages=[]", "calib.samples=2")
    for root, wanted in ((None, str(mirror)), ("elsewhere", "elsewhere")):
        suite = reload.checkpoint_suite(tmp_path / "checkpoint", None, root)
        assert {suite.root, *(task.data.root for task in suite.members)} == {wanted}  # type: ignore[attr-defined]
    assert "experiment" not in json.loads((tmp_path / "checkpoint" / "epmq.json").read_text())["choices"]
