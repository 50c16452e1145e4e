"""Oracle: valid files with random bytes or values changed. Readers accept them or raise an EpmqError of one line,
and nothing else. Seeds are fixed; paths and times in the bytes are not."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file
from yaml import YAMLError

from epmq_cli.checkpoint.load import model_config
from epmq_cli.config import instantiate
from epmq_cli.errors import EpmqError
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.model_folder import ModelFolder, SafetensorsFiles
from epmq_cli.models.tokenizers import vocabulary
from epmq_cli.pipeline import verify
from epmq_cli.pipeline.reload import checkpoint_suite
from epmq_cli.pipeline.verify import tensor_problems
from epmq_cli.store.manifest import file_problems
from tests.helpers.counts import FUZZED, TRIED
from tests.helpers.hubs import run_in
from tests.helpers.tiers import only, slow

FEW_OR_MANY = pytest.mark.parametrize("count", [80, slow(4000)])
ODD = [
    None,
    True,
    -1,
    0,
    1 << 70,
    0.5,
    "",
    "x",
    "../x",
    "${x}",
    "\0",
    [],
    {},
    [1],
    {"a": 1},
    [[]],
    "epmq_cli.data.table.Table",
]


def read_folder(folder: Path) -> None:
    found = ModelFolder(folder, "base")
    for name in found.infos:
        found.tensor(name)


def read_config(folder: Path) -> None:
    model_config(folder, SafetensorsFiles(folder, "checkpoint"))


def read_adapter(folder: Path) -> None:
    found = Adapted(folder, "expert", ModelFolder(folder.parent / "sharded", "base"), ["q.weight"])
    for name in found.infos:
        found.tensor(name)


def read_suite(folder: Path) -> None:
    """Reads a suite like `launch`, which turns errors of PyYAML and OmegaConf into sentences."""
    try:
        node = OmegaConf.load(folder / "suite" / "mini.yaml")
        OmegaConf.to_container(node, resolve=True)
    except (OSError, YAMLError, UnicodeDecodeError, RecursionError, OmegaConfBaseException):
        return
    instantiate.build("suite", node)  # type: ignore[arg-type]


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "index": ("sharded/model.safetensors.index.json", lambda root: read_folder(root / "sharded")),
    "record": ("run/checkpoint/epmq.json", lambda root: checkpoint_suite(root / "run/checkpoint", None, None)),
    "manifest": ("run/checkpoint/manifest.json", lambda root: file_problems(root / "run/checkpoint")),
    "metrics": ("run/metrics.json", lambda root: verify._run_scores(root / "run/metrics.json")),
    "config": ("run/checkpoint/config.json", lambda root: read_config(root / "run/checkpoint")),
    "tokenizer": (
        "run/checkpoint/tokenizer.json",
        lambda root: vocabulary(root / "run/checkpoint", root / "run/checkpoint"),
    ),
    "adapter": ("adapter/adapter_config.json", lambda root: read_adapter(root / "adapter")),
    "suite": ("suite/mini.yaml", read_suite),
}
"""The changed file, and the function that reads it, both relative to a folder."""
ADAPTER = {"peft_type": "LORA", "r": 1, "lora_alpha": 4, "use_rslora": False, "alpha_pattern": {"q": 8}, "bias": "none"}


@pytest.fixture(scope="module")
def sound(bert_hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a sharded model, an adapter of that model, and a suite."""
    root = tmp_path_factory.mktemp("sound")
    run_in(root / "run", bert_hub, "eval.stages=[quantized]", "eval.samples=4", "calib.samples=8")
    shutil.copytree(bert_hub / "configs" / "suite", root / "suite")
    (root / "sharded").mkdir()
    (root / "sharded" / "config.json").write_text("{}")
    for name in ("a.weight", "q.weight"):
        save_file({name: torch.ones(2, 2)}, root / "sharded" / f"{name}.safetensors")
    names = {name: f"{name}.safetensors" for name in ("a.weight", "q.weight")}
    index = {"metadata": {"total_size": 32}, "weight_map": names}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    parts = {"base_model.model.q.lora_A.weight": torch.ones(1, 2), "base_model.model.q.lora_B.weight": torch.ones(2, 1)}
    save_file(parts, root / "adapter" / "adapter_model.safetensors")
    return root


def refused(read: Callable[[Path], Any], root: Path) -> bool:
    """Whether a reader refuses the files; any exception but EpmqError fails the test."""
    try:
        read(root)
    except EpmqError as error:
        assert "\n" not in str(error)
        return True
    return False


def with_odd_bytes(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        changed[generator.randrange(len(changed))] = generator.choice([generator.randrange(256), *b'0129"[]{},:-.\\n'])
    return bytes(changed[: generator.randrange(len(changed))] if generator.random() < 0.1 else changed)


def with_an_odd_value(value: Any, generator: random.Random) -> Any:
    """The JSON with one value at any depth replaced, removed or added."""
    if not isinstance(value, (dict, list)) or not value or generator.random() < 0.15:
        return generator.choice(ODD)
    changed = copy.copy(value)
    key = generator.choice(list(value)) if isinstance(value, dict) else generator.randrange(len(value))
    if generator.random() < 0.1:
        del changed[key]
    elif isinstance(changed, dict) and generator.random() < 0.1:
        changed[str(generator.choice(ODD))] = generator.choice(ODD)
    else:
        changed[key] = with_an_odd_value(value[key], generator)
    return changed


@FEW_OR_MANY
@pytest.mark.parametrize("kind", only(("index", "record", "config", "adapter", "suite"), READERS))
def test_files_with_random_bytes_or_values_lead_to_sentences_only(
    kind: str, count: int, sound: Path, tmp_path: Path
) -> None:
    shutil.copytree(sound, tmp_path / "root")
    name, read = READERS[kind]
    path = tmp_path / "root" / name
    content, results = path.read_bytes(), set()
    assert not refused(read, tmp_path / "root")
    for seed in range(count):
        generator = random.Random(seed)
        if seed % 2:
            path.write_bytes(with_odd_bytes(content, generator))
        else:
            whole = OmegaConf.to_container(OmegaConf.load(path)) if kind == "suite" else json.loads(content)
            path.write_text(json.dumps(with_an_odd_value(whole, generator)))  # JSON is YAML
        results.add(refused(read, tmp_path / "root"))
        TRIED[FUZZED] += 1
        path.write_bytes(content)
    assert results == {True, False} or kind == "manifest"  # here every change is a problem, not an error


@FEW_OR_MANY
def test_a_checkpoint_with_a_random_config_value_leads_to_problems_only(
    count: int, sound: Path, tmp_path: Path
) -> None:
    """A fifth as many cases, because each builds a model."""
    shutil.copytree(sound / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / "config.json"
    whole = json.loads(path.read_text())
    for seed in range(count // 5):
        path.write_text(json.dumps(with_an_odd_value(whole, random.Random(seed))))
        refused(lambda root: tensor_problems(root / "run" / "checkpoint"), tmp_path)
        TRIED[FUZZED] += 1
