"""`merge=mergekit merge.file=config.yml`: the options of epmq that describe the merge of a mergekit file.

The command line is rewritten before the config is composed, so that configs, records and resumed runs hold the options
themselves and not the file's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf

from epmq_cli.config import instantiate
from epmq_cli.config.validate import check_keys
from epmq_cli.errors import ConfigError
from epmq_cli.merge.mergekit_file import MergekitFile, Part, read_mergekit
from epmq_cli.merge.mergekit_options import Options, experts, method_options, suite_options
from epmq_cli.merge.method import ElementwiseRule, MergeData, Need
from epmq_cli.merge.source import MergeSource
from epmq_cli.runtime.console import say

TEMPLATES = ("auto", "chatml")
"""mergekit's names of chat templates that epmq knows."""


@dataclass(frozen=True)
class Mergekit:
    """`merge=mergekit`, which the command line replaces. `file`: a YAML file."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    file: str

    def check(self, tasks: Sequence[str]) -> None:
        """ConfigError, since only the command line reads the file."""
        raise ConfigError(
            "merge=mergekit is read on the command line alone, not in a sweep or a config file; epmq merge "
            f"--from-mergekit {self.file} prints the options to write in its place"
        )

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Never called, see `check`."""
        raise AssertionError(self.file)


def mergekit_options(path: Path, command: str) -> Options:
    """The options of `epmq merge` or `epmq run` for a mergekit file. ConfigError where epmq has no counterpart."""
    file = read_mergekit(path)
    options: Options = {"suite": "causal_lm", **suite_options(file), **merge_options(file, command)}
    if file.dtype is not None:
        options["pack.dtype"] = file.dtype
    tokenizer = _tokenizer(file)
    if command == "merge" and tokenizer:
        options["suite.tokenizer"] = tokenizer
    elif tokenizer and tokenizer != {"source": "base"}:
        raise ConfigError(
            f"{path} makes a tokenizer or a chat template, which epmq run does not; merge with epmq merge first, then "
            "give the result to epmq run as suite.base"
        )
    return options


def merge_options(file: MergekitFile, command: str) -> Options:
    """The method and its options; `merge=slices`, or the slices of `merge=passthrough`, if the file names layers."""
    only = file.parts.get("", [])
    if len(only) == 1 and (not file.sliced or (command == "run" and _is_whole(file, only[0]))):
        return method_options(file, only[0])
    tasks = experts(file)
    slices = {name: [_slice(file, part, tasks) for part in parts] for name, parts in file.parts.items()}
    kind = "passthrough" if file.method == "passthrough" else "slices"
    return {"merge": kind, "merge.slices": slices.get("", slices)}


def _slice(file: MergekitFile, part: Part, tasks: Mapping[str, str]) -> dict[str, Any]:
    options = method_options(file, part)
    ranges = {source.model: None if source.layers is None else list(source.layers) for source in part.inputs}
    if file.method == "passthrough":
        ((model, layers),) = ranges.items()
        scale = {"scale": options["merge.scale"]} if "merge.scale" in options else {}
        return {"expert": tasks[model], "layers": layers, **scale}
    node: Any = OmegaConf.load(instantiate.conf_dir() / "merge" / f"{options['merge']}.yaml")
    fields = OmegaConf.to_container(node, resolve=False)
    assert isinstance(fields, dict)
    fields |= {name.removeprefix("merge."): value for name, value in options.items() if name != "merge"}
    taking = {tasks[model]: own for model, own in ranges.items() if model in tasks}
    base = {"base": ranges[file.base]} if file.base in ranges and file.base not in tasks else {}
    if not base and file.base not in tasks and file.base is not None and file.sliced:
        raise ConfigError(f"each of the slices must have base_model among its sources, got {', '.join(ranges)}")
    return {"experts": taking, **base, "merge": fields}


def _is_whole(file: MergekitFile, part: Part) -> bool:
    """Whether the only slice has all layers of every model, as far as that can be known without a download."""
    ranges = {source.layers for source in part.inputs}
    if file.method == "passthrough" or len(ranges) > 1:
        return False
    ((first, end),) = (each for each in ranges if each)
    base = Path((file.base or file.models[0]).partition("+")[0])
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) if (base / "config.json").is_file() else {}
    known = config.get("num_hidden_layers")
    if first == 0 and known is None:
        say(f"layer_range [0, {end}] is read as all layers, which epmq run merges")
    return first == 0 and known in (None, end)


def _tokenizer(file: MergekitFile) -> dict[str, Any]:
    """`suite.tokenizer`, or {} without one."""
    made: dict[str, Any] = {}
    if file.tokenizer is not None:
        made["source"] = _vocabulary(file, file.tokenizer["source"])
        if tokens := file.tokenizer.get("tokens"):
            made["tokens"] = [_token(file, token, entry or {}) for token, entry in tokens.items()]
        if file.tokenizer.get("pad_to_multiple_of") is not None:
            made["pad_to_multiple_of"] = file.tokenizer["pad_to_multiple_of"]
    if file.chat_template is not None:
        template = file.chat_template
        if "{" not in template and template not in TEMPLATES:
            raise ConfigError(
                f"chat_template={template} is not one of {', '.join(TEMPLATES)}; write the template itself, in Jinja"
            )
        made = {"source": "base", **made, "chat_template": template}
    return made


def _vocabulary(file: MergekitFile, source: str) -> str:
    if source in ("union", "base"):
        return source
    return _named(file, "tokenizer source", source)


def _named(file: MergekitFile, what: str, model: str) -> str:
    """The task of a model, or `base`."""
    tasks = experts(file)
    if model == (file.base or file.models[0]):
        return "base"
    if model not in tasks:
        raise ConfigError(f"{what} {model} must be one of the models that are merged: {', '.join(file.models)}")
    return tasks[model]


def _token(file: MergekitFile, token: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `suite.tokenizer.tokens`."""
    where = f"tokenizer.tokens.{token}"
    check_keys(where, entry, ("source", "force"))
    made: dict[str, Any] = {"token": str(token)}
    source = entry.get("source")
    if isinstance(source, Mapping) and "kind" in source:
        check_keys(f"{where}.source", source, ("kind", "model", "token", "token_id"), ("kind",))
        if source["kind"] == "zero":
            made["model"] = "zero"
        else:
            made["model"] = _named(file, f"{where}.source.model", str(source.get("model")))
            made |= {ours: source[key] for key, ours in (("token", "like"), ("token_id", "id")) if key in source}
    elif source is not None:
        made["model"] = _named(file, f"{where}.source", str(source))
    if entry.get("force"):
        made["force"] = True
    return made
