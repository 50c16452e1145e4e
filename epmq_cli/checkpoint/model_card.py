"""The model card of a checkpoint: metadata for the hub, what was merged and how, scores, and code that loads it."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import TYPE_CHECKING, Any

from epmq_cli import __version__
from epmq_cli.checkpoint.card_metadata import front_matter, metadata, model_index
from epmq_cli.checkpoint.engine import Base
from epmq_cli.checkpoint.engines import ENGINES, engines_for
from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.checkpoint.loading_code import head_code, other_code, shell_commands, transformers_code
from epmq_cli.config.files import own_folder
from epmq_cli.data.suite import Suite
from epmq_cli.families.family import Family, linear_shapes
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.store.manifest import replace_files

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

NAME = "README.md"
STAGE = "quantized"
"""The stage of the scores whose model is the checkpoint."""
PERPLEXITY = "perplexity"
ELSEWHERE = (
    "out",
    "device",
    "cache",
    "resume",
    "data_root",
    "eval.batch_size",
    "calib.memory",
    "calib.student",
    "tracking",
)
"""Options that change where and how a run computes, and not its result."""
SPECIAL = re.compile(r"[\\`*\[\]#~|]|(?<![^\W_])_|_(?![^\W_])")  # inside words an underscore means nothing
CARD = Template("""
# $name: one model of $count experts

Made by epmq $version: merged with $merge, calibrated with $guidance$refined, quantized with $quantizer.

- base: $base
- experts: $experts
- weights of the transformer blocks' linears: $weights
$scores
## Load

$code
$processors
## Made with

$command

`epmq eval path/of/this/folder` scores the model on every task again; `epmq verify path/of/this/folder` checks its \
files. `epmq.json` holds the settings of the run, and the names of the classes in the order of the logits.
""")


@dataclass(frozen=True)
class Picture:
    """A picture of the scores: its file, and what it shows in words."""

    png: bytes
    alt: str


@dataclass(frozen=True)
class ModelCard:
    """What a card says of a checkpoint.

    `choices`: the names of merge, guidance, quantizer and refinement by group. `formats`: the number formats that a
    linear can have. `bits`: the average width, None if nothing is quantized. `loading`: see `loading_code`. `license`:
    the base's, if it names one. `processors`: the folder, in the checkpoint, of each tokenizer or image processor that
    belongs to one task. `overrides`: of the command line.
    """

    suite: Suite
    pipeline: str | None
    choices: Mapping[str, str]
    formats: Sequence[NumberFormat]
    bits: float | None
    exporter: Exporter
    loading: str
    license: str | None = None
    processors: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()

    def text(self, scores: Mapping[str, Any] | None = None, pictures: Mapping[str, Picture] | None = None) -> str:
        """The text of README.md. `scores`: those of metrics.json, if the model is scored. `pictures`: of the scores, by
        the name of the file beside README.md."""
        refinement = self.choices.get("refine", "none")
        shown = scores if scores and scores["tasks"] else None
        body = CARD.substitute(
            name=_plain(self.suite.name),
            count=len(self.suite.members),
            version=__version__,
            merge=_code(self.choices["merge"]),
            guidance=_code(self.choices["guidance"]),
            refined="" if refinement == "none" else f", refined with {_code(refinement)}",
            quantizer=_code(self.choices["quant"]),
            base=_code(self.suite.base),
            experts=_experts(self.suite),
            weights=self._weights(),
            scores=f"\n## Scores\n\n{_pictures(pictures or {})}{score_table(shown)}\n" if shown else "",
            code=self.loading,
            processors=_processors(self.processors),
            command=_block("bash", self._command()),
        )
        return self._front(shown) + body

    def _front(self, scores: Mapping[str, Any] | None) -> str:
        index = model_index(self.suite, self.pipeline, scores, STAGE) if scores else []
        tags = [*(["quantization"] if self.bits is not None else []), *self.exporter.tags]
        return front_matter(metadata(self.suite, self.pipeline, tags, self.license, index))

    def _weights(self) -> str:
        stored = ", stored dequantized" if self.formats and not self.exporter.packs else ""
        return _weights(self.formats, self.bits) + stored

    def _command(self) -> str:
        given = {text.lstrip("+~").partition("=")[0]: text for text in self.overrides}  # of equal names the last counts
        told = [text for name, text in sorted(given.items()) if name not in ELSEWHERE and not name.startswith("hydra")]
        return " ".join(["epmq run", *own_folder(told), *(shlex.quote(" ".join(text.split())) for text in told)])


def loading_code(
    family: Family, model: nn.Module, suite: Suite, formats: Sequence[NumberFormat], exporter: Exporter, base: Base
) -> str:
    """The part of a card with the engines that load the checkpoint and the code for each, and of a task's head.
    `formats`: of the quantized linears."""
    heads, first = family.heads != "none", suite.members[0].name
    engines = engines_for(exporter, family, dict(linear_shapes(model, family)), formats, base)
    named = ", ".join(engine.label for engine in engines)
    first_line = f"Loaded by {named}. With transformers:" if named else "Loaded by epmq alone, as weights are packed:"
    parts = [first_line, _block("python", transformers_code(family, model, formats, exporter, own=not named))]
    if named and ENGINES["transformers"] not in engines:
        parts = [f"Loaded by {named}, not by transformers."]
    if heads:
        parts += [
            f"The heads of the tasks are in `heads/heads.safetensors`. The logits of {_plain(first)}, behind the code "
            "above:",
            _block("python", head_code(family, model, first)),
        ]
    for package, code in other_code(formats, exporter).items():
        parts += [f"With {package}:", _block("python", code)]
    for labels, command in shell_commands(engines, family, exporter).items():
        parts += [f"With {labels}:", _block("bash", command)]
    return "\n\n".join(parts)


def write_scores(checkpoint: Path, card: ModelCard, scores: Mapping[str, Any], pictures: Mapping[str, Picture]) -> None:
    """Replaces the card of a checkpoint by one with the scores, which are measured on the checkpoint itself, and writes
    their pictures beside it."""
    if scores["tasks"]:
        files = {name: picture.png for name, picture in pictures.items()}
        replace_files(checkpoint, {**files, NAME: card.text(scores, pictures).encode()})


def _pictures(pictures: Mapping[str, Picture]) -> str:
    return "".join(f"![{_plain(picture.alt)}]({name})\n\n" for name, picture in pictures.items())


def score_table(scores: Mapping[str, Any]) -> str:
    """A Markdown table with a row for each task and the mean, and a column for each stage; in % except perplexities."""
    stages, metrics = list(scores["average"]), scores["metrics"]
    rows = [["task", "metric", *stages], ["---", "---", *["---:"] * len(stages)]]
    for task, by_stage in scores["tasks"].items():
        kind = metrics[task]
        rows.append([_plain(task), _plain(kind), *(_score(kind, by_stage.get(stage)) for stage in stages)])
    kinds = {*metrics.values()}
    kind = PERPLEXITY if kinds == {PERPLEXITY} else ""
    rows.append(["**average**", "", *(_score(kind, scores["average"][stage]) for stage in stages)])
    unit = "" if kinds == {PERPLEXITY} else "In %, except perplexities. " if PERPLEXITY in kinds else "In %. "
    note = "Each expert is scored on its own task." if "experts" in stages else ""
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{unit}{note}\n\n{table}".lstrip()


def _score(kind: str, score: float | None) -> str:
    if score is None:
        return ""
    return f"{score:.2f}" if kind == PERPLEXITY else f"{100 * score:.1f}"


def _block(language: str, code: str) -> str:
    """A code block whose fence is longer than any run of backticks in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def _processors(places: Mapping[str, str]) -> str:
    """The paragraph about tasks that use their expert's own tokenizer or image processor."""
    if not places:
        return ""
    lines = "\n".join(f"- {_plain(task)}: {_code(place)}" for task, place in places.items())
    return (
        "\nThe tokenizer or image processor beside the model is the base's. These tasks need their expert's own, which "
        f"makes other inputs; load it from its folder:\n\n{lines}\n"
    )


def _experts(suite: Suite) -> str:
    return ", ".join(f"{_code(task.expert)} ({_plain(task.name)})" for task in suite.members)


def _plain(text: str) -> str:
    """Markdown that shows the text on one line. HTML and Markdown in it are escaped."""
    return SPECIAL.sub(r"\\\g<0>", html.escape(" ".join(text.split())))


def _code(text: str) -> str:
    """Markdown that shows the text as code. The fence is longer than any run of backticks in the text."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _weights(formats: Sequence[NumberFormat], bits: float | None) -> str:
    """How the weights of the blocks' linears are stored."""
    if not formats or bits is None:
        return "dense"
    shared = formats[0]
    symmetric = "symmetric" if shared.zero_points == "none" else "asymmetric"
    sizes = sorted({format.group_size for format in formats} - {-1})
    words = [*map(str, sizes), *(["whole rows"] if shared.group_size == -1 else [])]
    groups = f"groups of {_listed(words)}" if sizes else "one scale a row"
    return f"{bits:.4g} bits{_named(formats, bits)}, {symmetric}, {groups}"


def _named(formats: Sequence[NumberFormat], bits: float) -> str:
    """The formats in brackets. Integer formats are named by their bits, and omitted if all weights have the same."""
    integers = all(format.name == f"int{format.bits}" for format in formats)
    named = _listed(list(dict.fromkeys(str(format.bits) if integers else format.name for format in formats)))
    if bits in [format.bits for format in formats]:
        return "" if integers else f" ({named})"
    return f" on average ({named})"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
