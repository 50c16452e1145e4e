"""Oracles: transformers' loaders on the base and on the checkpoint, and the files that its classes read."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer, CLIPImageProcessor, PhobertTokenizer, WhisperFeatureExtractor
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from epmq_cli.errors import CheckpointError, ModelError
from epmq_cli.models.model_folder import PICKLES, READ, read_files
from epmq_cli.models.processor_files import ProcessorFiles
from tests.helpers.minihub import tokenizer

TEXT = "good film"


def base(folder: Path, kind: str = "llama", **files: str) -> Path:
    """Creates a folder with a config and these files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def copied(source: Path, target: Path) -> set[str]:
    """Copies the files to a checkpoint and returns their names, without the config."""
    base(target, json.loads((source / "config.json").read_text())["model_type"])
    ProcessorFiles(source).copy(target)
    return {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} - {"config.json"}


def phobert(folder: Path) -> Path:
    """Creates a base whose tokenizer reads vocab.txt and bpe.codes."""
    words = "".join(f"{word} {9 - place}\n" for place, word in enumerate(("good", "film", "b@@", "ad")))
    return base(
        folder,
        "roberta",
        **{
            "vocab.txt": words,
            "bpe.codes": "#version: 0.2\no d</w> 5\ng o 4\n",
            "tokenizer_config.json": json.dumps({"tokenizer_class": "PhobertTokenizer"}),
        },
    )


def test_files_that_the_tokenizer_class_reads_are_copied(tmp_path: Path) -> None:
    source = phobert(tmp_path / "base")
    assert {"vocab.txt", "bpe.codes", "tokenizer_config.json"} <= copied(source, tmp_path / "made")
    found, wanted = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("made", "base"))
    assert type(found).__name__ == "PhobertTokenizer"
    assert found(TEXT)["input_ids"] == wanted(TEXT)["input_ids"]


def test_files_with_unknown_names_are_copied_if_the_class_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a future tokenizer: the same files under other names."""
    monkeypatch.setattr(PhobertTokenizer, "vocab_files_names", {"vocab_file": "words.lst", "merges_file": "pairs.lst"})
    source = phobert(tmp_path / "base")
    (source / "vocab.txt").rename(source / "words.lst")
    (source / "bpe.codes").rename(source / "pairs.lst")
    (source / "notes.lst").write_text("")
    found = copied(source, tmp_path / "made")
    assert {"words.lst", "pairs.lst"} <= found
    assert "notes.lst" not in found


def test_a_checkpoint_whose_tokenizer_does_not_load_is_never_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = phobert(tmp_path / "base")
    known = ProcessorFiles(source)
    monkeypatch.setattr(ProcessorFiles, "files", ["vocab.txt", "tokenizer_config.json"])
    with pytest.raises(CheckpointError, match=r"the checkpoint cannot be written: .*"):
        known.copy(base(tmp_path / "made", "roberta"))


def test_a_checkpoint_that_tokenizes_differently_is_never_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = base(tmp_path / "base")
    tokenizer(source, end=False)
    known = ProcessorFiles(source)
    content = json.loads((source / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match="loads a different tokenizer from it than from .*; save the base's tokenizer again"
    ):
        known.copy(base(tmp_path / "made"))


def test_only_files_of_engines_templates_and_settings_are_copied_too(tmp_path: Path) -> None:
    source = base(tmp_path / "base")
    tokenizer(source, end=False)
    kept = ("tokenizer.model.v3", "x.tiktoken", "source.spm", "tekken.json", "generation_config.json", "merges.txt")
    left = ("pytorch_model.bin", "tokenizer.pkl", "README.md", "model.safetensors.index.json", "adapter_config.json")
    for name in (*kept, *left, "tokenization_x.py", "trainer_state.json", "training_args.bin", ".gitattributes"):
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    found = copied(source, tmp_path / "made")
    assert found == {
        *kept,
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    } | ({"special_tokens_map.json"} & {path.name for path in source.iterdir()})
    template = AutoTokenizer.from_pretrained(tmp_path / "made").chat_template
    assert template == AutoTokenizer.from_pretrained(source).chat_template
    assert isinstance(template, dict)


@pytest.mark.parametrize("kind", ["clip", "whisper"])
def test_image_processors_and_feature_extractors_load(kind: str, tmp_path: Path) -> None:
    source = base(tmp_path / "base", kind)
    (CLIPImageProcessor() if kind == "clip" else WhisperFeatureExtractor()).save_pretrained(source)
    assert copied(source, tmp_path / "made") == {"preprocessor_config.json"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, "the tokenizer in .* does not load in transformers"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "finds no vocabulary|does not load"),
        (
            {"tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["x.T", None]}}), "x.py": "1 / 0"},
            "it needs its own code, which epmq never runs.*remove all files of the tokenizer to merge only the weights",
        ),
        ({"preprocessor_config.json": '{"image_processor_type": "NoSuch"}'}, "cannot be read by AutoImageProcessor"),
    ],
)
def test_a_processor_that_does_not_load_from_the_base_is_refused_first(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        ProcessorFiles(base(tmp_path / "base", **files))
    assert "\n" not in str(raised.value)


def test_a_base_without_processor_files_is_accepted_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(transformers, "AutoTokenizer", raising=False)
    source = base(tmp_path / "base", **{"README.md": "", "model.safetensors": "", "pytorch_model.bin": ""})
    assert copied(source, tmp_path / "made") == set()


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    source = base(tmp_path / "base")
    tokenizer(source, end=False)
    (tmp_path / "secret").write_text("x")
    for name in ("tokenizer.secret", "additional_chat_templates"):
        if name == "tokenizer.secret":
            (source / name).symlink_to(tmp_path / "secret")
        else:
            (source / name).mkdir()
            (source / name / "x.jinja").symlink_to(tmp_path / "secret")
        with pytest.raises(ModelError, match="is a link"):
            _ = ProcessorFiles(source).files
        if name == "tokenizer.secret":
            (source / name).unlink()


def test_downloads_cover_the_vocabulary_files_of_every_tokenizer_but_no_pickles() -> None:
    """Oracle: `vocab_files_names` of all tokenizers in transformers."""
    names = {
        kind
        for kinds in TOKENIZER_MAPPING_NAMES.values()
        for kind in ([kinds] if isinstance(kinds, str) else kinds or ())
        if kind
    }
    files = set()
    for name in sorted(names):
        try:
            files |= {*getattr(tokenizer_class_from_name(name), "vocab_files_names", {}).values()}
        except ImportError:  # its optional dependency is not installed
            continue
    files |= {"tokenizer.model.v3", "source.spm", "qwen.tiktoken", "additional_chat_templates/tool.jinja"}
    assert len(files) > 15
    assert [file for file in files if not any(fnmatchcase(file, pattern) for pattern in READ)] == []
    assert not [pattern for pattern in READ for ending in PICKLES if fnmatchcase(f"x{ending}", pattern)]


def test_only_files_of_the_folder_and_its_templates_are_read(tmp_path: Path) -> None:
    source = base(tmp_path / "base", **{"bpe.codes": "", ".hidden.json": "", "x.bin": "", "README.md": ""})
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("")
    (source / "checkpoint-5").mkdir()
    (source / "checkpoint-5" / "config.json").write_text("")
    assert [path.name for path in read_files(source)] == ["tool.jinja", "bpe.codes", "config.json"]
