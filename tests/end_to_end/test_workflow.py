"""Oracles: the workflow and pyproject.toml in the checkout."""

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
def test_workflows_have_read_permission_only_and_pinned_actions(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in workflow[True]  # YAML reads the key `on` as a boolean
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        steps: list[dict[str, Any]] = job["steps"]
        assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
        assert all(re.fullmatch(r"make [a-z-]+", step["run"]) for step in steps if "run" in step)
        assert not any(step.get("with", {}).get("persist-credentials") for step in steps)
    assert "${{ github" not in path.read_text()  # anybody can choose titles and branch names


def test_every_make_target_of_the_workflow_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {name for path in WORKFLOWS for name in re.findall(r"run: make ([a-z-]+)", path.read_text())}
    assert {"check", "test", "minimum", "audit"} <= used <= targets
    assert sorted((ROOT / ".github" / "workflows").iterdir()) == WORKFLOWS  # the search missed none


@pytest.mark.parametrize(("target", "run"), [("audit", "pip-audit --strict"), ("minimum", "--constraint")])
def test_the_security_target_runs_the_checks_that_ci_relies_on(target: str, run: str) -> None:
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    assert run in recipe[1]


def test_ci_tests_the_declared_pythons_and_the_lowest_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == declared
    assert jobs["minimum"]["steps"][1]["with"]["python-version"] == declared[0]
    assert project["requires-python"] == f">={declared[0]}"


def test_every_dependency_has_a_tested_lower_bound() -> None:
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
    for extra, texts in project["optional-dependencies"].items():  # equal bounds wherever a package occurs
        for requirement in map(Requirement, texts):
            assert str(requirement.specifier) == f">={bounds[requirement.name]}", (extra, requirement)
