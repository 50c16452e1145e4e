"""Oracle: a token in the environment; the tests search all files and output of a run for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from epmq_cli.config.instantiate import refuse_tokens
from epmq_cli.errors import ConfigError
from tests.conftest import Run
from tests.helpers.tiers import slow

TOKEN = "hf_" + "Abc123" * 6


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def files_with_it(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("base", [None, slow("someone/something")], ids=["a run", "a run without its base"])
def test_a_token_never_appears_in_files_or_output_of_a_run(
    base: str | None, bert_hub: Path, tmp_path: Path, epmq: Run
) -> None:
    options = ["suite=mini", "group_size=16", "calib.samples=8", "eval.stages=[quantized]", "out=here"]
    options += [f"suite.base={base}"] if base else []
    result = epmq("run", "--config-dir", str(bert_hub / "configs"), *options, HYDRA_FULL_ERROR="0")
    assert (result.returncode == 0) == (base is None), result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert (tmp_path / "here" / "run.log").is_file()
    assert files_with_it(tmp_path) == []
    (tmp_path / "seen").write_text(TOKEN)
    assert files_with_it(tmp_path) == [tmp_path / "seen"]


@pytest.mark.parametrize("value", ["'${oc.env:HF_TOKEN}'", "'owner/${oc.env:HF_TOKEN}'", TOKEN, "hf_" + "Other0" * 6])
def test_a_token_in_the_config_is_refused_and_not_repeated(
    value: str, bert_hub: Path, tmp_path: Path, epmq_inside: Run
) -> None:
    result = epmq_inside("run", "--config-dir", str(bert_hub / "configs"), "suite=mini", f"suite.base={value}", "out=x")
    assert result.returncode == 1
    assert "epmq: a Hugging Face token must not be in the config, which is saved in metrics.json" in result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert files_with_it(tmp_path) == []


@pytest.mark.parametrize("sweep", ["", "-m", slow("-m suite=tok,tiny")], ids=["a run", "a sweep", "a swept suite"])
def test_a_token_in_a_users_file_is_not_copied(sweep: str, tmp_path: Path, epmq_inside: Run) -> None:
    (tmp_path / "mine" / "suite").mkdir(parents=True)
    text = f"_target_: epmq_cli.data.suite.Suite\nname: {TOKEN}\nbase: b\nexperts: e\ntasks: {{}}\nfamily: clip\n"
    (tmp_path / "mine" / "suite" / "tok.yaml").write_text(text)
    options = ["suite=tok"] * ("suite" not in sweep) + ["eval.stages=[]", "calib.samples=8", "out=x"]
    result = epmq_inside("run", "--config-dir", "mine", *sweep.split(), *options)
    assert result.returncode == 1
    assert "epmq: a Hugging Face token must not be in the config" in result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert files_with_it(tmp_path) == [tmp_path / "mine" / "suite" / "tok.yaml"]


@pytest.mark.parametrize("key", ["out", "hydra.run.dir"])
def test_no_folder_name_contains_a_token(key: str, tmp_path: Path, epmq_inside: Run) -> None:
    result = epmq_inside("run", f"{key}='${{oc.env:HF_TOKEN}}'")
    assert result.returncode == 1
    assert result.stderr.startswith("epmq: a Hugging Face token must not be in the config")
    assert list(tmp_path.iterdir()) == []


def test_text_that_resembles_a_token_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_tokens(["hf_models/bert", "my_hf_" + "x" * 40])
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "secret")
    with pytest.raises(ConfigError):
        refuse_tokens(["a secret"])
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "")
    refuse_tokens(["a secret"])
