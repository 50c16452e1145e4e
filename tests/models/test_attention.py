"""Oracle: the cache of transformers itself, and closed forms."""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache

from epmq_cli.models.attention import cached_attentions, recorded
from tests.helpers.byte_level import MODELS

TOKENS = torch.arange(24).reshape(2, 12)


def test_the_ranges_are_those_of_what_transformers_caches() -> None:
    """Keys have their rotary embeddings; grouped queries share them; Phi 3 has one linear for all three."""
    for name in ("llama", "qwen3", "gemma2", "phi3"):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        names = cached_attentions(model)
        assert names == [f"model.layers.{index}.self_attn" for index in range(2)]
        cache = DynamicCache()
        argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        with torch.inference_mode(), recorded(model, names) as recorders:
            wanted = model(TOKENS[:1], use_cache=False).logits
            model(TOKENS[1:], use_cache=False)
        with torch.inference_mode():
            torch.testing.assert_close(model(TOKENS[:1], use_cache=False).logits, wanted, atol=0, rtol=0)
            model(TOKENS, **{argument: cache}, use_cache=True)
        for layer, recorder in zip(cache.layers, recorders.values(), strict=True):
            assert recorder.seen is not None
            found, own = torch.tensor(recorder.seen), [layer.keys.abs().max(), layer.values.abs().max()]
            torch.testing.assert_close(found, torch.stack(own), rtol=1e-5, atol=0)


def test_padding_does_not_count() -> None:
    """Oracle: the same tokens without the padded sample."""
    model = MODELS["llama"]().eval()
    names, found = cached_attentions(model), []
    for tokens, mask in ((TOKENS[:1], None), (TOKENS, torch.tensor([[True], [False]]).expand(2, 12))):
        with torch.inference_mode(), recorded(model, names) as recorders:
            for recorder in recorders.values():
                recorder.mask = mask
            model(tokens, use_cache=False)
        found.append(torch.tensor([recorder.seen for recorder in recorders.values()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_models_without_a_cache_have_no_such_attention() -> None:
    assert cached_attentions(torch.nn.Sequential(torch.nn.Linear(2, 2))) == []
