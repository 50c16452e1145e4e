"""Oracle: conf/. A composed config without overrides has no differences; with overrides it has exactly those."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.report.settings import choices, settings, value_at


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose("run", overrides=["out=x", *overrides]), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


@pytest.mark.parametrize(
    ("overrides", "differ"),
    [
        ([], {}),
        (["merge=ties", "bits=3"], {"merge": "ties", "bits": "3"}),
        (["merge=ties", "merge.density=0.5"], {"merge": "ties", "merge.density": "0.5"}),
        (["refine=both", "refine.distill.lr=0.01"], {"refine": "both", "refine.distill.lr": "0.01"}),
        (["calib.samples=32"], {"calib.samples": "32"}),
    ],
)
def test_what_differs_from_the_defaults(overrides: list[str], differ: dict[str, str]) -> None:
    config = composed(*overrides)
    assert {row.key: row.value for row in settings(config) if row.changed} == differ
    assert choices(config)["guidance"] == "feature"


def test_a_class_of_your_own_goes_by_its_name_and_values_are_found_by_path() -> None:
    config = {"merge": {"_target_": "mine.Merge", "scale": [1, None]}, "bits": 4}
    assert choices(config) == {"merge": "Merge"}
    assert [value_at(config, key) for key in ("merge", "merge.scale", "bits", "no.such")] == [
        "Merge",
        "[1, null]",
        "4",
        "",
    ]
