"""Oracle: SECURITY.md. The promises that concern the whole package are checked on its source; those without a better
place are checked here too. Each search of the source is first tried on an offender."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from epmq_cli.store.cache import Cache
from tests.helpers.hubs import run_in

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "epmq_cli").rglob("*.py"), *(ROOT / ".ci").glob("*.py")])
RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.Popen", "subprocess.run"}
PICKLES = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "joblib.load", "yaml.load", "dill.load"}
UNPACKS = {"extract", "extractall", "unpack_archive", "ZipFile", "TarFile"}
ONE_DOOR = ROOT / "epmq_cli" / "models" / "pretrained.py"


def offences(source: str, path: Path = ROOT) -> Iterator[str]:
    """The places in a module that run foreign code, or could."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, last = ast.unparse(node.func), ast.unparse(node.func).rpartition(".")[2]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in RUNS_CODE | PICKLES or last in UNPACKS:
            yield f"{name} is called"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if name.endswith(("np.load", "numpy.load")) and given.get("allow_pickle") != "False":
            yield "np.load without allow_pickle=False"
        if given.get("trust_remote_code", "False") != "False":
            yield f"{name} with trust_remote_code"
        if last == "from_pretrained" and path != ONE_DOOR:
            yield "from_pretrained beside checkpoint/pretrained.py"


OFFENDERS = [
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "pickle.loads(text)",
    "np.load(path)",
    "np.load(path, allow_pickle=True)",
    "AutoModel.from_pretrained(path)",
    "f(trust_remote_code=True)",
    "f(trust_remote_code=cfg.trust)",
    "subprocess.Popen(words)",
    "os.system(text)",
    "eval(text)",
    "archive.extractall(folder)",
]


@pytest.mark.parametrize("source", OFFENDERS)
def test_every_offender_is_detected(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_runs_foreign_code_or_unpickles_more_than_tensors(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"), path)) == []


def test_the_only_from_pretrained_call_forbids_code_and_network() -> None:
    calls = [node for node in ast.walk(ast.parse(ONE_DOOR.read_text())) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if ast.unparse(node.func).endswith("from_pretrained")]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert (given["local_files_only"], given["trust_remote_code"]) == ("True", "False")


def test_no_config_has_an_option_for_foreign_code() -> None:
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        assert "trust_remote_code" not in OmegaConf.to_yaml(OmegaConf.load(path)), path


def test_the_cache_is_private_and_holds_only_json_and_safetensors(
    bert_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0)
    try:
        monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
        run_in(tmp_path / "run", bert_hub, "calib.samples=8", "eval.samples=8", "cache=1GB")
    finally:
        os.umask(before)
    folders = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    assert folders
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in files)
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)


def test_a_pickle_in_place_of_a_cached_file_is_recomputed(tmp_path: Path) -> None:
    from epmq_cli.store.safetensors_writer import of

    cache, entries = Cache(tmp_path, 10**6), [of("a", torch.ones(2))]
    path = cache.tensors({"x": 1}, lambda: entries)
    assert path is not None
    torch.save({"a": torch.zeros(2)}, path)
    again = cache.tensors({"x": 1}, lambda: entries)
    assert again == path
    assert torch.equal(load_file(again)["a"], torch.ones(2))
