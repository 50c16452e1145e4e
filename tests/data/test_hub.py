"""Oracle: a miniature mirror with the hub's layout, whose pictures and sentences encode their row; offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from epmq_cli.config.instantiate import build, conf_dir
from epmq_cli.data.hub import Hub
from epmq_cli.data.pictures import Decoder
from epmq_cli.data.samples import Samples
from epmq_cli.data.suite import Task
from epmq_cli.errors import ConfigError, DataError
from tests.helpers.mirror import GLUE, LAYOUTS, ROWS, glue_mirror, image_mirror, prepare, write_rows
from tests.helpers.tiers import every, first, only

datasets = pytest.importorskip("datasets", reason="needs the extra hub")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glue_mirror(image_mirror(tmp_path_factory.mktemp("mirror")))


@pytest.fixture(scope="module")
def tasks(mirror: Path) -> dict[str, Task]:
    """Every task of the shipped suites, with data_root set to the mirror."""
    members: list[Task] = []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for suite in ("clip_vit_b32_tall20", "flan_t5_base_glue"):
            cfg = compose("run", overrides=[f"suite={suite}", f"data_root={mirror}", "out=x"])
            members += build("suite", cfg.suite).members
    return {task.name: task for task in members}


def shades(samples: Samples) -> list[int]:
    """The rows that the pictures encode."""
    return [image.convert("L").getpixel((2, 2)) // 10 for image in samples.inputs]


def test_the_mirror_has_every_shipped_task(tasks: dict[str, Task]) -> None:
    assert list(tasks) == [*LAYOUTS, *GLUE]


@pytest.mark.parametrize("split", first(1, ["train", "test"]))
@pytest.mark.parametrize("name", every(3, LAYOUTS))
def test_every_image_task_is_read_completely_and_streamed(name: str, split: Any, tasks: dict[str, Task]) -> None:
    source, classes = tasks[name].data, LAYOUTS[name].classes
    whole, first = source.load(split), source.load(split, 5)
    drawn, again = (source.load(split, 5, seed=3) for _ in range(2))
    assert shades(whole) == list(range(ROWS[split]))
    assert shades(first) == list(range(5))
    assert shades(drawn) == shades(again) != shades(first)
    for samples in (whole, first, drawn):
        assert samples.labels.tolist() == [row % classes for row in shades(samples)]
        assert len(tasks[name].classes or ()) == classes


@pytest.mark.parametrize("name", only(("cola", "mnli", "qqp", "stsb"), GLUE))
def test_every_glue_task_has_its_prompt(name: str, tasks: dict[str, Task]) -> None:
    source = tasks[name].data
    for split in ("train", "test"):
        whole, drawn = source.load(split), source.load(split, 4, seed=1)
        assert len(whole) == ROWS[split]
        assert set(drawn.inputs) < set(whole.inputs)
        assert all(f"{column} 3" in whole.inputs[3] for column in GLUE[name][0])
        assert "{" not in whole.inputs[0]
        assert min(whole.labels.tolist()) >= 0  # the split without labels holds -1
    assert whole.labels.tolist()[:3] == ([0.25, 1.25, 2.25] if name == "stsb" else [0, 1, 2 if name == "mnli" else 0])


def test_prompts_are_exact(tasks: dict[str, Task]) -> None:
    sentence = "it is a bad sentence 0"
    assert tasks["cola"].data.load("test").inputs[0] == (
        f'Indicate if the following sentence is grammatically correct or not: "{sentence}". '
        "Answere 'acceptable' or 'unacceptable'."
    )


def test_a_count_beyond_the_split_gives_all_samples(tasks: dict[str, Task]) -> None:
    assert sorted(shades(tasks["svhn"].data.load("train", 100, seed=0))) == list(range(ROWS["train"]))


def test_the_seed_chooses_the_samples(tasks: dict[str, Task]) -> None:
    assert len({tuple(shades(tasks["dtd"].data.load("train", 6, seed=seed))) for seed in range(6)}) > 3


def test_a_count_reads_only_what_it_needs_and_writes_nothing(mirror: Path, tmp_path: Path, cache: Path) -> None:
    place = tmp_path / "tanganke" / "sun397"
    shutil.copytree(mirror / "datasets" / "tanganke" / "sun397", place)
    (place / "data" / "train-00001-of-00002.parquet").write_bytes(b"no parquet")
    source = Hub(path="tanganke/sun397", root=str(tmp_path))
    assert shades(source.load("train", 4)) == [0, 1, 2, 3]
    assert not list(cache.rglob("*.arrow"))
    with pytest.raises(DataError, match="tanganke/sun397 cannot be loaded"):
        source.load("train")
    assert len(source.load("test")) == ROWS["test"]  # the broken split is not touched


def test_images_are_decoded_on_access(tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [], Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda *a: decoded.append(a) or decode(*a))
    for samples in (tasks["food101"].data.load("test"), tasks["food101"].data.load("test", 6, seed=0)):
        taken = samples.take([2, 1])
        assert not decoded
        _ = taken.inputs[0]
        assert len(decoded) == 1
        decoded.clear()


def test_a_configuration_may_be_a_folder_without_a_readme(mirror: Path, tmp_path: Path) -> None:
    found = mirror / "datasets" / "ufldl-stanford" / "svhn" / "cropped_digits"
    shutil.copytree(found, tmp_path / "svhn" / "cropped_digits")
    shutil.copytree(found, tmp_path / "svhn" / "full_numbers")
    source = Hub(path=str(tmp_path / "svhn"), name="cropped_digits")
    assert len(source.load("test")) == ROWS["test"]
    assert len(source.load("train", 3, seed=0)) == 3


def local(tmp_path: Path) -> Path:
    """A folder with the texts a and b, and labels y."""
    for split, count in (("train", 4), ("validation", 2)):
        rows = [{"a": f"a{row}", "b": f"b{row}", "y": row % 2} for row in range(count)]
        path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        write_rows(path, rows, {"a": "string", "b": "string", "y": "int64"})
    return tmp_path / "set"


def test_columns_splits_and_pairs_are_read(tmp_path: Path) -> None:
    source = Hub(path=str(local(tmp_path)), test="validation", input=["a", "b"], label="y")
    assert list(source.load("test").inputs) == [("a0", "b0"), ("a1", "b1")]
    single = Hub(path=str(tmp_path / "set"), train="train[:3]", input="a", label="y")
    assert list(single.load("train").inputs) == ["a0", "a1", "a2"]
    assert list(single.load("train", 2).inputs) == ["a0", "a1"]


@pytest.mark.parametrize("place", ["", "epmq/train"])
def test_cached_data_sets_are_read_offline(place: str, tmp_path: Path, cache: Path) -> None:
    datasets.load_dataset(str(local(tmp_path)), cache_dir=str(cache / place))
    (default,) = (cache / place / "set").glob("default*")
    default.rename(default.parent / "default")
    default.parent.rename(cache / place / "someone___set")  # the cache layout of a hub id
    source = Hub(path="someone/set", test="validation", input="a", label="y")
    assert list(source.load("train").inputs) == ["a0", "a1", "a2", "a3"]
    assert set(source.load("train", 2, seed=1).inputs) < {"a0", "a1", "a2", "a3"}


def picture_folders(place: Path, **splits: tuple[str, ...]) -> Hub:
    """A data set of class folders, each with pictures of its own shade."""
    for split, names in splits.items():
        for name in names:
            (place / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (4, 4), (ord(name[0]),) * 3).save(place / split / name / f"{index}.png")
    return Hub(path=str(place))


@pytest.mark.parametrize("count", [None, 6])
def test_a_class_folder_has_the_same_number_in_all_splits(count: int | None, tmp_path: Path) -> None:
    source = picture_folders(tmp_path / "set", train=("ant", "bee", "cat"), test=("bee", "cat"))
    for split in ("train", "test"):
        samples = source.load(split, count)
        shown = [image.getpixel((0, 0))[0] for image in samples.inputs]
        assert [97 + label for label in samples.labels.tolist()] == shown


def test_hidden_folders_that_became_classes_are_refused(tmp_path: Path) -> None:
    source = picture_folders(tmp_path / "set", train=("@eaDir", "cat"), test=("cat", "dog"))
    for count in (None, 2):
        with pytest.raises(DataError, match=r"has folders that are not classes, @eaDir, which the datasets library"):
            source.load("train", count)


def test_conversations_and_nested_columns_are_distinguished(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages, "pair": {"en": "a", "de": "b"}, "tokens": ["a", "b"], "n": 3}] * 2
    (tmp_path / "set").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "test"):
        (tmp_path / "set" / f"{split}.jsonl").write_text(lines)

    def load(column: str, **fields: Any) -> list[Any]:
        return list(Hub(path=str(tmp_path / "set"), input=column, label=None, **fields).load("train").inputs)

    assert [chat.messages for chat in load("messages")] == [tuple(messages)] * 2
    assert load("n", prompt="{n}!") == ["3!", "3!"]
    for column, kind in (
        ("pair", "an object with the keys en, de"),
        ("tokens", r"a list \("),
        ("n", r"a number \(3\)"),
    ):
        with pytest.raises(DataError, match=f"row 1: column {column} holds {kind}"):
            load(column)


def test_missing_columns_splits_and_sets_are_named(tmp_path: Path) -> None:
    place = str(local(tmp_path))
    for count in (None, 2):
        with pytest.raises(DataError, match="has no column image; its columns are a, b, y"):
            Hub(path=place, label="y").load("train", count)
    with pytest.raises(
        DataError, match=r"cannot be loaded; check its id, name and split \(its splits are train, valid"
    ):
        Hub(path=place, input="a", label="y", test="nope").load("test")
    with pytest.raises(DataError, match="cannot be loaded.*; /nowhere has no copy of it either"):
        Hub(path="someone/nothing", input="a", label="y", root="/nowhere").load("test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": ["a", "b", "c"]}, "data.input must be one column or a list of two"),
        (
            {"prompt": "no place"},
            "data.prompt must have placeholders that are columns, such as {sentence}, got 'no place'",
        ),
        ({"prompt": "{"}, "data.prompt must be a text with {column} placeholders"),
        ({"regression": True, "labels": ["a"]}, "data.labels names classes, and a regression has none"),
    ],
)
def test_columns_that_do_not_form_samples_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hub(path="x", **fields)


def test_names_cannot_leave_the_mirror(tmp_path: Path) -> None:
    (tmp_path / "outside" / "set").mkdir(parents=True)
    root = tmp_path / "mirror"
    root.mkdir()
    assert Hub("outside/set", root=str(tmp_path)).folder == tmp_path / "outside/set"
    assert Hub("../outside/set", root=str(root)).folder is None
    with pytest.raises(ConfigError, match="data.name must be a configuration of the data set, got '../x'"):
        Hub("a/b", name="../x")


def test_bytes_of_text_are_not_images(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for split in ("train", "test"):
        table = pyarrow.table({"text": [b"some text", b"more"], "label": [0, 1]})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=r"row 1: column text holds bytes \(.*\), not text; .* store it as strings"):
        Hub(path=str(tmp_path), input="text").load("test")
