"""Oracles: the file system accepts the names; no two jobs share one; valid names stay unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from epmq_cli.commands import hydra_app  # registers the resolver
from epmq_cli.commands.folder_names import LONGEST, folder_name
from epmq_cli.config.instantiate import conf_dir

assert hydra_app
SOUND = ("bits=4,merge=ties", "guidance.weights={a:1.0,b:0.5}", "eval.stages=[],suite=tiny", "", "x" * LONGEST)
ODD = (
    "suite.base=models/a,bits=4",
    "suite.base=models_a,bits=4",
    "suite.base=models/b,bits=4",
    "suite.name=a b",
    'suite.name="a\'b"',
    "suite.name=a\\nb",
    "../../x=1",
    "..",
    *(f"suite.experts={{{','.join(f'task{i}:/data/models/expert-{i}' for i in range(20))}}},bits={b}" for b in (3, 4)),
    "\u4f60" * 100,
)


@pytest.mark.parametrize("overrides", SOUND)
def test_valid_names_stay_unchanged(overrides: str) -> None:
    assert folder_name(overrides) == overrides


def test_other_names_are_accepted_by_the_file_system_and_differ(tmp_path: Path) -> None:
    names = [folder_name(overrides) for overrides in (*ODD, *SOUND[:-2])]
    assert len(set(names)) == len(names)
    for name in names:
        (tmp_path / name).mkdir()
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert folder_name(ODD[0]).startswith("suite.base=models_a,bits=4-")
    assert all(folder_name(overrides) == name for overrides, name in zip(ODD, names, strict=False))


@pytest.mark.parametrize("command", ["run", "merge", "eval"])
def test_the_jobs_of_every_command_have_these_names(command: str) -> None:
    """Oracle: the function itself, applied to the overrides as Hydra writes them."""
    experts = "{" + ",".join(f"task{i}:/data/models/expert-{i}" for i in range(20)) + "}"
    given = (
        [f"+x={experts}", "out=elsewhere", "device=cpu"] if command != "merge" else [f"+x={experts}", "out=elsewhere"]
    )
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(command, overrides=given, return_hydra_config=True)
    found = OmegaConf.select(cfg, "hydra.sweep.subdir")
    assert found == folder_name(OmegaConf.select(cfg, "hydra.job.override_dirname"))
    assert len(found.encode()) <= LONGEST
    assert found.startswith("+x={task0:_data_models_expert-0,task1:")


def test_added_options_have_plain_names() -> None:
    assert folder_name("++merge.steps=1,merge=ties,++merge.post=[svc]") == "merge.steps=1,merge=ties,merge.post=[svc]"
