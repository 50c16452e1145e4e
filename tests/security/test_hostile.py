"""Oracle: malicious files and folders; each is refused in one sentence, before it uses memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from epmq_cli.checkpoint.load import load
from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder, SafetensorsFiles
from epmq_cli.models.state_dict import open_file
from epmq_cli.pipeline.verify import tensor_problems
from tests.faults.driver import forked
from tests.helpers.counts import BAD, FUZZED, TRIED


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def header_of(*entries: tuple[str, dict[str, Any]]) -> bytes:
    """A header of these entries; names may repeat."""
    return b"{" + b",".join(f"{json.dumps(name)}:{json.dumps(value)}".encode() for name, value in entries) + b"}"


def written(folder: Path, header: bytes, data: int, length: int | None = None) -> Path:
    """Writes a model folder with this header, which claims `length` bytes, followed by `data` bytes of tensors."""
    header += b" " * (-len(header) % 8)
    length = len(header) if length is None else length
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(data))
    return folder


WHOLE = ("a", entry([2, 3], 0, 24))
HOSTILE = {
    "length of 2^64 - 1": (header_of(WHOLE), 24, (1 << 64) - 1),
    "length of 2^63": (header_of(WHOLE), 24, 1 << 63),
    "length over the limit": (header_of(WHOLE), 24, 100_000_001),
    "length of more than the file": (header_of(WHOLE), 24, 90_000_000),
    "no length": (b"", 0, 0),
    "overlap": (header_of(WHOLE, ("b", entry([2, 3], 12, 36))), 36, None),
    "the same bytes twice": (header_of(WHOLE, ("b", entry([2, 3], 0, 24))), 24, None),
    "gap": (header_of(WHOLE, ("b", entry([2, 3], 28, 52))), 52, None),
    "gap in front": (header_of(("a", entry([2, 3], 4, 28))), 28, None),
    "bytes behind": (header_of(WHOLE), 40, None),
    "a name twice": (header_of(WHOLE, WHOLE), 24, None),
    "a name twice with another type": (header_of(("a", entry([6], 0, 24, "I32")), WHOLE), 24, None),
    "a name twice, each with its bytes": (header_of(WHOLE, ("a", entry([2, 3], 24, 48))), 48, None),
    "negative sizes": (header_of(("a", entry([-2, -3], 0, 24))), 24, None),
    "a size that is not a whole number": (header_of(("a", entry([2.0, 3], 0, 24))), 24, None),
    "sizes whose product overflows": (header_of(("a", entry([1 << 62, 4], 0, 0))), 0, None),
    "sizes whose product overflows, and 0": (header_of(("a", entry([0, 1 << 62, 4], 0, 0))), 0, None),
    "a size of more than 64 bits": (header_of(("a", entry([1 << 70], 0, 24))), 24, None),
    "another size than type and shape have": (header_of(("a", entry([2, 4], 0, 24))), 24, None),
    "another size than the type has": (header_of(("a", entry([2, 3], 0, 24, "F16"))), 24, None),
    "an end before the start": (header_of(("a", entry([2, 3], 24, 0))), 24, None),
    "an unknown type": (header_of(("a", entry([2, 3], 0, 24, "Q4"))), 24, None),
    "bytes missing": (header_of(WHOLE), 20, None),
    "a list": (b"[1]", 0, None),
    "deeply nested": (b"[" * 100_000, 0, None),
    "no JSON": (b"{,", 0, None),
    "no UTF-8": (b'{"\xff":' + json.dumps(WHOLE[1]).encode() + b"}", 24, None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"base: .*(is corrupted or not a safetensors|impossible shape)") as raised:
        ModelFolder(written(tmp_path, *HOSTILE[case]), "base")
    assert "\n" not in str(raised.value)
    TRIED[BAD] += 1


def test_the_unmodified_header_is_accepted(tmp_path: Path) -> None:
    assert ModelFolder(written(tmp_path, header_of(WHOLE), 24), "base").infos["a"].shape == (2, 3)


def test_a_header_with_huge_tensors_takes_no_memory(tmp_path: Path) -> None:
    """The process may allocate 64 MB more than it has."""
    for number, (header, data, length) in enumerate(HOSTILE.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        written(folder, header, data, length)

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)

    def body() -> None:
        for folder in tmp_path.iterdir():
            with pytest.raises(ModelError):
                ModelFolder(folder, "base")

    assert forked(body, limit) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with an unrelated file beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}')
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    shutil.copyfile(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (tmp_path / "secret.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "{parent}/outside.safetensors", "..", ".", "", "a\nb", "sub/../../outside.safetensors"],
)
def test_an_index_cannot_leave_its_folder(file: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weight_map = {"a": file.format(parent=folder.parent)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        ModelError, match="base: the index of .* names .*, which is not in that folder; fetch"
    ) as raised:
        ModelFolder(folder, "base")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}], ids=str)
def test_an_index_without_files_is_refused(index: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index.json has no weight_map .tensor name: file name.; save the model"):
        ModelFolder(folder, "base")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "is not a JSON object; give"), ("3", "is not a JSON object"), ("[" * 100_000, "is not valid JSON")],
    ids=["list", "number", "deep"],
)
def test_a_config_that_is_not_an_object_is_refused(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"base: .*config.json {message}"):
        ModelFolder(folder, "base")


HUGE: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 1 << 70}, "num_hidden_layers=1180591620717411303424"),
    "layers of a part": ({"text_config": {"n_layers": 2}}, "n_layers=2"),
    "labels": ({"num_labels": 1 << 40}, "num_labels=1099511627776"),
}


@pytest.mark.parametrize("case", HUGE)
@pytest.mark.parametrize("read", [lambda folder: ModelFolder(folder, "checkpoint"), load, tensor_problems])
def test_a_config_with_more_layers_than_its_files_is_refused(
    read: Callable[[Path], Any], case: str, folder: Path
) -> None:
    """Transformers would create an object for each layer until memory runs out."""
    config, asked = HUGE[case]
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], **config}))
    with pytest.raises(ModelError, match=f"checkpoint: .*config.json asks for {asked}, which a model of 1 tensors"):
        read(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt"])
def test_links_out_of_a_folder_are_not_followed(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    outside = folder.parent / ("outside.safetensors" if name.endswith("safetensors") else "secret.json")
    (folder / name).symlink_to(outside)
    with pytest.raises(ModelError, match=f"base: .*{name} is a link to .*, outside its folder; replace the link"):
        ModelFolder(folder, "base")


def test_links_inside_a_folder_and_to_a_folder_are_followed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    (folder.parent / "link").symlink_to(folder)
    assert set(ModelFolder(folder.parent / "link", "base").infos) == {"a"}


def snapshot_of(folder: Path, cache: Path) -> Path:
    """The folder as huggingface_hub stores it: files in blobs/, and a snapshot of links."""
    snapshot, blobs = cache / "models--me--it" / "snapshots" / "abc", cache / "models--me--it" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_read(folder: Path) -> None:
    snapshot = snapshot_of(folder, folder.parent / "cache")
    assert set(ModelFolder(snapshot, "base").infos) == {"a"}
    (snapshot / "sub").mkdir()
    for path in [path for path in snapshot.iterdir() if path.is_symlink()]:
        (snapshot / "sub" / path.name).symlink_to(Path("../../../blobs") / path.resolve().name)
    assert set(ModelFolder(snapshot / "sub", "base").infos) == {"a"}
    (snapshot / "vocab.txt").symlink_to(folder.parent / "secret.json")
    with pytest.raises(ModelError, match="vocab.txt is a link to"):
        ModelFolder(snapshot, "base")


def mutated(content: bytes, generator: random.Random, within: int) -> bytes:
    """The bytes with one to four of the first `within` changed, sometimes truncated."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        changed[generator.randrange(within)] = generator.choice([generator.randrange(256), *b'0123456789"[]{},:'])
    return bytes(changed[: generator.randrange(len(changed))] if generator.random() < 0.1 else changed)


@pytest.mark.parametrize("kind", ["safetensors", "zip.pt", "legacy.pt"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_with_random_bytes_lead_to_sentences_only(kind: str, tmp_path: Path) -> None:
    """Seeds are fixed, so failures are reproducible."""
    path = tmp_path / f"x.{kind}"
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.int32)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip.pt")
    content, refused = path.read_bytes(), 0
    header = 8 + int.from_bytes(content[:8], "little") if kind == "safetensors" else len(content)
    for seed in range(400):
        path.write_bytes(mutated(content, random.Random(seed), header))
        try:
            files = SafetensorsFiles(path, "base") if kind == "safetensors" else open_file(path, "base")
            assert all(files.tensor(name).shape == info.shape for name, info in files.infos.items())
        except ModelError as error:
            refused += 1
            assert str(error).startswith("base: ")
        TRIED[FUZZED] += 1
    assert 100 < refused < 400
