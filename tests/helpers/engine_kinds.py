"""Kinds of checkpoints, as docs/checkpoint.md lists them for every engine; that table; a checkpoint of each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import transformers as t

from epmq_cli.checkpoint.calibrated_scales import cache_scales
from epmq_cli.checkpoint.engine import Engine
from epmq_cli.checkpoint.engines import ENGINES
from epmq_cli.checkpoint.write import Contents, write_checkpoint
from epmq_cli.families import FAMILIES
from epmq_cli.families.family import linear_groups, linear_shapes
from epmq_cli.models.attention import cached_attentions
from epmq_cli.models.linears import in_linears
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.formats.names import FIXED
from tests.helpers.byte_level import SIZE, quantized, write_tokenizer
from tests.helpers.formats import ints
from tests.helpers.packs import exporter_of


@dataclass(frozen=True)
class Kind:
    """Checkpoints of some families in one format, or in several; `formats` is empty for dense ones."""

    title: str
    formats: tuple[NumberFormat, ...]
    families: tuple[str, ...] = ("causal_lm",)
    pack: str = "compressed_tensors"

    def refusals(self, engine: Engine) -> list[str | None]:
        """For each family, why the engine does not load such a checkpoint; None where it does."""
        packed = self.formats if exporter_of(self.pack).packs else ()
        return [engine.refusal(self.pack, FAMILIES[name], packed) for name in self.families]

    def cell(self, engine: Engine) -> str:
        """What the table says."""
        refused = [reason is not None for reason in self.refusals(engine)]
        assert len({*refused}) == 1, (self.title, engine.title)
        return "no" if refused[0] else "yes" if engine.tested else "by its sources"


OTHERS = ("roberta", "deberta", "distilbert", "modernbert", "vit", "t5", "bart", "whisper")
ENCODERS = ("bert", "clip")
KINDS: dict[str, Kind] = {
    "int4-32": Kind("4 bits, groups of 32", (ints(4, 32),)),
    "int4-64": Kind("4 bits, groups of 64", (ints(4, 64),)),
    "int4-128": Kind("4 bits, groups of 128", (ints(4, 128),)),
    "int4-rows": Kind("4 bits, one scale per row", (ints(4, -1),)),
    "int4-16": Kind("4 bits, groups of 16", (ints(4, 16),)),
    "int4-zeros": Kind("4 bits with zero points, groups of 64", (ints(4, 64, False),)),
    "int8": Kind("8 bits", (ints(8, 64),)),
    "int8-zeros": Kind("8 bits with zero points", (ints(8, 64, False),)),
    "int3": Kind("3 bits", (ints(3, 64),)),
    "int2": Kind("2 bits", (ints(2, 64),)),
    "mixed": Kind("3 and 4 bits, mixed", (ints(3, 64), ints(4, 64))),
    "mixed-8": Kind("4 and 8 bits, mixed", (ints(4, 64), ints(8, 64))),
    "fp8-rows": Kind("FP8, one scale per row", (Fp8Format(-1),)),
    "fp8": Kind("FP8, groups of 64", (Fp8Format(64),)),
    "int5": Kind("5 bits, groups of 32", (ints(5, 32),)),
    "k-quants": Kind("2, 3 or 6 bits, groups of 256", (ints(2, 256), ints(3, 256), ints(6, 256))),
    "w8a8": Kind("`w8a8`", (FIXED["w8a8"],)),
    "fp8-dynamic": Kind("`fp8_dynamic`", (FIXED["fp8_dynamic"],)),
    "fp8-static": Kind("`fp8_static`", (FIXED["fp8_static"],)),
    "fp8-block": Kind("`fp8_block`", (FIXED["fp8_block"],)),
    "w4a8": Kind("`w4a8`, groups of 64", (IntFormat(4, 64, "none", "int8"),)),
    "nvfp4": Kind("`nvfp4a16`", (FIXED["nvfp4a16"],)),
    "nvfp4-a4": Kind("`nvfp4`", (FIXED["nvfp4"],)),
    "mxfp4": Kind("`mxfp4a16`, `mxfp4`", (FIXED["mxfp4a16"],)),
    "mxfp8": Kind("`mxfp8a16`, `mxfp8`", (FIXED["mxfp8a16"],)),
    "mxfp6": Kind("`mxfp6a16`, `mxfp6a8`", (FIXED["mxfp6a16"],)),
    "dense": Kind("`pack=dense`", (ints(4, 64),), pack="dense"),
    "gptq": Kind("`pack=gptq`, 4 bits", (ints(4, 64),), pack="gptq"),
    "gptq-zeros": Kind("`pack=gptq`, 4 bits with zero points", (ints(4, 64, False),), pack="gptq"),
    "gptq-8": Kind("`pack=gptq`, 8 bits", (ints(8, 64),), pack="gptq"),
    "gptq-3": Kind("`pack=gptq`, 3 bits", (ints(3, 64),), pack="gptq"),
    "encoders": Kind("BERT and CLIP, 4 bits", (ints(4, 32),), ENCODERS),
    "encoders-8": Kind("BERT and CLIP, 8 bits", (ints(8, 32),), ENCODERS),
    "encoders-dense": Kind("BERT and CLIP, `pack=dense`", (ints(4, 32),), ENCODERS, "dense"),
    "others": Kind("other families, 4 bits", (ints(4, 32),), OTHERS),
}
"""By a short name. Kinds without families are of decoders."""


def table(engines: Sequence[Engine] = tuple(ENGINES.values())) -> str:
    """The Markdown table with a row for each kind and a column for each engine."""
    rows = [["checkpoint", *(engine.title for engine in engines)], ["---"] * (1 + len(engines))]
    rows += [[kind.title, *(kind.cell(engine) for engine in engines)] for kind in KINDS.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


WIDE: dict[str, Any] = {**SIZE, "hidden_size": 256, "intermediate_size": 256}
"""Sizes with room for groups of 256 inputs and attention heads of 64."""
RANGE = 16.0
"""No input of a linear is larger, so that static scales cut nothing off."""
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["red", "photo", "of", "a", "film", "[CLS]", "[SEP]", "[UNK]", "[PAD]", "[MASK]"]
"""No special token is the first, which vLLM needs as a place for pictures."""


def write_kind(folder: Path, name: str, family: str, model: str = "llama", cached: float | None = None) -> Path:
    """Writes a checkpoint of a kind: a random model, rounded to nearest. `model`: of decoders. `cached`: the range
    of cached keys and values, whose scales it gets; None for no scales. Returns its folder."""
    kind, base = KINDS[name], folder / "base"
    # in float32 the product of a code and a scale is exact, as in an engine that computes in float32
    dtype = torch.float16 if kind.pack == "gptq" else torch.float32
    torch.manual_seed(0)
    made = {"causal_lm": _decoder, "bert": _bert, "clip": _clip}[family](base, model).eval()
    for parameter in made.parameters():
        matrix = parameter.ndim > 1
        size = 1.6 / parameter[0].numel() ** 0.5 if matrix else 0.1
        parameter.data = torch.randn_like(parameter) * size + (not matrix)
    made.save_pretrained(base)
    in_linears(made)
    linears = dict(linear_shapes(made, FAMILIES[family]))
    groups = linear_groups(made, FAMILIES[family])  # linears that read the same input share a format
    format_of = dict(zip(dict.fromkeys(groups.values()), cycle(kind.formats), strict=False))
    weights = {
        linear: quantized(
            made.get_submodule(linear).weight.detach(), format_of[groups[linear]].for_inputs(RANGE), dtype
        )
        for linear in linears
    }
    eager = FAMILIES[family].dequantize_on_load
    zeros = kind.pack == "gptq" and kind.formats[0].zero_points != "none"
    exporter = exporter_of(
        kind.pack, dtype=str(dtype).removeprefix("torch."), **({"format": "gptq_v2"} if zeros else {})
    )
    scales = {} if cached is None else cache_scales(dict.fromkeys(cached_attentions(made), (cached, cached)))
    contents = Contents(exporter, made, weights, eager, {}, base, {}, dtype, cache=scales)
    write_checkpoint(folder / "checkpoint", contents, 10**9)
    return folder / "checkpoint"


def _decoder(folder: Path, model: str) -> Any:
    write_tokenizer(folder)
    return DECODERS[model]()


MIXTURE: dict[str, Any] = {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**WIDE)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**WIDE)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=256, n_layer=2, n_head=4, n_inner=256, n_positions=64, vocab_size=SIZE["vocab_size"])
    ),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**WIDE, num_local_experts=4)),
    "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**MIXTURE)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**MIXTURE, shared_expert_intermediate_size=256)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**MIXTURE, head_dim=64)),
}


def _bert(folder: Path, model: str) -> Any:
    write_words(folder)
    return t.BertModel(t.BertConfig(**ENCODER, vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=8))


def _clip(folder: Path, model: str) -> Any:
    write_words(folder)
    t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    ids = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 8}
    text = {**ENCODER, **ids, "vocab_size": len(WORDS), "max_position_embeddings": 16, "projection_dim": 64}
    vision = {**ENCODER, "image_size": 16, "patch_size": 8, "projection_dim": 64}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def write_words(folder: Path) -> None:
    """Writes a tokenizer of whole words; texts start with [CLS] and end with [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 5), ("[SEP]", 6)])
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    ends = {"bos_token": "[CLS]", "eos_token": "[SEP]", "mask_token": "[MASK]"}
    t.PreTrainedTokenizerFast(tokenizer_object=made, **names, **ends).save_pretrained(folder)
