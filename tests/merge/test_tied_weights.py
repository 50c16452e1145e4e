"""Oracles: transformers, which loads the results, and values computed by hand."""

from __future__ import annotations

import json
import logging
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import Tensor

from epmq_cli.commands.verify import verify
from epmq_cli.errors import CheckpointError, ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.store.manifest import write_manifest
from tests.conftest import drifted
from tests.end_to_end.test_lone import DECODER, ENCODER, HEAD, SHARED, T5, TABLE, VOCABULARY, set_tie, settings_of
from tests.helpers.hubs import run_in
from tests.helpers.lone import WRITERS, assert_same, merged_folder, store, suite_of
from tests.helpers.minihub import build
from tests.helpers.tiers import every, only

PAIR = ("merge", "run")


def llama(tied: bool, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(0)
    base = t.LlamaForCausalLM(t.LlamaConfig(**{**DECODER, **changes}, tie_word_embeddings=tied)).eval()
    return drifted(base, seed) if seed else base


def t5(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(0)
    base = t.T5ForConditionalGeneration(t.T5Config(**T5, **changes)).eval()
    return drifted(base, seed) if seed else base


def add_random(name: str, seed: int = 7) -> Any:
    """Adds a random tensor under a name."""

    def change(tensors: dict[str, Tensor]) -> None:
        like = tensors[TABLE if TABLE in tensors else "shared.weight"]
        tensors[name] = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))

    return change


@pytest.mark.parametrize("command", PAIR)
def test_models_with_a_tied_output_layer_contribute_their_table(command: str, tmp_path: Path) -> None:
    """Oracle: the mean of the untied expert's layer and the tied expert's table; verify accepts the result."""
    base = store(llama(True), tmp_path / "base")
    own = store(llama(True, 1), tmp_path / "own", change=add_random(HEAD))
    tied = store(llama(True, 2), tmp_path / "tied", {HEAD: TABLE})
    set_tie(own, False)
    made = WRITERS[command](tmp_path / "made", suite_of("causal_lm", base, {"own": own, "tied": tied}))
    one, two, found = (load_file(folder / "model.safetensors") for folder in (own, tied, made))
    assert torch.equal(found[HEAD], (one[HEAD] + two[TABLE]) / 2)
    assert torch.equal(found[TABLE], (one[TABLE] + two[TABLE]) / 2)
    assert settings_of(made)["tie_word_embeddings"] is False
    if command == "merge":
        verify(made, False, "cpu", None)


def test_a_config_without_the_tie_setting_uses_the_default_of_its_class(tmp_path: Path) -> None:
    """Gemma ties by default, and configs of transformers 4 omit the setting."""
    torch.manual_seed(0)
    base = t.GemmaForCausalLM(t.GemmaConfig(**DECODER, head_dim=8)).eval()
    folders = [store(base, tmp_path / "base", {HEAD: TABLE}), store(drifted(base, 1), tmp_path / "x")]
    for folder in folders:
        settings = settings_of(folder)
        del settings["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(settings))
    made = merged_folder(tmp_path / "made", suite_of("causal_lm", folders[0], {"x": folders[1]}))
    assert HEAD not in load_file(made / "model.safetensors")
    assert_same(*(t.GemmaForCausalLM.from_pretrained(folder) for folder in (made, folders[1])))


@pytest.mark.parametrize(
    ("scaled", "command"), only(zip((True, False), PAIR, strict=True), product((True, False), PAIR))
)
def test_the_scale_of_t5s_outputs_stays_with_a_separate_output_layer(
    command: str, scaled: bool, tmp_path: Path
) -> None:
    """In transformers, the tie setting also controls the scale: t5-small with a separate layer, and FLAN-T5."""
    changes = {} if scaled else {"tie_word_embeddings": False}
    base = store(t5(**changes), tmp_path / "base", change=None if scaled else add_random("lm_head.weight", 6))
    own = store(t5(1, **changes), tmp_path / "own", SHARED, change=add_random("lm_head.weight"))
    made = WRITERS[command](tmp_path / "made", suite_of("t5", base, {"own": own}))
    found, wanted = (t.T5ForConditionalGeneration.from_pretrained(folder) for folder in (made, own))
    assert found.config.scale_decoder_outputs is scaled
    assert_same(found, wanted, {"input_ids": torch.tensor([[5, 2]]), "decoder_input_ids": torch.tensor([[0, 4]])})


@pytest.mark.parametrize("command", PAIR)
def test_tables_that_are_always_tied_must_be_equal(command: str, tmp_path: Path) -> None:
    name = "decoder.embed_tokens.weight"
    base, own = store(t5(), tmp_path / "base"), store(t5(1), tmp_path / "own", change=add_random(name))
    with pytest.raises(ModelError, match=f"expert of task x: .* stores {name} with other values than shared.weight"):
        WRITERS[command](tmp_path / "made", suite_of("t5", base, {"x": own}))


def test_experts_with_another_output_scale_are_refused(tmp_path: Path) -> None:
    base, other = store(t5(), tmp_path / "base"), store(t5(1, tie_word_embeddings=False), tmp_path / "other")
    with pytest.raises(ModelError, match="scale_decoder_outputs is False in its config and True in the base's"):
        SuiteModels(suite_of("t5", base, {"x": other}), FAMILIES["t5"])


def test_an_output_layer_that_transformers_renames_on_load_is_merged(tmp_path: Path) -> None:
    """Oracle: the expert itself. Files of GPT-NeoX name it embed_out, the class lm_head."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    base, expert = (store(GPTNeoXForCausalLM(config), tmp_path / name) for name in ("base", "expert"))
    stored = load_file(expert / "model.safetensors")
    assert "embed_out.weight" in stored
    models = SuiteModels(suite_of("causal_lm", base, {"x": expert}), FAMILIES["causal_lm"], whole=True)
    found = models.source.expert("x", "lm_head.weight")  # the name in the class
    assert torch.equal(found, stored["embed_out.weight"])


def test_an_output_layer_neither_tied_nor_stored_is_refused(tmp_path: Path) -> None:
    base, broken = store(llama(True), tmp_path / "base"), store(llama(True, 1), tmp_path / "broken")
    set_tie(broken, False)
    with pytest.raises(ModelError, match=f"expert of task x: .* has no {HEAD}, which its config does not tie"):
        SuiteModels(suite_of("causal_lm", base, {"x": broken}), FAMILIES["causal_lm"], whole=True)


@pytest.mark.parametrize(
    ("kind", "command", "owner"), every(2, product(("llama", "t5"), PAIR, ("nobody", "base", "expert")))
)
def test_a_larger_vocabulary_reaches_the_copies(kind: str, owner: str, command: str, tmp_path: Path) -> None:
    """With vocabulary=pad, the larger expert is reproduced in transformers, tied or not."""
    make, table, head = (llama, TABLE, HEAD) if kind == "llama" else (t5, "shared.weight", "lm_head.weight")
    base, expert = (make(True), make(True, 1)) if kind == "llama" else (make(), make(1))
    expert.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    folders = [
        store(model, tmp_path / own, {head: table}, change=add_random(head) if own == owner else None)
        for own, model in (("base", base), ("expert", expert))
    ]
    family = "causal_lm" if kind == "llama" else "t5"
    suite = suite_of(family, folders[0], {"x": folders[1]}, vocabulary="pad")
    made = WRITERS[command](tmp_path / "made", suite)
    found, wanted = (type(base).from_pretrained(folder) for folder in (made, folders[1]))
    assert_same(found, wanted)


def test_a_masked_language_model_keeps_its_head_only_if_all_have_it(tmp_path: Path) -> None:
    """Next to a classifier, the base's head stays, tied to the merged table; the classifier is the expert's own."""
    torch.manual_seed(0)
    base = t.BertForPreTraining(t.BertConfig(**ENCODER)).eval()
    copies = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    classifier = drifted(t.BertForSequenceClassification(t.BertConfig(**ENCODER, num_labels=3)), 2)
    folders = [store(base, tmp_path / "base", copies), store(classifier, tmp_path / "x")]
    made = merged_folder(tmp_path / "made", suite_of("bert", folders[0], {"x": folders[1]}))
    found, expert = load_file(made / "model.safetensors"), load_file(folders[1] / "model.safetensors")
    assert not {*copies, "classifier.weight"} & found.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expert.get(name, base.state_dict()[name]))


@pytest.mark.parametrize("command", PAIR)
def test_tensors_that_the_result_cannot_have_are_named(
    command: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL's value head next to a language model."""
    caplog.set_level(logging.WARNING, "epmq")

    def value_head(tensors: dict[str, Tensor]) -> None:
        tensors["v_head.summary.weight"] = torch.ones(1, 32)

    folders = [store(llama(True), tmp_path / "base"), store(llama(True, 1), tmp_path / "x", change=value_head)]
    made = WRITERS[command](tmp_path / "made", suite_of("causal_lm", folders[0], {"x": folders[1]}))
    assert "expert of task x: v_head.summary.weight is left out" in caplog.text
    assert_same(*(t.LlamaForCausalLM.from_pretrained(folder) for folder in (made, folders[1])))


def test_tensors_that_the_bases_blocks_lack_are_refused(tmp_path: Path) -> None:
    base, other = store(llama(True), tmp_path / "base"), store(llama(True, attention_bias=True), tmp_path / "x")
    with pytest.raises(ModelError, match=r"self_attn.q_proj.bias is missing from the base"):
        SuiteModels(suite_of("causal_lm", base, {"x": other}), FAMILIES["causal_lm"], whole=True)


@pytest.mark.parametrize("command", PAIR)
def test_tensors_that_a_class_ignores_on_purpose_are_ignored(command: str, tmp_path: Path) -> None:
    """Old T5 files have a position bias in cross-attention that no version reads."""
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    base = store(t5(), tmp_path / "base", change=lambda tensors: tensors.update({name: torch.ones(32, 4)}))
    expert = store(t5(1), tmp_path / "x")
    made = WRITERS[command](tmp_path / "made", suite_of("t5", base, {"x": expert}))
    assert_same(*(t.T5ForConditionalGeneration.from_pretrained(folder) for folder in (made, expert)))


def test_a_whole_run_walks_and_writes_an_untied_output_layer(tmp_path: Path) -> None:
    """The output layer is the expert's own, bit for bit, and verify accepts the files; the walk changes only the
    table."""
    hub = build(tmp_path / "hub", "gemma3")
    expert = hub / "first"
    store(t.Gemma3ForCausalLM.from_pretrained(expert), expert, change=add_random(HEAD))
    options = ["~suite.tasks.second", "merge=average", "guidance=feature", "quant=none", "eval.stages=[]"]
    checkpoint = run_in(tmp_path / "run", hub, *options)
    found, own = (load_file(folder / "model.safetensors") for folder in (checkpoint, expert))
    assert torch.equal(found[HEAD], own[HEAD])
    assert not torch.equal(found[TABLE], found[HEAD])
    assert settings_of(checkpoint)["tie_word_embeddings"] is False
    verify(checkpoint, False, "cpu", None)


def test_an_output_layer_with_another_name_in_files_is_recognised(tmp_path: Path) -> None:
    """GPT-NeoX's lm_head is embed_out in files, but lm_head in the state dict of a live model; verify accepts both."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
    base = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes, tie_word_embeddings=False)).eval()
    expert = drifted(base, 1)
    folders = [store(base, tmp_path / "base"), store(expert, tmp_path / "x")]
    live = tmp_path / "live.pt"
    torch.save(expert.state_dict(), live)
    for number, path in enumerate((folders[1], live)):
        made = merged_folder(tmp_path / str(number), suite_of("causal_lm", folders[0], {"x": path}))
        assert_same(*(t.GPTNeoXForCausalLM.from_pretrained(folder) for folder in (made, folders[1])))
        write_manifest(made, {})
        verify(made, False, "cpu", None)


def test_files_of_the_body_can_be_untied(tmp_path: Path) -> None:
    """A base without the prefix model. gets a separate output layer; transformers loads it."""
    base = store(llama(True), tmp_path / "base")
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    own = store(llama(True, 1), tmp_path / "own", change=add_random(HEAD))
    made = merged_folder(tmp_path / "made", suite_of("causal_lm", base, {"x": own}))
    assert_same(*(t.LlamaForCausalLM.from_pretrained(folder) for folder in (made, own)))


def test_verify_names_copies_that_differ_and_layers_that_are_missing(tmp_path: Path) -> None:
    """A folder from an old version of epmq merge, and one without its untied layer."""
    differing = store(llama(True), tmp_path / "differing", change=add_random(HEAD))
    missing = store(llama(True), tmp_path / "missing")
    set_tie(missing, False)
    for folder, message in (
        (differing, f"{HEAD} has other values than {TABLE}, to which config.json ties it"),
        (missing, f"{HEAD} is missing, which config.json does not tie to {TABLE}"),
    ):
        write_manifest(folder, {})
        with pytest.raises(CheckpointError, match=message):
            verify(folder, False, "cpu", None)
