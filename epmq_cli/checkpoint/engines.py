"""The engines that load checkpoints, and what each of them can load.

`ENGINES` is the only place that knows this. `pack.engine=<name>` refuses a run before calibration if the engine cannot
load the result; the model card lists the engines that load the checkpoint; docs/checkpoint.md has the whole table, and
a test compares it with this module. `make engines` loads checkpoints in the engines that are `tested`, and shows that
they fail where this module says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from epmq_cli.checkpoint.compressed_tensors import CompressedTensorsExporter
from epmq_cli.checkpoint.engine import ROWS, Base, Engine, Kernel, LlamaCpp, Vllm
from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.config.instantiate import option_name
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family
from epmq_cli.models.conv1d import is_turned
from epmq_cli.quantize.formats.format import NumberFormat

if TYPE_CHECKING:
    import torch

WIDTHS = (2, 3, 4, 8)
INTEGERS = tuple(Kernel(f"int{bits}", ("none", "whole")) for bits in WIDTHS)
VLLM_GROUPS = (32, 64, 128, ROWS)
VLLM_FAMILIES = ("causal_lm", "bert", "clip", "open_clip")
VLLM_LACKS = ("mllama",)  # since 0.10.2
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
FP8 = ("fp8_dynamic", "fp8_static", "fp8_block")
MX = ("mxfp4a16", "mxfp4", "mxfp8a16", "mxfp8")
SERVE = "vllm serve {folder}{runner}"

ENGINES: Mapping[str, Engine] = {
    "transformers": Engine(
        "transformers",
        {"compressed_tensors": (), "gptq": INTEGERS, "dense": ()},
        mixes=True,  # but for the families for which pack=compressed_tensors refuses it
        experts=(
            *(Kernel(f"int{bits}") for bits in range(2, 9)),
            *(Kernel(name) for name in ("w4a8", "fp8_dynamic", "fp8_static", *MX[:2], "mxfp6a16", "mxfp6a8")),
            Kernel("fp8", groups=(ROWS,)),
        ),
        conv1d=False,
    ),
    "vllm": Vllm(
        "vLLM on CUDA",
        {
            "compressed_tensors": (
                Kernel("int4", ("none", "whole"), VLLM_GROUPS),
                Kernel("int8", groups=VLLM_GROUPS),
                Kernel("fp8", groups=(ROWS,)),
                Kernel("w4a8", groups=VLLM_GROUPS),
                *(Kernel(name) for name in ("w8a8", *FP8, "nvfp4a16", "nvfp4", *MX)),
            ),
            "gptq": (Kernel("int4", groups=VLLM_GROUPS), Kernel("int8", groups=VLLM_GROUPS)),
            "dense": (),
        },
        families=VLLM_FAMILIES,
        lacks=VLLM_LACKS,
        mixes=True,  # vllm_cpu loads int4 in two sizes of groups too, if linears that it fuses have the same
        unmixed=("bert",),  # it gives their linears other names than the config of a mix does
        fused=FUSED,
        experts=tuple(Kernel(f"int{bits}", groups=VLLM_GROUPS) for bits in (4, 8)),
        tested=False,
        command=SERVE,
    ),
    "vllm_cpu": Vllm(
        "vLLM on CPUs",
        {
            "compressed_tensors": (
                Kernel("int4", ("none", "whole")),
                *(Kernel(name) for name in ("w4a8", "w8a8", "fp8_dynamic")),
            ),
            "gptq": (Kernel("int4"),),
            "dense": (),
        },
        families=VLLM_FAMILIES,
        lacks=VLLM_LACKS,
        multiple=32,
        fused=FUSED,
        heads=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512),
        command=SERVE,
    ),
    "gptqmodel": Engine("GPTQModel", {"gptq": INTEGERS}),
    "llama_cpp": LlamaCpp(
        "llama.cpp",
        {"compressed_tensors": (), "gptq": (), "dense": ()},
        families=("causal_lm",),
        mixes=True,
        command="{export}llama-cli -m {file}",
    ),
}
"""By the name of pack.engine."""


def check_engine(exporter: Exporter, family: Family, formats: Collection[NumberFormat]) -> None:
    """ConfigError if an engine that the options of `pack` name cannot load the result; called before any model is
    opened."""
    for option, engine in _required(exporter):
        _raise(option, engine.refusal(_pack(exporter), family, _packed(exporter, formats)))


def loaded_formats(exporter: Exporter, family: Family, formats: Sequence[NumberFormat]) -> Sequence[NumberFormat]:
    """The formats that every engine loads that the options of `pack` name."""
    engines, pack = [engine for _, engine in _required(exporter)], _pack(exporter)
    return [format for format in formats if all(engine.refusal(pack, family, [format]) is None for engine in engines)]


def check_engine_model(
    exporter: Exporter,
    family: Family,
    linears: Mapping[str, torch.Size],
    formats: Collection[NumberFormat],
    base: Base,
) -> None:
    """The same for the shapes of a model, its architecture and tokenizer; called before anything is calibrated.

    If no option names an engine, transformers must load packed weights of GPT-2, because it would put random numbers in
    the place of those that it does not know."""
    required, packed = dict(_required(exporter)), _packed(exporter, formats)
    if not required and is_turned(base.config):
        required = {f"pack={_pack(exporter)}": ENGINES["transformers"]}
    for option, engine in required.items():
        _raise(option, engine.model_refusal(family, linears, packed, base))


def engines_for(
    exporter: Exporter,
    family: Family,
    linears: Mapping[str, torch.Size],
    formats: Collection[NumberFormat],
    base: Base,
) -> list[Engine]:
    """The engines that load a checkpoint. `linears` and `formats`: of the weights that are quantized."""
    pack, packed = _pack(exporter), _packed(exporter, formats)
    return [
        engine
        for engine in ENGINES.values()
        if engine.refusal(pack, family, packed) is None and engine.model_refusal(family, linears, packed, base) is None
    ]


def _required(exporter: Exporter) -> Iterator[tuple[str, Engine]]:
    """The engines that must load the result, by the options that say so."""
    if exporter.gguf is not None:
        yield "pack=gguf", ENGINES["llama_cpp"]
    if exporter.engine is not None:
        yield f"pack.engine={exporter.engine}", ENGINES[exporter.engine]


def _pack(exporter: Exporter) -> str:
    """The option of `pack` whose weights the checkpoint has."""
    return option_name("pack", type(exporter) if exporter.gguf is None else CompressedTensorsExporter)


def _packed(exporter: Exporter, formats: Collection[NumberFormat]) -> Sequence[NumberFormat]:
    """The formats that the checkpoint stores packed."""
    return [*formats] if exporter.packs else []


def _raise(option: str, reason: str | None) -> None:
    if reason is not None:
        raise ConfigError(f"{option}: {reason}")
