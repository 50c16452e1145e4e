"""The general oracle of a merge: a lone expert under merge=average equals that expert in transformers, whatever its
files store. Folders as users have them, the bodies of both commands without a process, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epmq_cli.checkpoint.dense import DenseExporter
from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.checkpoint.write import Contents, write_checkpoint
from epmq_cli.checkpoint.write_merged import write_dense
from epmq_cli.data.suite import Suite
from epmq_cli.data.table import Table
from epmq_cli.families import FAMILIES
from epmq_cli.families.family import load_model
from epmq_cli.merge.average import Average
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.suite_models import SuiteModels, fit_source, written_dtype
from epmq_cli.models.processor_files import ProcessorFiles
from epmq_cli.models.weights import copy_into

Copies = Mapping[str, str]
"""Stored copies of tied tensors: copy -> source, by name."""
CPU = torch.device("cpu")
PACK = DenseExporter("auto", "5GB", None, False)


def store(
    model: Any, folder: Path, copies: Copies | None = None, without: Sequence[str] = (), change: Any = None
) -> Path:
    """Writes a model folder: the files of save_pretrained plus copies of tied tensors, without some tensors.
    `change`: edits the tensors before they are written."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors |= {copy: tensors[source].clone() for copy, source in (copies or {}).items()}
    for name in without:
        del tensors[name]
    if change is not None:
        change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def suite_of(family: str, base: Path, experts: Mapping[str, Path], **fields: Any) -> Suite:
    """A suite of these models. Its data are never read."""
    data = Table(train="unread.tsv", test="unread.tsv")
    given = {"classes": ["a", "b"], "templates": ["{}"]} if family in ("clip", "open_clip", "t5") else {}
    metric = {"metric": "perplexity"} if family == "causal_lm" else {}
    tasks = {name: {"expert": str(path), "data": data, **given, **metric} for name, path in experts.items()}
    return Suite("mini", family, str(base), tasks, **fields)


def merged_folder(folder: Path, suite: Suite, exporter: Exporter = PACK, method: Any = None) -> Path:
    """The result of `epmq merge` for a suite."""
    models = SuiteModels(suite, FAMILIES[suite.family], whole=True)
    merged = LazyMerge(models.source, method or Average(), torch.float32)
    write_dense(folder, models, merged, exporter, ProcessorFiles(models.base.path))
    return folder


def run_folder(folder: Path, suite: Suite, exporter: Exporter = PACK, method: Any = None) -> Path:
    """The result of `epmq run quant=none` for a suite, with a walk that changes nothing."""
    family = FAMILIES[suite.family]
    models = SuiteModels(suite, family)
    dtype = written_dtype(models.source, exporter.dtype)
    model = fit_source(load_model(family, models.base.path, CPU, torch.float32), models)
    copy_into(model, LazyMerge(models.source, method or Average(), dtype))
    contents = Contents(exporter, model, {}, False, {}, models.base.path, {}, dtype, models.ties.changes)
    write_checkpoint(folder, contents, 5 * 10**9)
    return folder


WRITERS: dict[str, Callable[..., Path]] = {"merge": merged_folder, "run": run_folder}
"""By command."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers; tied ones under each of their names."""
    return dict(model.state_dict())


@torch.inference_mode()
def assert_same(found: nn.Module, wanted: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Asserts that two models have equal tensors, and equal outputs for these inputs."""
    own, other = tensors_of(found), tensors_of(wanted)
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    if inputs is not None:
        one, two = (model.eval()(**inputs) for model in (found, wanted))
        for key, value in one.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, two[key]), key
