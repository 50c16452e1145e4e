"""`pack=gguf`: the checkpoint of `pack=compressed_tensors`, and model.gguf beside it with the same integers as blocks.

llama.cpp reads model.gguf. transformers, vLLM, `epmq_cli.load`, `epmq eval` and `epmq verify` read the other files, so
that a run scores the weights that are in model.gguf. What llama.cpp cannot read is refused before calibration, by the
checks of `pack.engine=llama_cpp` (engines.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from epmq_cli.checkpoint.compressed_tensors import CompressedTensorsExporter
from epmq_cli.config.schema import GGUF_DENSE
from epmq_cli.config.validate import check_choice
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family
from epmq_cli.quantize.formats.format import NumberFormat

NAME = "model.gguf"


@dataclass(frozen=True)
class GgufExporter(CompressedTensorsExporter):
    """`pack=gguf`. `dense`: see GgufFile. Scales are float16, as in the blocks."""

    dense: str

    tags: ClassVar[tuple[str, ...]] = (*CompressedTensorsExporter.tags, "gguf")

    def __post_init__(self) -> None:
        check_choice("pack.dtype", self.dtype, ("float16",))
        check_choice("pack.dense", self.dense, GGUF_DENSE)
        super().__post_init__()

    @property
    def gguf(self) -> str | None:
        """See exporter.py."""
        return self.dense

    def check(self, family: Family, formats: Collection[NumberFormat]) -> None:
        """See exporter.py."""
        super().check(family, formats)
        if find_spec("gguf") is None:
            raise ConfigError("pack=gguf needs the package gguf; install it with pip install 'epmq-cli[gguf]'")


def also_gguf(dense: str | None, title: str, save_others: Callable[[Path], None]) -> Callable[[Path], None]:
    """`save_others`, which writes further files of a checkpoint, followed by model.gguf unless `dense` (Exporter.gguf)
    is None. `title`: the name of the model in the file."""

    def save(checkpoint: Path) -> None:
        from epmq_cli.checkpoint.gguf.write import GgufFile

        save_others(checkpoint)
        GgufFile(checkpoint, str(dense)).write(checkpoint / NAME, title)

    return save_others if dense is None else save
