"""Tiny random models of many architectures: those that family causal_lm calibrates, and those that it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as t

from epmq_cli.models.mixtures import MIXTURES
from tests.helpers.minihub import IDS, SIZE

GROUPED: dict[str, Any] = {**SIZE, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS = {**GROUPED, "head_dim": 8}
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": IDS["vocab_size"]}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
NEO: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
}
NEO |= {"vocab_size": IDS["vocab_size"], "window_size": 4}
OPT = {**FALCON, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
FEW: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
GRANITE = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.3}
MULTIPLIED = {**GROUPED, **GRANITE, "logits_scaling": 8.0}

LLAMA4: dict[str, Any] = {**HEADS, "num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}
LLAMA4 |= {"attention_chunk_size": 4, "no_rope_layers": [1, 0], "floor_scale": 4}
"""A dense block with attention in chunks, and a mixture whose attention has no positions."""
EYE: dict[str, Any] = {**SIZE, "image_size": 16, "patch_size": 8}
TURNED: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
MLLAMA_EYE = {key: value for key, value in EYE.items() if key != "num_attention_heads"}
MLLAMA_EYE |= {"num_global_layers": 1, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
LLAMA4_EYE: dict[str, Any] = {**EYE, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
QWEN_VL: dict[str, Any] = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
QWEN_EYE: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
WIDE_EYE: dict[str, Any] = {**QWEN_EYE, "intermediate_size": 64, "out_hidden_size": 32}

Build = Callable[[], Any]

TAKEN: dict[str, Build] = {
    "apertus": lambda: t.ApertusForCausalLM(t.ApertusConfig(**GROUPED)),
    "arcee": lambda: t.ArceeForCausalLM(t.ArceeConfig(**GROUPED)),
    "cwm": lambda: t.CwmForCausalLM(t.CwmConfig(**HEADS)),
    "ernie4_5": lambda: t.Ernie4_5ForCausalLM(t.Ernie4_5Config(**HEADS)),
    "exaone4": lambda: t.Exaone4ForCausalLM(t.Exaone4Config(**GROUPED)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**HEADS)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**HEADS)),
    "glm": lambda: t.GlmForCausalLM(t.GlmConfig(**HEADS)),
    "glm4": lambda: t.Glm4ForCausalLM(t.Glm4Config(**HEADS)),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**MULTIPLIED)),
    "helium": lambda: t.HeliumForCausalLM(t.HeliumConfig(**HEADS)),
    "hunyuan_v1_dense": lambda: t.HunYuanDenseV1ForCausalLM(t.HunYuanDenseV1Config(**HEADS)),
    "jais2": lambda: t.Jais2ForCausalLM(t.Jais2Config(**GROUPED)),
    "ministral": lambda: t.MinistralForCausalLM(t.MinistralConfig(**HEADS)),
    "ministral3": lambda: t.Ministral3ForCausalLM(t.Ministral3Config(**HEADS)),
    "nemotron": lambda: t.NemotronForCausalLM(t.NemotronConfig(**GROUPED)),
    "olmo": lambda: t.OlmoForCausalLM(t.OlmoConfig(**GROUPED)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**GROUPED)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**OPT)),
    "olmo3": lambda: t.Olmo3ForCausalLM(t.Olmo3Config(**GROUPED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
    "seed_oss": lambda: t.SeedOssForCausalLM(t.SeedOssConfig(**HEADS)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**GROUPED)),
    "stablelm": lambda: t.StableLmForCausalLM(t.StableLmConfig(**GROUPED, qk_layernorm=True)),
    "starcoder2": lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(**GROUPED)),
    "vaultgemma": lambda: t.VaultGemmaForCausalLM(t.VaultGemmaConfig(**HEADS)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **IDS)),
    "codegen": lambda: t.CodeGenForCausalLM(t.CodeGenConfig(**SMALL, rotary_dim=4)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**GROUPED)),
    "cohere2": lambda: t.Cohere2ForCausalLM(t.Cohere2Config(**GROUPED)),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**FALCON)),
    "falcon-40b": lambda: t.FalconForCausalLM(t.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon-rw": lambda: t.FalconForCausalLM(
        t.FalconConfig(**FALCON, parallel_attn=False, multi_query=False, alibi=True, bias=True)
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**SMALL)),
    "gpt_bigcode": lambda: t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**SMALL)),
    "gpt_neo": lambda: t.GPTNeoForCausalLM(t.GPTNeoConfig(**NEO)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZE, **IDS)),
    "gpt_neox-sequential": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZE, **IDS, use_parallel_residual=False)),
    "gptj": lambda: t.GPTJForCausalLM(t.GPTJConfig(**SMALL, rotary_dim=4)),
    "mpt": lambda: t.MptForCausalLM(t.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=IDS["vocab_size"])),
    "persimmon": lambda: t.PersimmonForCausalLM(t.PersimmonConfig(**SIZE, **IDS)),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZE, **IDS)),
    "stablelm-parallel": lambda: t.StableLmForCausalLM(t.StableLmConfig(**GROUPED, use_parallel_residual=True)),
    "llama4_text": lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(**LLAMA4)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)),
    "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**GROUPED, **FEW)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**GROUPED, **FEW, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    ),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**HEADS, **FEW, moe_intermediate_size=32, norm_topk_prob=True, mlp_only_layers=[1])
    ),
    "xglm": lambda: t.XGLMForCausalLM(
        t.XGLMConfig(d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, vocab_size=IDS["vocab_size"])
    ),
}
"""By model type."""

MIXED = [kind for kind in TAKEN if kind in MIXTURES]


def crowded(kind: str, experts: int = 32) -> Build:
    """A mixture of so many experts that few tokens do not reach all."""

    def build() -> Any:
        model = TAKEN[kind]()
        config = copy.deepcopy(model.config)
        config.update({"num_local_experts" if hasattr(config, "num_local_experts") else "num_experts": experts})
        return type(model)(config)

    return build


SEEING: dict[str, Build] = {
    "gemma3": lambda: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            text_config={**HEADS, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
            vision_config=EYE,
            mm_tokens_per_image=1,
            **{"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7},
        )
    ),
    "internvl": lambda: t.InternVLForConditionalGeneration(
        t.InternVLConfig(
            text_config={"model_type": "qwen2", **GROUPED},
            vision_config={**EYE, "image_size": [16, 16], "patch_size": [8, 8]},
            image_token_id=5,
        )
    ),
    "llama4": lambda: t.Llama4ForConditionalGeneration(
        t.Llama4Config(text_config=LLAMA4, vision_config=LLAMA4_EYE, image_token_index=5)
    ),
    "llava": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config={"model_type": "llama", **GROUPED},
            vision_config={"model_type": "clip_vision_model", **EYE},
            image_token_index=5,
            vision_feature_layer=-1,
        )
    ),
    "mistral3": lambda: t.Mistral3ForConditionalGeneration(
        t.Mistral3Config(
            text_config={"model_type": "mistral", **HEADS},
            vision_config={"model_type": "pixtral", **EYE},
            image_token_index=5,
        )
    ),
    "mllama": lambda: t.MllamaForConditionalGeneration(
        t.MllamaConfig(
            text_config={**GROUPED, "cross_attention_layers": [1], "rope_parameters": ROPE, "num_hidden_layers": 3},
            vision_config={**MLLAMA_EYE, "attention_heads": 4},
            image_token_index=IDS["vocab_size"],
        )
    ),
    "qwen2_vl": lambda: t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(
            text_config={**GROUPED, "rope_parameters": TURNED}, vision_config={**QWEN_EYE, "embed_dim": 32}, **QWEN_VL
        )
    ),
    "qwen2_5_vl": lambda: t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(
            text_config={**GROUPED, "rope_parameters": TURNED},
            vision_config={**WIDE_EYE, "fullatt_block_indexes": [1], "window_size": 16},
            **QWEN_VL,
        )
    ),
    "qwen3_vl": lambda: t.Qwen3VLForConditionalGeneration(
        t.Qwen3VLConfig(
            text_config={**HEADS, "rope_parameters": TURNED},
            vision_config={**WIDE_EYE, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **QWEN_VL,
        )
    ),
    "smolvlm": lambda: t.SmolVLMForConditionalGeneration(
        t.SmolVLMConfig(
            text_config={"model_type": "llama", **GROUPED}, vision_config=EYE, image_token_id=5, scale_factor=2
        )
    ),
}
"""Models that read texts and pictures, by model type."""

REFUSED: dict[str, tuple[Build, str]] = {
    "diffllama": (lambda: t.DiffLlamaForCausalLM(t.DiffLlamaConfig(**GROUPED)), "self_attn.lambda_q1"),
    "lfm2": (lambda: t.Lfm2ForCausalLM(t.Lfm2Config(**GROUPED)), "no blocks, last norm and embeddings under names"),
    "mamba": (
        lambda: t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **IDS)),
        "no blocks, last norm and embeddings under names",
    ),
    "phimoe": (
        lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**GROUPED, num_local_experts=2)),
        "no feed-forward that the family knows",
    ),
}
"""With their error messages."""

TEXTS = {**SIZE, "vocab_size": IDS["vocab_size"], "max_position_embeddings": 64}
PICTURES = {**SIZE, "image_size": 16, "patch_size": 8}

ENCODERS: dict[str, Build] = {
    "albert": lambda: t.AlbertModel(t.AlbertConfig(**TEXTS, embedding_size=16)),
    "ijepa": lambda: t.IJepaModel(t.IJepaConfig(**PICTURES)),
}
"""Models that no family accepts."""


def built(build: Build) -> Any:
    """The model in evaluation mode; gains, biases and other tensors with constant initial values get noise."""
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
