"""Oracle: the number of positions that the authors state in the configs, with the described scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from epmq_cli.data.documents import Documents
from epmq_cli.data.suite import Suite
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.pipeline.preflight import check_lengths

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WITH = {"factor": 4.0, "rope_theta": 1e4}
LIMITS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "llama": ("causal_lm", {"max_position_embeddings": 64}, 64),
    "llama, linear": (
        "causal_lm",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "linear", **WITH}},
        256,
    ),
    "llama, yarn": (
        "causal_lm",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 64, **WITH},
        },
        256,
    ),
    "llama, 3.1": (
        "causal_lm",
        {
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "llama3",
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                **WITH,
            },
        },
        1024,
    ),
    "mistral": ("causal_lm", {"max_position_embeddings": 64, "sliding_window": 8}, 64),
    "gemma3_text": ("causal_lm", {"max_position_embeddings": 64, "head_dim": 8}, 64),
    "bert": ("bert", {"max_position_embeddings": 64}, 64),
    "roberta": ("roberta", {"max_position_embeddings": 66}, 64),
    "distilbert": ("distilbert", {"max_position_embeddings": 64}, 64),
    "deberta-v2": ("deberta", {"max_position_embeddings": 64}, 64),
    "t5": ("t5", {}, None),
    "clip": ("clip", {}, None),
    "vit": ("vit", {}, None),
}


@pytest.mark.parametrize("case", LIMITS)
def test_texts_and_sequences_do_not_exceed_the_positions(case: str, tmp_path: Path) -> None:
    family, fields, limit = LIMITS[case]
    AutoConfig.for_model(case.partition(",")[0], **({} if case in ("t5", "clip") else SMALL), **fields).save_pretrained(
        tmp_path
    )
    assert FAMILIES[family].positions(tmp_path) == limit

    def suite(length: int) -> Suite:
        entry = {"expert": "e", "data": Documents("a.txt", "b.txt"), "max_length": length}
        return Suite("s", family, "base", {"t": entry})

    check_lengths(suite(limit or 1 << 20), FAMILIES[family], tmp_path)
    if limit is not None:
        wanted = rf"suite.tasks.t.max_length must be at most {limit}, the positions of the model in .*, got {limit + 1}"
        with pytest.raises(ConfigError, match=wanted):
            check_lengths(suite(limit + 1), FAMILIES[family], tmp_path)
