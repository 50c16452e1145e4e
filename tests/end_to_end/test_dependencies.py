"""Oracle: the import statements of the package, compared with the dependencies and extras in pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
BROUGHT = {"triton": "torch", "mlflow": "mlflow-skinny"}
"""Modules that a declared package of another name installs, on some platforms or in some environments only."""


def normal(name: str) -> str:
    """The normalized name of a distribution, as in package indexes."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """The packages that epmq itself requires, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(item for name in extras for item in project["optional-dependencies"][name])]
    return {normal(re.split(r"[^\w.-]", item)[0]) for item in wanted}


def imports(path: Path) -> Iterator[str]:
    """The top-level module of every import in a file, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_every_third_party_import_is_a_declared_dependency() -> None:
    known, swapped_weights = (
        declared("tables", "sound", "hub", "gguf", "onnx", "lm_eval", "mlflow", "trackio", "wandb"),
        packages_distributions(),
    )
    undeclared = {}
    for path in sorted((ROOT / "epmq_cli").rglob("*.py")):
        for module in {*imports(path)} - {*sys.stdlib_module_names, "epmq_cli"}:
            names = {normal(name) for name in [BROUGHT.get(module, ""), *swapped_weights.get(module, [module])]}
            if not names & known:
                undeclared[module] = path.relative_to(ROOT).as_posix()
    assert undeclared == {}
