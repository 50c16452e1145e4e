"""Oracle: the house rules for the package's source: short files and functions, and no module outside the layers."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import epmq_cli

PACKAGE = Path(epmq_cli.__path__[0])
ROOT = PACKAGE.parent
TOP = {"__init__", "__main__", "cli", "errors"}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lengths in lines of the functions of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_and_functions_are_short() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    long = [path.name for path in modules if len(path.read_text(encoding="utf-8").splitlines()) > 300]
    longer = [f"{path.name}: {name}" for path in modules for name, lines in functions(path) if lines > 60]
    assert (long, longer) == ([], [])


def is_kernel(path: Path) -> bool:
    return path.relative_to(PACKAGE).parts[0] == "quantize" or path.stem == "kernels"


def test_parameter_lists_are_short() -> None:
    """Kernels are exempt: they take each matrix as a parameter."""
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not is_kernel(path):
                count = sum(map(len, (node.args.posonlyargs, node.args.args, node.args.kwonlyargs)))
                if count > 7:
                    long.append(f"{path.name}: {node.name}")
    assert long == []


def test_every_module_is_in_a_layer() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract, *_) = config["tool"]["importlinter"]["contracts"]
    layers = {name.strip() for layer in contract["layers"] for name in layer.split("|")}
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules == TOP
    assert (packages | modules) - {"__init__", "conf"} == layers
    shipped = {name for name in config["tool"]["setuptools"]["packages"] if name != "epmq_cli.conf"}
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert shipped == found


def test_tests_mirror_the_package() -> None:
    """Each folder of tests is that of a package, or one of those for tests across modules."""
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    packages = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py")}
    crossing = {"end_to_end", "end_to_end/foreign", "engines", "faults", "security"}
    assert folders - packages - crossing == set()


def test_the_wheel_has_every_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    assert sorted(declared) == sorted({".".join(folder.parts) for folder in folders} | {"epmq_cli.conf"})
