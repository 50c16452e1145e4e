"""Oracle: the tokenizer and image processor files that transformers writes and reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from epmq_cli.models.processor_folder import processor_files, same_files

NESTED = '{"image_processor": {"image_mean": [0.5]}}'


@pytest.mark.parametrize(
    ("files", "reads", "found"),
    [
        (["tokenizer.json", "tokenizer_config.json"], "texts", ["tokenizer.json", "tokenizer_config.json"]),
        (["vocab.json", "merges.txt", "config.json"], "texts", ["merges.txt", "vocab.json"]),
        (["vocab.txt", "bpe.codes"], "texts", ["bpe.codes", "vocab.txt"]),
        (["spiece.model", "README.md", "model.safetensors"], "texts", ["spiece.model"]),
        (["tokenizer_config.json", "merges.txt", "vocab_sizes.csv"], "texts", []),
        (["tokenizer.json"], "pictures", []),
        (["preprocessor_config.json"], "texts", []),
        (["preprocessor_config.json", "tokenizer.json"], "pictures", ["preprocessor_config.json"]),
        (["processor_config.json"], "pictures", ["processor_config.json"]),
    ],
)
def test_a_folder_has_the_files_of_its_own_processor(
    files: list[str], reads: str, found: list[str], tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_text(NESTED)
    assert list(processor_files(tmp_path, reads)) == found


def test_no_image_processor_in_a_config_without_one_or_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert processor_files(tmp_path, "pictures") == {}
    assert processor_files(tmp_path / "processor_config.json", "pictures") == {}


def test_files_are_equal_byte_for_byte(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        (folder / "vocab.txt").write_text("c" if folder.name == "c" else "a")
    one, alike, other = (processor_files(folder, "texts") for folder in folders)
    assert same_files(one, alike)
    assert not same_files(one, other)
