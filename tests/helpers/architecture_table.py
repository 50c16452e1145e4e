"""The rows of docs/architectures.md: model types by their `model_type`, with well-known models."""

from __future__ import annotations

TAKEN_TYPES = {
    "apertus": "Apertus",
    "arcee": "Arcee AFM",
    "beit": "BEiT",
    "bert": "BERT, MiniLM",
    "bloom": "BLOOM",
    "camembert": "CamemBERT",
    "clip": "CLIP; plain towers of open_clip",
    "clip_vision_model": "vision towers of CLIP",
    "codegen": "CodeGen",
    "cohere": "Command R, Aya",
    "cohere2": "Command R7B",
    "cwm": "Code World Model",
    "deberta-v2": "DeBERTa 2 and 3",
    "deit": "DeiT",
    "dinov2": "DINOv2, but for giant",
    "dinov2_with_registers": "DINOv2 with registers, but for giant",
    "distilbert": "DistilBERT",
    "electra": "ELECTRA",
    "ernie4_5": "ERNIE 4.5, dense",
    "exaone4": "EXAONE 4",
    "falcon": "Falcon RW, 7B, 11B, 40B",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text",
    "glm": "GLM",
    "glm4": "GLM-4",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "GPT-NeoX, Pythia, Dolly 2",
    "gptj": "GPT-J",
    "granite": "Granite, dense",
    "helium": "Helium",
    "hunyuan_v1_dense": "Hunyuan, dense",
    "jais2": "Jais 2",
    "llama": "Llama 1 to 3, SmolLM 1 and 2, TinyLlama, Yi",
    "ministral": "Ministral",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Zephyr",
    "mixtral": "Mixtral, mixture of experts",
    "modernbert": "ModernBERT",
    "mpnet": "MPNet",
    "mpt": "MPT",
    "nemotron": "Nemotron, Minitron",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE, mixture of experts",
    "opt": "OPT",
    "persimmon": "Persimmon",
    "phi": "Phi 1, 1.5, 2",
    "phi3": "Phi 3, 3.5 mini, 4",
    "qwen2": "Qwen 1.5, 2, 2.5, QwQ",
    "qwen2_moe": "Qwen 1.5 and 2 MoE, mixture of experts",
    "qwen3": "Qwen 3, dense",
    "qwen3_moe": "Qwen 3 MoE, mixture of experts",
    "roberta": "RoBERTa",
    "seed_oss": "Seed-OSS",
    "siglip": "SigLIP, SigLIP 2 of a fixed resolution",
    "siglip_vision_model": "vision towers of SigLIP",
    "smollm3": "SmolLM 3",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder 2",
    "t5": "T5 1.1, FLAN-T5",
    "vaultgemma": "VaultGemma",
    "vit": "ViT",
    "xglm": "XGLM",
    "xlm-roberta": "XLM-RoBERTa",
}

EXPERTS = "mixture of experts"
IMAGES = "text and images in one model"
RECURRENT = "blocks without attention"
REFUSED_TYPES = {
    "albert": ("ALBERT", "its blocks share one set of weights"),
    "bart": ("BART", "encoder and decoder with learned positions, no family yet"),
    "deepseek_v3": ("DeepSeek V3, R1", EXPERTS),
    "diffllama": ("DiffLlama", "attention with parameters that no step describes"),
    "gemma3": ("Gemma 3 with images", IMAGES),
    "gpt2": ("GPT-2, DistilGPT-2", "linears of the class Conv1D, which formats of quantized weights do not hold"),
    "gpt_oss": ("gpt-oss", EXPERTS),
    "lfm2": ("LFM 2", RECURRENT),
    "llama4": ("Llama 4", EXPERTS),
    "mamba": ("Mamba", RECURRENT),
    "mistral3": ("Mistral Small 3.1", IMAGES),
    "mllama": ("Llama 3.2 with images", IMAGES),
    "mt5": ("mT5", "no family yet"),
    "phimoe": ("Phi 3.5 MoE", EXPERTS),
    "qwen2_5_vl": ("Qwen 2.5 VL", IMAGES),
    "swin": ("Swin", "blocks of several widths"),
    "whisper": ("Whisper", "no family yet"),
}
"""With the reasons."""


def table() -> str:
    """The table of the page, in Markdown."""
    lines = ["| `model_type` | such as | `epmq run` |", "| --- | --- | --- |"]
    lines += [f"| `{kind}` | {models} | yes |" for kind, models in TAKEN_TYPES.items()]
    lines += [f"| `{kind}` | {models} | no: {reason} |" for kind, (models, reason) in REFUSED_TYPES.items()]
    return "\n".join(lines)
