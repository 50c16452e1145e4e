"""Decoder-only language models of attention and feed-forward blocks, such as Llama, Qwen, Mistral, Gemma and Phi.

Base and experts: models of one architecture that `AutoModelForCausalLM` loads, with a block layout of decoder.py. Model
types that are not listed here are taken too if the checks before calibration find nothing unknown. The model's own
blocks run with its own masks and positions, so rotary embeddings, grouped queries and sliding windows work as they are.
Embeddings, the output layer and the routers of mixtures of experts stay dense. Of models that read pictures too, the
language model is calibrated on texts; the rest is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.data.batching import Batch
from epmq_cli.errors import ModelError
from epmq_cli.families.architecture import Architecture
from epmq_cli.families.decoder import UNSOLVED, block_steps, routers_of
from epmq_cli.families.family import Family
from epmq_cli.families.parts import block_settings
from epmq_cli.families.positions import decoder_positions
from epmq_cli.families.refusal import refused
from epmq_cli.families.structure import Section, Stack, Table, token_mask
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.models.mixtures import MIXTRAL
from epmq_cli.models.model_class import model_class
from epmq_cli.models.model_folder import ModelFolder, read_json
from epmq_cli.models.open import open_expert
from epmq_cli.models.pretrained import config_of, from_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIX = "model."
TEXT, PICTURES = "text_config", "vision_config"
"""The parts of the config.json of models that read texts and pictures."""
VISION = r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|connector)\.[\w.]+"
"""The names of their tensors that texts do not reach."""
CROSS = "cross_attn"
"""The module of blocks that attend to pictures, which texts alone pass by."""
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")
"""The ends of the names of tensors that transformers computes: rotary frequencies, masks of GPT-NeoX and GPT-J."""


@dataclass(frozen=True)
class Body:
    """The names of the parts of a model around its blocks: the list of blocks, the last norm, the embedding tables that
    are solved, and the norm between them and the blocks."""

    layers: str
    norm: str
    tables: tuple[str, ...]
    first_norm: str | None = None

    @property
    def names(self) -> set[str]:
        """All of them."""
        return {self.layers, self.norm, *self.tables, *([self.first_norm] if self.first_norm else [])}


BODIES = (
    Body("model.layers", "model.norm", ("model.embed_tokens",)),
    Body("model.language_model.layers", "model.language_model.norm", ("model.language_model.embed_tokens",)),  # Gemma 3
    Body("language_model.model.layers", "language_model.model.norm", ("language_model.model.embed_tokens",)),  # Llama 4
    Body("model.text_model.layers", "model.text_model.norm", ("model.text_model.embed_tokens",)),  # SmolVLM
    Body("model.layers", "model.final_layernorm", ("model.embed_tokens",)),  # Phi 2, Persimmon
    Body("model.layers", "model.layer_norm", ("model.embed_tokens",)),  # XGLM
    Body("model.decoder.layers", "model.decoder.final_layer_norm", ("model.decoder.embed_tokens",)),  # OPT
    Body("gpt_neox.layers", "gpt_neox.final_layer_norm", ("gpt_neox.embed_in",)),
    Body("transformer.h", "transformer.ln_f", ("transformer.wte", "transformer.wpe")),  # GPT-2, GPT-Neo, GPT-BigCode
    Body("transformer.h", "transformer.ln_f", ("transformer.wte",)),  # GPT-J, CodeGen
    Body(
        "transformer.h", "transformer.ln_f", ("transformer.word_embeddings",), "transformer.word_embeddings_layernorm"
    ),  # BLOOM
    Body("transformer.h", "transformer.ln_f", ("transformer.word_embeddings",)),  # Falcon
    Body("transformer.blocks", "transformer.norm_f", ("transformer.wte",)),  # MPT
)
"""The first whose names a model has counts."""
SETTINGS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    *("n_head", "num_heads", "n_heads", "num_kv_heads", "multi_query", "new_decoder_architecture", "parallel_attn"),
    *("use_parallel_residual", "alibi", "rotary_dim", "attention_types", "window_size", "activation_function"),
    *("layer_norm_epsilon", "do_layer_norm_before", "attn_config", "scale_attn_weights"),
    *("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "layer_norm_eps",
    "norm_eps",
    "norm_epsilon",
    "rope_parameters",
    "no_rope_layers",
    "sliding_window",
    "layer_types",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "query_pre_attn_scalar",
    "residual_multiplier",
    *("num_experts_per_tok", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"),
    *("cross_attention_layers", "attention_chunk_size", "moe_layers", "use_qk_norm", "attn_temperature_tuning"),
    *("attn_scale", "floor_scale"),
)


@dataclass(frozen=True, kw_only=True)
class CausalLM(Architecture):
    """`family: causal_lm`."""

    name: str = "causal_lm"
    model_types: tuple[str, ...] = (
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3"),
        *("apertus", "arcee", "cwm", "ernie4_5", "exaone4", "glm", "glm4", "granite", "helium", "hunyuan_v1_dense"),
        *("jais2", "ministral", "ministral3", "nemotron", "olmo", "olmo2", "olmo3", "seed_oss", "stablelm"),
        *("starcoder2", "vaultgemma"),
        *("bloom", "codegen", "cohere", "cohere2", "falcon", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt"),
        "gpt2",
        *("gemma3", "internvl", "llava", "mistral3", "mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm"),
        *("opt", "persimmon", "phi", "xglm"),
        *("llama4", "llama4_text", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
    )
    unsolved: tuple[str, ...] = (
        *(rf"[\w.]+\.\d+\.{part}" for part in UNSOLVED),
        r"(language_model\.)?lm_head\.(weight|bias)",
        VISION,
        r"model\.decoder\.embed_positions\.weight",  # OPT, whose module takes a mask for ids
    )
    dequantize_on_load: bool = True  # the ONNX exporter reads linears before the first call

    caches: bool = True

    def open(self, path: Path, role: str, base: ModelFolder | None) -> ModelFolder:
        """See Architecture. Adapters of models that read pictures have the models' names, not those of their files."""
        if base is None or PICTURES not in base.config:
            return super().open(path, role, base)
        own = {stored: name for name, stored in self.all_names(base).items()}
        return open_expert(path, role, base, self.tensor_names(base).values(), lambda name: own.get(name, name))

    def spelling(self, stored: str) -> str:
        """The model's own name of a stored tensor: Mixtral's mixtures have another one in files."""
        return stored.replace(f".{MIXTRAL.block}.", f".{MIXTRAL.module}.")

    def check_type(self, folder: ModelFolder) -> None:
        """Raises ModelError if another family takes models of this type. Accepts types that no family lists:
        `epmq run` checks their parts before it calibrates them."""
        from epmq_cli.families import FAMILIES

        kind = folder.config.get("model_type")
        for name, family in FAMILIES.items():
            if name != self.name and kind in family.model_types:
                raise ModelError(
                    f"{folder.role}: {folder.path} holds a model of type {kind}, which family {name} takes; "
                    f"set suite.family={name}"
                )

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """All tensors, including stored copies of a tied output layer, except those that transformers computes."""
        self.check_type(folder)
        return {name: stored for name, stored in self.all_names(folder).items() if not name.endswith(BUFFERS)}

    def all_names(self, folder: ModelFolder) -> dict[str, str]:
        """All stored tensors; files of the body alone lack its prefix, and old files may have other names."""
        if any(name.startswith(PREFIX) for name in folder.infos) and PICTURES not in folder.config:
            return {name: name for name in folder.infos}
        cls = model_class(folder.config, folder.infos)
        prefix = f"{cls.prefix}." if cls else PREFIX
        tensors = cls.tensors if cls else ()
        bare = not any(name.startswith(prefix) for name in folder.infos)
        own = {name: cls.own_name(name) if cls else name for name in folder.infos}
        return {prefix + name if bare and name not in tensors else name: stored for stored, name in own.items()}

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """The settings of the blocks, their positions and masks."""
        return block_settings(folder, TEXT, SETTINGS)

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """The model with its output layer."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        from epmq_cli.models.linears import in_linears  # modules: imports torch

        pictures = PICTURES in read_json(folder, "config.json", "model")
        kind = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
        loaded = from_folder(kind, folder, **options)
        in_linears(loaded[0] if isinstance(loaded, tuple) else loaded)
        model: nn.Module = loaded
        return model

    def positions(self, folder: Path) -> int | None:
        """The positions that the model was trained for."""
        return decoder_positions(config_of(folder).get_text_config())

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The layers, then the last norm; ModelError where the layout of a layer is not known."""
        from epmq_cli.families.readouts import LastNorm  # a module: imports torch

        body = self._body(model)
        tables = tuple(map(Table, body.tables))
        readout = LastNorm.section(model, body.norm)
        layers = {f"{body.layers}.{index}": each for index, each in model.get_submodule(body.layers).named_children()}
        bypassed = tuple(name for name, layer in layers.items() if hasattr(layer, CROSS))
        blocks = self._blocks(type(model).__name__, {name: layers[name] for name in layers if name not in bypassed})
        return [Stack(blocks, readout, tables, body.first_norm, mask=token_mask, bypassed=bypassed)]

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The output of the last norm for the real tokens: (tokens, width)."""
        parts = {name for name, _ in model.named_children()}
        prefix = str(model.base_model_prefix)  # of Llama 4, no module
        body = model.get_submodule(prefix if prefix in parts else self._body(model).layers.rpartition(".")[0])
        hidden: Tensor = body(**batch, use_cache=False).last_hidden_state
        mask = token_mask(batch)
        return hidden.flatten(0, 1) if mask is None else hidden[mask]

    def _body(self, model: nn.Module) -> Body:
        modules = {name for name, _ in model.named_modules()}
        body = next((body for body in BODIES if body.names <= modules), None)
        if body is None:
            raise refused(
                self,
                f"{type(model).__name__} has no blocks, last norm and embeddings under names that the family knows",
            )
        return body

    def _blocks(self, kind: str, layers: Mapping[str, nn.Module]) -> list[Section]:
        """The blocks of a model of this kind, by name."""
        try:
            steps = {name: block_steps(layer, f"{name} of {kind}") for name, layer in layers.items()}
            return [Section(name, layer, steps[name], routers_of(steps[name])) for name, layer in layers.items()]
        except ModelError as error:
            raise refused(self, str(error)) from None


CAUSAL_LM = Family(CausalLM(), LanguageModel())
