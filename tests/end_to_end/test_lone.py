"""Oracle: transformers. A lone expert under merge=average equals that expert in every tensor and in the logits,
whichever of its tied tensors its files store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as t
from torch import Tensor

from epmq_cli.families import FAMILIES
from tests.conftest import drifted
from tests.helpers.lone import WRITERS, assert_same, store, suite_of
from tests.helpers.tiers import every, only, slow

VOCABULARY = 24
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZE, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 32}
ENCODER = {**SIZE, **IDS, "max_position_embeddings": 40}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BERT_TABLE, BERT_HEAD = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
WORDS = {"input_ids": torch.tensor([[1, 5, 6, 7, 2], [1, 9, 8, 3, 2]])}
ANSWERS = {**WORDS, "decoder_input_ids": torch.tensor([[0, 4], [0, 5]])}
PICTURES = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


class Kind(NamedTuple):
    """A model: its family, class, config, inputs, and its tied tensors with their sources."""

    family: str
    make: Callable[[], Any]
    inputs: dict[str, Tensor]
    copies: dict[str, str] = {}  # noqa: RUF012 - never changed
    commands: tuple[str, ...] = ("merge", "run")


def clip() -> Any:
    text = {**SIZE, **IDS, "max_position_embeddings": 16}
    return t.CLIPModel(
        t.CLIPConfig(text_config=text, vision_config={**SIZE, "image_size": 16, "patch_size": 8}, projection_dim=32)
    )


def deberta() -> Any:
    return t.DebertaV2ForMaskedLM(
        t.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0)
    )


BERT = {BERT_HEAD: BERT_TABLE, "cls.predictions.decoder.bias": "cls.predictions.bias"}
ROBERTA = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
DEBERTA = {BERT_HEAD: "deberta.embeddings.word_embeddings.weight"}
DEBERTA |= {"cls.predictions.decoder.bias": "cls.predictions.bias"}
SHARED = {f"{name}.weight": "shared.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}
TIED = {HEAD: TABLE}
MERGE = ("merge",)

KINDS = {
    "llama tied": Kind(
        "causal_lm", lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER, tie_word_embeddings=True)), WORDS, TIED
    ),
    "llama": Kind("causal_lm", lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), WORDS),
    "qwen3 tied": Kind(
        "causal_lm",
        lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, head_dim=8, tie_word_embeddings=True)),
        WORDS,
        TIED,
    ),
    "mistral": Kind("causal_lm", lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER)), WORDS),
    "gemma": Kind("causal_lm", lambda: t.GemmaForCausalLM(t.GemmaConfig(**DECODER, head_dim=8)), WORDS, TIED),
    "gpt2": Kind(
        "causal_lm",
        lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **IDS)),
        WORDS,
        {HEAD: "transformer.wte.weight"},
    ),
    "t5 tied": Kind("t5", lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)), ANSWERS, SHARED),
    "bert": Kind("bert", lambda: t.BertForPreTraining(t.BertConfig(**ENCODER)), WORDS, BERT, MERGE),
    "roberta": Kind("roberta", lambda: t.RobertaForMaskedLM(t.RobertaConfig(**ENCODER)), WORDS, ROBERTA, MERGE),
    "deberta": Kind("deberta", deberta, WORDS, DEBERTA, MERGE),
    "distilbert": Kind(
        "distilbert",
        lambda: t.DistilBertForMaskedLM(
            t.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=VOCABULARY)
        ),
        WORDS,
        {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        MERGE,
    ),
    "vit": Kind("vit", lambda: t.ViTModel(t.ViTConfig(**SIZE, image_size=16, patch_size=8)), PICTURES, {}, MERGE),
    "clip": Kind("clip", clip, {**WORDS, **PICTURES}, {}, MERGE),
}
FILES = ["as saved", "copies", "copies of the base", "copies of the expert", "copies alone"]
CASES: list[Any] = [
    (name, command, files)
    for name, kind in KINDS.items()
    for command in kind.commands
    for files in (FILES if kind.copies else FILES[:1])
]
FAST = {"llama tied": FILES[::2], "t5 tied": FILES[::2], "bert": FILES[1::2], "clip": FILES[:1]}


def quick(name: str, command: str, files: str) -> bool:
    """Whether a case is in the fast tier: merges, and runs of one kind and of models as saved by transformers."""
    return files in FAST.get(name, []) and (command == "merge" or (name == "llama tied" and files == FILES[0]))


CASES = [case if quick(*case) else slow(case) for case in CASES]
UNTIED = [
    pytest.param(name, command, marks=[] if any(quick(name, command, files) for files in FILES) else [pytest.mark.slow])
    for name, kind in KINDS.items()
    for command in kind.commands
    if kind.copies
]


def saved(kind: Kind, model: Any, folder: Path, files: str, owner: str) -> Path:
    """A folder that stores tied tensors according to `files`."""
    if files in ("copies", f"copies of the {owner}"):
        return store(model, folder, kind.copies)
    if files == "copies alone":  # the first copy of each source; the source itself is not stored
        first = {source: copy for copy, source in reversed(kind.copies.items())}
        return store(model, folder, {copy: source for source, copy in first.items()}, without=list(first))
    return store(model, folder)


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[Any, Any]]:
    """Base and expert of a kind."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if name not in made:
            torch.manual_seed(0)
            base = KINDS[name].make().eval()
            made[name] = base, drifted(base, 1)
        return made[name]

    return get


@pytest.mark.parametrize(("name", "command", "files"), CASES)
def test_a_lone_expert_is_reproduced_whichever_tied_tensors_its_files_store(
    name: str, command: str, files: str, models: Callable[[str], tuple[Any, Any]], tmp_path: Path
) -> None:
    """Compared with the expert as transformers loads it."""
    kind = KINDS[name]
    base, expert = models(name)
    folders = [saved(kind, model, tmp_path / own, files, own) for model, own in ((base, "base"), (expert, "expert"))]
    made = WRITERS[command](tmp_path / "made", suite_of(kind.family, folders[0], {"x": folders[1]}))
    found, wanted = (type(base).from_pretrained(folder) for folder in (made, folders[1]))
    assert_same(found, wanted, kind.inputs)
    assert_same(wanted, expert)  # the files contain the expert


ENCODERS = [name for name, kind in KINDS.items() if kind.commands == MERGE and name != "gpt2"]


@pytest.mark.parametrize("name", only(FAST, ENCODERS))
def test_a_run_reproduces_the_encoder_of_a_lone_expert(
    name: str, models: Callable[[str], tuple[Any, Any]], tmp_path: Path
) -> None:
    """Compared with the expert without its head as transformers loads it; for CLIP the vision tower."""
    kind, (base, expert) = KINDS[name], models(name)
    folders = [store(model, tmp_path / own, kind.copies) for own, model in (("base", base), ("expert", expert))]
    made = WRITERS["run"](tmp_path / "made", suite_of(kind.family, folders[0], {"x": folders[1]}))
    options = getattr(FAMILIES[kind.family], "options", {})
    found, wanted = (t.AutoModel.from_pretrained(folder, **options) for folder in (made, folders[1]))
    if name == "clip":
        found, wanted = found.vision_model, wanted.vision_model
    assert_same(
        found,
        wanted,
        {
            key: kind.inputs[key]
            for key in ("input_ids", "pixel_values")
            if key in kind.inputs and not (name == "clip" and key == "input_ids")
        },
    )


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def set_tie(folder: Path, tied: bool) -> None:
    (folder / "config.json").write_text(json.dumps({**settings_of(folder), "tie_word_embeddings": tied}))


def untied(kind: Kind, model: Any, folder: Path) -> Path:
    """A folder whose output layer is a separate tensor."""
    name = next(reversed([copy for copy in kind.copies if copy.endswith("weight")]))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.randn(tensors[kind.copies[name]].shape, generator=torch.Generator().manual_seed(7))

    return store(model, folder, change=change)


@pytest.mark.parametrize(
    ("owner", "says"),
    every(2, ((owner, says) for says in ("nothing", "false") for owner in ("expert", "base", "both"))),
)
@pytest.mark.parametrize(("name", "command"), UNTIED)
def test_a_separate_output_layer_stays_separate(
    name: str, command: str, owner: str, says: str, models: Callable[[str], tuple[Any, Any]], tmp_path: Path
) -> None:
    """Compared with the expert as transformers loads it; the config of the untied model has
    tie_word_embeddings=false, or not."""
    kind, folders = KINDS[name], {}
    if says == "false" and name in ("bert", "roberta", "deberta", "t5 tied"):
        return  # their biases would be missing, or their outputs scaled differently
    for own, model in zip(("base", "expert"), models(name), strict=True):
        if owner in (own, "both"):
            folders[own] = untied(kind, model, tmp_path / own)
            if says == "false":
                set_tie(folders[own], False)
        else:
            folders[own] = store(model, tmp_path / own)
    made = WRITERS[command](tmp_path / "made", suite_of(kind.family, folders["base"], {"x": folders["expert"]}))
    kinds = type(models(name)[0])
    found, wanted = (kinds.from_pretrained(folder) for folder in (made, folders["expert"]))
    assert_same(found, wanted, kind.inputs)
    if kind.family != "t5":  # its class has no such setting
        assert found.config.tie_word_embeddings is False
