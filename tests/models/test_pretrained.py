"""Oracle: a folder whose JSON files name Python code. The code would create a file if it ran."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, BertModel

from epmq_cli.errors import ModelError
from epmq_cli.models.pretrained import from_folder
from tests.conftest import Run
from tests.helpers.hubs import run_in

CODE = "from pathlib import Path\n\nPath({ran!r}).touch()\n\nclass Evil:\n    pass\n"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def folder(bert_hub: Path, tmp_path: Path) -> Path:
    """A BERT folder with a code file that no JSON file names yet."""
    folder = Path(shutil.copytree(bert_hub / "base", tmp_path / "base"))
    (folder / "evil.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return folder


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fails if the code runs or if transformers asks on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    yield
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_that_transformers_supports_is_ignored(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    assert type(from_folder(AutoModel, folder)) is BertModel


def test_code_of_a_model_that_transformers_lacks_is_refused(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Evil"}, model_type="evil")
    with pytest.raises(ModelError, match="needs its own code .* which epmq never runs; give a model") as raised:
        from_folder(AutoConfig, folder)
    assert "\n" not in str(raised.value)


def test_code_of_a_tokenizer_that_transformers_can_replace_is_ignored(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    assert "Evil" not in type(from_folder(AutoTokenizer, folder)).__name__


def test_code_of_an_image_processor_is_refused(folder: Path) -> None:
    named = {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}
    (folder / "preprocessor_config.json").write_text(json.dumps(named))
    with pytest.raises(ModelError, match="needs its own code .* which epmq never runs; give a model"):
        from_folder(AutoImageProcessor, folder)


def test_a_run_refuses_models_with_their_own_code(folder: Path, bert_hub: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}, model_type="evil")
    with pytest.raises(ModelError, match="base: .* holds a model of type evil, family bert takes bert"):
        run_in(tmp_path / "run", bert_hub, f"suite.base={folder}")
    with pytest.raises(ModelError, match="base: no family takes models of type evil, the families take"):
        run_in(tmp_path / "run", bert_hub, f"suite.base={folder}", "suite.family=auto")


def test_an_evaluated_checkpoint_brings_no_code(bert_hub: Path, tmp_path: Path, epmq_inside: Run) -> None:
    checkpoint = run_in(tmp_path / "run", bert_hub, "eval.stages=[]", "calib.samples=8")
    (checkpoint / "evil.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    edit(checkpoint / "config.json", auto_map={"AutoConfig": "evil.Evil"}, model_type="evil")
    result = epmq_inside("eval", str(checkpoint))
    assert result.returncode == 1
    assert "needs its own code" in result.stderr


def test_pickled_weights_beside_safetensors_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot be read by AutoModel of transformers \(.*safetensors.*\); give"):
        from_folder(AutoModel, folder, use_safetensors=True)


def test_missing_files_are_reported_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read by AutoConfig of transformers") as raised:
        from_folder(AutoConfig, tmp_path)
    assert "\n" not in str(raised.value)
