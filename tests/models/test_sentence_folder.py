"""Oracle: the files of sentence-transformers, in the forms of its versions 2 and 6."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.errors import ModelError
from epmq_cli.models.sentence_folder import (
    is_sentence_folder,
    read_sentence_folder,
    transformer_folder,
)
from tests.helpers.sentences import PROMPTS, encoder, write, write_sentences


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(
        tmp_path_factory.mktemp("st") / "new", encoder("bert"), "max", inside="0_Transformer", dense=True
    )


def test_both_forms_are_read(folder: Path, tmp_path: Path) -> None:
    own = read_sentence_folder(folder, "base")
    assert (own.pooling, own.transformer, own.longest, own.lower) == ("max", "0_Transformer", 12, False)
    assert [layer.kind for layer in own.layers] == ["Dense", "Normalize"]
    assert (own.query, own.document, own.usual) == tuple(PROMPTS.values())
    assert transformer_folder(folder, "base") == folder / "0_Transformer"
    old = read_sentence_folder(write_sentences(tmp_path / "old", encoder("bert"), "max", old=True), "base")
    assert (old.pooling, old.transformer, [layer.kind for layer in old.layers]) == ("max", "", ["Normalize"])
    assert not is_sentence_folder(tmp_path)
    assert transformer_folder(tmp_path, "base") == tmp_path


def test_a_copy_has_the_transformer_at_its_root(folder: Path, tmp_path: Path) -> None:
    own = read_sentence_folder(folder, "base")
    own.save(tmp_path)
    shutil.copytree(folder / "0_Transformer", tmp_path, dirs_exist_ok=True)
    copied = read_sentence_folder(tmp_path, "base")
    assert copied.transformer == ""
    assert (copied.pooling, copied.layers, copied.prompts) == (own.pooling, own.layers, own.prompts)
    assert (copied.longest, {*copied.files}) == (own.longest, {*own.files})


POOLING, SETTINGS = "1_Pooling/config.json", "config_sentence_transformers.json"
MODULE = {"type": "sentence_transformers.models.Transformer", "path": ""}
BROKEN: dict[str, tuple[str, Any, str]] = {
    "two poolings": (POOLING, {"pooling_mode": ["mean", "cls"]}, "has the pooling .* epmq takes one of cls, max, mean"),
    "no pooling": (POOLING, {"pooling_mode": "some"}, "has the pooling 'some'"),
    "prompts left out": (POOLING, {"pooling_mode": "mean", "include_prompt": False}, "leaves prompts out"),
    "other modules": (
        "modules.json",
        [MODULE, {**MODULE, "type": "own.Layer"}],
        "lists Transformer, own.Layer; epmq",
    ),
    "no list": ("modules.json", {"a": 1}, "is not a list of modules"),
    "outside": ("modules.json", [{**MODULE, "path": "../x"}], r"names \.\./x, outside its folder"),
    "residual": ("2_Dense/config.json", {"use_residual": True}, "describes a Dense layer with a residual"),
    "long": ("0_Transformer/sentence_bert_config.json", {"max_seq_length": 0}, "has the max_seq_length 0"),
    "similarity": (SETTINGS, {"similarity_fn_name": "own"}, "similarity_fn_name 'own'; it must be one of cosine, dot"),
    "prompt": (SETTINGS, {"default_prompt_name": "own"}, "has no prompt 'own', its default_prompt_name"),
    "prompts": (SETTINGS, {"prompts": {"own": 3}}, "has prompts that are not texts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_epmq_does_not_take_is_refused_in_one_sentence(case: str, folder: Path, tmp_path: Path) -> None:
    path, content, message = BROKEN[case]
    copied = shutil.copytree(folder, tmp_path / "copied", ignore=shutil.ignore_patterns("0_*"))
    (copied / "0_Transformer").mkdir()
    write(copied / path, content)
    with pytest.raises(ModelError, match=message) as raised:
        read_sentence_folder(copied, "base")
    assert "\n" not in str(raised.value)


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied", ignore=shutil.ignore_patterns("0_*"))
    (copied / "1_Pooling").rename(tmp_path / "elsewhere")
    (copied / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="is a link out of its folder"):
        read_sentence_folder(copied, "base")


def test_pickled_dense_layers_are_refused(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied", ignore=shutil.ignore_patterns("0_*", "model.safetensors"))
    with pytest.raises(ModelError, match=r"2_Dense has no model.safetensors; load the model with sentence-tr"):
        read_sentence_folder(copied, "base")
