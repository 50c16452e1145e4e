"""Oracle: runs that differ in one thing each from the plain counterpart of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.report.plain_counterpart import plain_of, with_plain
from epmq_cli.report.run_folders import Run
from tests.helpers.reports import content

OPTIONS = {"merge": "ties", "guidance": "feature", "refine": "none", "quant": "gptq"}


def made(score: float, **changes: Any) -> Run:
    """A run with these options, and bits and groups."""
    found = content({"a": (0.1, 0.5, score, 0.9)}, error=0.01)
    found["config"] |= {"bits": 4, "group_size": 64, "seed": 0}
    for key, value in {**OPTIONS, **changes}.items():
        path = conf_dir() / key / f"{value}.yaml"
        found["config"][key] = yaml.safe_load(path.read_text()) if path.is_file() else value
    return Run(Path(f"/r/{score}"), found)


def test_the_counterpart_has_the_same_merge_bits_groups_and_samples() -> None:
    run, plain = made(0.8, seed=1), made(0.6, guidance="merged")
    others = [
        made(0.5, guidance="merged", merge="average"),
        made(0.5, guidance="merged", bits=3),
        made(0.5, guidance="merged", group_size=32),
        made(0.5, guidance="merged", refine="distill"),
        made(0.5, guidance="merged", quant="rtn"),
        made(0.5, guidance="expert"),
    ]
    other_samples = made(0.5, guidance="merged")
    other_samples.content["scores"]["samples"]["a"] = 7
    assert plain_of(run.content, [run, *others, other_samples]) is None
    found = plain_of(run.content, [run, *others, other_samples, plain])
    assert found is not None
    assert found["average"]["quantized"] == 0.6
    same_seed = made(0.61, guidance="merged", seed=1)
    assert with_plain(run.content, [plain, same_seed])["scores"]["tasks"]["a"]["plain GPTQ"] == 0.61
    assert plain_of(plain.content, [plain]) is None
    assert "plain GPTQ" not in run.content["scores"]["average"]
