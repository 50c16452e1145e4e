"""Oracles: the dequantization of the package gguf, and the tensors of the checkpoint."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoTokenizer

from epmq_cli.checkpoint.gguf import blocks
from epmq_cli.checkpoint.gguf.architectures import architecture_of
from epmq_cli.checkpoint.gguf.tokenizer import SPLITS
from epmq_cli.checkpoint.gguf.write import GgufFile
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.errors import ConfigError
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.format import QuantizedWeight
from epmq_cli.quantize.formats.int import IntFormat
from tests.conftest import Run
from tests.helpers.byte_level import MODELS, ROWS, SIZE, quantized, write_decoder, write_tokenizer
from tests.helpers.tiers import first

Points = Literal["none", "whole"]


def exact(weight: QuantizedWeight) -> Tensor:
    """The weight in float32, where a product of a code and a scale of float16 is exact."""
    size = weight.shape[1] // weight.grid.scale.shape[1]
    zeros, scale = (part.float().repeat_interleave(size, 1) for part in (weight.grid.zeros, weight.grid.scale))
    return (weight.codes.float() - zeros) * scale


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, dequantized."""
    return {each.name: torch.tensor(dequantize(each.data, each.tensor_type)) for each in GGUFReader(path).tensors}


def turned(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order of llama.cpp, row by row."""
    half = len(tensor) // heads // 2
    order = [head * 2 * half + part * half + row for head in range(heads) for row in range(half) for part in (0, 1)]
    return tensor[order]


@pytest.mark.parametrize(("bits", "points"), blocks.KINDS)
@pytest.mark.parametrize("group_size", [32, 64, 256, -1])
def test_blocks_hold_the_numbers_of_the_codes(bits: int, points: Points, group_size: int) -> None:
    weight = quantized(
        torch.randn(16, 512, generator=torch.Generator().manual_seed(0)), IntFormat(bits, group_size, points)
    )
    kind = blocks.kind_of(weight.format)
    if kind.endswith("_K") and group_size in (32, 64):
        with pytest.raises(
            ConfigError, match=f"multiples of 256 inputs at {bits} bits, got {group_size} in it; use gr"
        ):
            blocks.check_blocks("it", 512, weight.format)
        return
    blocks.check_blocks("it", 512, weight.format)
    import gguf

    found = torch.tensor(dequantize(blocks.packed(weight).numpy(), gguf.GGMLQuantizationType[kind]))
    if not kind.endswith("_1"):
        assert torch.equal(found, exact(weight))
        assert blocks.rounding(weight) == 0
    else:
        steps = weight.grid.scale.float().repeat_interleave(512 // weight.grid.scale.shape[1], 1)
        error = float(((found - exact(weight)).abs() / steps).max())
        assert error <= blocks.rounding(weight) + 1e-6
        assert 0 < blocks.rounding(weight) < (0.005 if bits == 4 else 0.01)


@pytest.mark.parametrize("kind", first(2, ("llama", "llama3", "mistral", "qwen2", "qwen3")))
def test_a_file_holds_the_tensors_of_its_checkpoint(kind: str, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path, kind)
    GgufFile(folder, "f32").write(tmp_path / "model.gguf")
    found, files, layout = tensors(tmp_path / "model.gguf"), SafetensorsFiles(folder, "checkpoint"), layout_of(folder)
    heads = {"q_proj": SIZE["num_attention_heads"], "k_proj": SIZE["num_key_value_heads"]}
    width = 32 if kind == "qwen3" else 16
    shapes = {
        "q_proj": (4 * width, 64),
        "k_proj": (2 * width, 64),
        "v_proj": (2 * width, 64),
        "o_proj": (64, 4 * width),
    }
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    for part, shape in shapes.items():
        stored = layout.read(files, f"model.layers.1.self_attn.{part}", torch.Size(shape), torch.device("cpu"))
        expected = exact(stored)
        if part in heads and not kind.startswith("qwen"):
            expected = turned(expected, heads[part])
        assert torch.equal(found.pop(f"blk.1.{names[part]}.weight"), expected)
    assert torch.equal(found["token_embd.weight"], files.tensor("model.embed_tokens.weight").float())
    assert torch.equal(found["blk.0.attn_norm.weight"], files.tensor("model.layers.0.input_layernorm.weight").float())
    assert ("output.weight" in found) == (kind != "llama3")
    assert ("rope_freqs.weight" in found) == (kind == "llama3")
    if kind == "qwen2":
        assert torch.equal(found["blk.0.attn_q.bias"], files.tensor("model.layers.0.self_attn.q_proj.bias").float())


def test_metadata_and_tokens_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path, "llama3")
    GgufFile(folder, "q8_0").write(tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == SIZE["num_key_value_heads"]
    assert fields["llama.rope.dimension_count"] == 16
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == ROWS
    assert fields["tokenizer.ggml.tokens"][0] == "<|end|>"
    assert fields["tokenizer.ggml.token_type"][0] == 3
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    kinds = {each.name: each.tensor_type.name for each in reader.tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["output_norm.weight"] == "F32"
    factors = tensors(tmp_path / "model.gguf")["rope_freqs.weight"]
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    model = MODELS["llama3"]()
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("regex", "whole", "name"), [*((*key, name) for key, name in SPLITS.items()), ("gpt-2", False, "gpt-2")]
)
def test_splits_of_texts_have_names(regex: str, whole: bool, name: str, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path, "llama")
    write_tokenizer(folder, regex, whole)
    assert fields(folder)["tokenizer.ggml.pre"] == name


def fields(folder: Path) -> dict[str, Any]:
    """The metadata of a checkpoint's file."""
    GgufFile(folder, "f16").write(folder.parent / "model.gguf")
    return {name: field.contents() for name, field in GGUFReader(folder.parent / "model.gguf").fields.items()}


def test_scores_give_the_order_of_merges(tmp_path: Path) -> None:
    """Oracle: the tokens of transformers, from the merges that SentencePiece does with the scores of the file."""
    folder = write_decoder(tmp_path, "mistral")
    found = fields(folder)
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    words = "▁the▁lives▁of▁the▁people"
    pieces = list(words)
    while pairs := [
        (scores["".join(pair)], place) for place, pair in enumerate(pairwise(pieces)) if "".join(pair) in scores
    ]:
        place = max(pairs, key=lambda pair: (pair[0], -pair[1]))[1]
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert pieces == tokenizer.tokenize(words.replace("▁", " ").strip())
    assert found["tokenizer.ggml.add_space_prefix"]
    assert not found["tokenizer.ggml.add_bos_token"]
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 2, 6]


def test_merges_that_no_scores_order_are_refused(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path, "mistral")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop(len(content["model"]["merges"]) // 2)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="merges every pair that makes a token"):
        GgufFile(folder, "f16").write(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_gemma_has_its_own_norms_windows_and_frequencies(kind: str, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path, kind, pack="dense")
    found = fields(folder)
    assert found[f"{kind}.attention.sliding_window"] == 8
    stored = SafetensorsFiles(folder, "checkpoint").tensor("model.layers.0.input_layernorm.weight")
    assert torch.equal(tensors(tmp_path / "model.gguf")["blk.0.attn_norm.weight"], stored.float() + 1)
    if kind == "gemma2":
        assert found["gemma2.final_logit_softcapping"] == 30
    else:
        assert (found["gemma3.rope.freq_base"], found["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)


def test_a_window_that_llama_cpp_lacks_ends_the_context(tmp_path: Path) -> None:
    assert fields(write_decoder(tmp_path, "phi3"))["phi3.context_length"] == 32


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "computes llama with silu, got relu"),
        ("llama", {"model_type": "opt"}, "got the model type opt"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "has no gemma2 with query_pre_attn_scalar=7, not 16"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "another order of layer_types"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "another order of no_rope_layers"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rotary embeddings default, linear or llama3, got yarn"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    config = {**MODELS[kind]().config.to_dict(), **changes}
    with pytest.raises(ConfigError, match=message):
        architecture_of(config)


def test_what_llama_cpp_cannot_load_is_refused(tmp_path: Path, epmq_inside: Run) -> None:
    folder = write_decoder(tmp_path, "llama")
    file = tmp_path / "model.gguf"
    done = epmq_inside("export", str(folder), str(file))
    assert done.returncode == 0
    assert re.search(r"model.gguf: \d+ kB, 14 quantized linears as in the checkpoint", done.stdout)
    assert "exists; choose another name" in epmq_inside("export", str(folder), str(file)).stderr
    assert epmq_inside("export", str(folder), str(file), "--force", "--dense=q8_0").returncode == 0
    assert "end in .gguf or .onnx, got" in epmq_inside("export", str(folder), str(tmp_path / "model.bin")).stderr
    assert "is not a checkpoint" in epmq_inside("export", str(tmp_path), str(file), "--force").stderr
    write_tokenizer(folder, r"\s+")
    assert "splits texts" in epmq_inside("export", str(folder), str(tmp_path / "b.gguf")).stderr
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("bits", "points", "group_size", "message"),
    [
        (7, "none", 32, "GGUF holds integers of 2, 4 and 5 bits, and of 3, 6 and 8 bits without zero points, got int7"),
        (3, "whole", 32, "got int3 with whole zero points"),
        (3, "none", 32, "multiples of 256 inputs at 3 bits, got 32 in model.layers.0.self_attn.q_proj; use group_size"),
        (8, "whole", 32, "got int8 with whole zero points"),
        (4, "none", 16, "multiples of 32 inputs at 4 bits, got 16 in model.layers.0.self_attn.q_proj"),
    ],
)
def test_grids_without_blocks_are_refused(
    bits: int, points: Points, group_size: int, message: str, tmp_path: Path
) -> None:
    folder = write_decoder(tmp_path, "llama", bits, points, group_size)
    with pytest.raises(ConfigError, match=message):
        GgufFile(folder, "f16")
