"""Oracles: the workflow and pyproject.toml as they stand in the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_only_read_and_their_actions_are_pinned(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in workflow[True]  # YAML reads the key `on` as a boolean
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        steps: list[dict[str, Any]] = job["steps"]
        assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
        assert all(re.fullmatch(r"make [a-z-]+", step["run"]) for step in steps if "run" in step)
        assert not any(step.get("with", {}).get("persist-credentials") for step in steps)
    assert "${{ github" not in path.read_text()  # titles and branch names are anybody's


def test_every_make_target_of_the_workflow_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {name for path in WORKFLOWS for name in re.findall(r"run: make ([a-z-]+)", path.read_text())}
    assert {"check", "test", "minimum", "audit"} <= used <= targets
    assert sorted((ROOT / ".github" / "workflows").iterdir()) == WORKFLOWS  # none goes unread


@pytest.mark.parametrize(("target", "run"), [("audit", "pip-audit --strict"), ("minimum", "--constraint")])
def test_what_security_rests_on_in_ci_is_what_its_target_runs(target: str, run: str) -> None:
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    assert run in recipe[1]


def test_pythons_tested_are_those_declared_and_the_lowest_has_the_lowest_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == declared
    assert jobs["minimum"]["steps"][1]["with"]["python-version"] == declared[0]
    assert project["requires-python"] == f">={declared[0]}"


def test_the_lower_bounds_are_those_of_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    found = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lower_bounds", ROOT / "pyproject.toml"],
        capture_output=True,
        text=True,
        check=True,
    )
    bounds = dict(line.split("==") for line in found.stdout.splitlines())
    for requirement in needed:
        assert str(requirement.specifier) == f">={bounds[requirement.name]}", requirement
    for extra, texts in project["optional-dependencies"].items():  # the same bounds wherever a package is named
        for requirement in map(Requirement, texts):
            assert str(requirement.specifier) == f">={bounds[requirement.name]}", (extra, requirement)
