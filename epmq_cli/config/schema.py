"""The option classes of the groups `calib`, `pack` and `eval`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from epmq_cli.config.validate import check_choice, check_range
from epmq_cli.errors import ConfigError, literal

DTYPES = ("auto", "float32", "float16", "bfloat16")


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


KERNELS = ("auto", "int4", "exact", "dequantize")


ENGINES = ("transformers", "vllm", "vllm_cpu", "gptqmodel", "llama_cpp")
"""The engines of checkpoint/engines.py."""


GGUF_DENSE = ("f16", "bf16", "f32", "q8_0")
"""How a GGUF file may store matrices that are not quantized."""


GENERATE = "generate"


STAGES = ("base", "experts", "merged", "quantized")


def bytes_of(name: str, text: object) -> int:
    """The number of bytes in a text such as 5GB or 4.2GB. Raises ConfigError, which names the option, for others."""
    parts = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([A-Z]B)", text) if isinstance(text, str) else None
    count = int(Decimal(parts[1]) * UNITS.get(parts[2], 0)) if parts else 0
    if count == 0:
        raise ConfigError(f"{name} must be a number with a unit ({', '.join(UNITS)}) such as 5GB, got {literal(text)}")
    return count


def cache_bytes(size: object) -> int | None:
    """The number of bytes of an option such as cache=10GB; None for cache=false."""
    if size is None or size is False:
        return None
    if size is True:
        raise ConfigError("cache must be a size on disk such as 10GB, or false, got true")
    return bytes_of("cache", size)


@dataclasses.dataclass(frozen=True)
class Calib:
    """`calib=<name>`. `samples`: the number of train samples per task. `views`: the number of forms of each sample,
    itself and changed copies (data/views.py). `batch_size`: samples per batch. `source`: `data`, or `generate` for
    text that the experts of language models write themselves. `memory`: the budget for samples, moments and
    activations, such as 8GB; activations that exceed it go to files in the run folder. `student`: where the
    model is: in the device's `memory`, or its blocks in that of the `cpu` or in files (`disk`)."""

    samples: int
    views: int
    batch_size: int
    source: str
    memory: object
    student: str

    def __post_init__(self) -> None:
        check_range("calib.samples", self.samples, 1, 1 << 30, integer=True)
        check_range("calib.views", self.views, 1, 1000, integer=True)
        check_range("calib.batch_size", self.batch_size, 1, 1 << 20, integer=True)
        check_choice("calib.source", self.source, ("data", GENERATE))
        bytes_of("calib.memory", self.memory)
        check_choice("calib.student", self.student, ("memory", "cpu", "disk"))


@dataclasses.dataclass(frozen=True)
class Pack:
    """The fields that all `pack` options share. `dtype`: the type of scales and dense tensors; `auto` is the type of
    most elements of the base (`epmq merge` keeps the type of each tensor). `shard_size`: such as 5GB. `engine`: one of
    ENGINES that must load the checkpoint; None if any may."""

    dtype: str
    shard_size: object
    engine: str | None

    cache_config: ClassVar[Mapping[str, Any]] = {}
    """The entries of quantization_config that tell engines of the scales of cached keys and values; empty if the option
    stores none."""

    def __post_init__(self) -> None:
        check_choice("pack.dtype", self.dtype, DTYPES)
        if self.engine is not None:
            check_choice("pack.engine", self.engine, ENGINES)
        bytes_of("pack.shard_size", self.shard_size)

    @property
    def gguf(self) -> str | None:
        """See checkpoint/exporter.py."""
        return None


@dataclasses.dataclass(frozen=True)
class OpenClipPack(Pack):
    """`open_clip`: whether CLIP models are also written for open_clip (checkpoint/open_clip.py)."""

    open_clip: bool


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`eval=<name>`. `batch_size`: samples per batch. `samples`: the maximum number of samples of each test split, null
    for all. `stages`: the stages that are scored. `kernel`: runs the packed linears of a checkpoint
    (checkpoint/load.py). `round_inputs`: whether linears round their inputs where engines do
    (checkpoint/rounded_inputs.py)."""

    batch_size: int
    samples: int | None
    stages: tuple[str, ...]
    kernel: str
    round_inputs: bool

    def __post_init__(self) -> None:
        check_range("eval.batch_size", self.batch_size, 1, 1 << 20, integer=True)
        if self.samples is not None:
            check_range("eval.samples", self.samples, 1, 1 << 30, integer=True)
        for stage in self.stages:
            check_choice("eval.stages", stage, STAGES)
        check_choice("eval.kernel", self.kernel, KERNELS)
        check_choice("eval.round_inputs", self.round_inputs, (True, False))


@dataclasses.dataclass(frozen=True)
class Harness(Evaluation):
    """`eval=lm_eval`. `tasks`: tasks of lm-evaluation-harness that replace the suite's. `shots`: few-shot examples,
    null for each task's default. `chat_template`: whether the tokenizer's chat template writes the prompts, with
    examples as earlier turns. `include_path`: a folder of the user's task files. `server`: the address of a server of
    the checkpoint, whose answers `epmq eval` scores. Harness tasks do not belong to experts, so the stage `experts` is
    not scored."""

    tasks: Sequence[str]
    shots: int | None
    include_path: str | None
    chat_template: bool = False
    server: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.server is not None and not re.fullmatch(r"https?://\S+[^\s/]", str(self.server)):
            raise ConfigError(f"eval.server must be an address such as http://localhost:8000, got {self.server!r}")
        for stage in self.stages:
            check_choice("eval.stages", stage, [other for other in STAGES if other != "experts"])
        if not self.tasks or not isinstance(self.tasks, list | tuple):
            raise ConfigError(f"eval.tasks must be a list such as [arc_easy], got {literal(self.tasks)}")
        check_choice("eval.chat_template", self.chat_template, (True, False))
        if self.shots is not None:
            check_range("eval.shots", self.shots, 0, 1000, integer=True)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"eval.include_path must be a folder, got {self.include_path!r}")


def scores_samples(evaluation: Evaluation) -> bool:
    """Whether a run scores the suite's tasks on their test samples."""
    return bool(evaluation.stages) and not isinstance(evaluation, Harness)
