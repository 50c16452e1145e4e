"""Oracles: closed forms for models without memory, and the loss of transformers, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from epmq_cli.errors import DataError
from epmq_cli.evaluate import perplexity as of_windows
from epmq_cli.evaluate.perplexity import window_losses, windows

IDS = torch.randint(0, 7, (23,), generator=torch.Generator().manual_seed(0))


def perplexity(logits_of: Callable[[Tensor], Tensor], *given: Any) -> float:
    """The perplexity of a model with these logits."""
    return of_windows.perplexity(partial(window_losses, logits_of), *given).value


@pytest.mark.parametrize("stride", [2, 5])
def test_a_uniform_model_has_the_size_of_the_vocabulary_as_perplexity(stride: int) -> None:
    found = perplexity(lambda ids: torch.zeros(*ids.shape, 7), IDS, 5, stride, 2)
    assert found == pytest.approx(7)


def test_a_bigram_model_has_the_mean_loss_of_its_predictions() -> None:
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    losses = -table[IDS[:-1], IDS[1:]]  # the losses of tokens 1, 2, ..., 22
    apart = [loss for place, loss in enumerate(losses.tolist(), 1) if place % 5]
    assert perplexity(lambda ids: table[ids], IDS, 5, 5, 3) == pytest.approx(math.exp(sum(apart) / len(apart)))
    assert perplexity(lambda ids: table[ids], IDS, 5, 2, 3) == pytest.approx(math.exp(float(losses.mean())))


def test_only_marked_tokens_count() -> None:
    """Closed form: the mean over the marked tokens, without the first of each window."""
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    losses = -table[IDS[:-1], IDS[1:]]
    marks = torch.arange(23) % 3 // 2  # of tokens 2, 5, 8, ...; 5 and 20 start windows
    marked = torch.stack([IDS, marks], 1)
    counted = [losses[place - 1] for place in (2, 8, 11, 14, 17)]
    assert perplexity(lambda ids: table[ids], marked, 5, 5, 3) == pytest.approx(math.exp(sum(counted) / 5))
    counted = [losses[place - 1] for place in range(2, 23, 3)]
    assert perplexity(lambda ids: table[ids], marked, 5, 2, 3) == pytest.approx(math.exp(sum(counted) / 7))
    whole = torch.stack([IDS, torch.ones_like(IDS)], 1)
    assert perplexity(lambda ids: table[ids], whole, 5, 2, 3) == perplexity(lambda ids: table[ids], IDS, 5, 2, 3)
    first = torch.stack([IDS, (torch.arange(23) % 5 == 0).long()], 1)
    with pytest.raises(DataError, match="got none among 23 tokens; raise max_length"):
        perplexity(lambda ids: table[ids], first, 5, 5, 3)


@pytest.mark.parametrize("batch_size", [1, 2, 50])
@pytest.mark.parametrize(("length", "stride"), [(5, 5), (6, 4), (8, 3), (40, 40)])
def test_windows_match_the_recipe_of_the_transformers_documentation(length: int, stride: int, batch_size: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=7, bos_token_id=0, eos_token_id=1)).double().eval()
    total, count, reached = 0.0, 0, 0
    for start in range(0, len(IDS), stride):
        end = min(start + length, len(IDS))
        labels = IDS[None, start:end].clone()
        labels[:, : -(end - reached)] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted:
            total += predicted * float(model(input_ids=IDS[None, start:end], labels=labels).loss.detach())
        count, reached = count + predicted, end
        if end == len(IDS):
            break

    def logits_of(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids).logits
        return logits.detach()

    assert perplexity(logits_of, IDS, length, stride, batch_size) == pytest.approx(math.exp(total / count), rel=1e-6)


@pytest.mark.parametrize("stride", [3, 5])
def test_every_token_is_new_in_one_window(stride: int) -> None:
    found = list(windows(23, 5, stride))
    assert sum(fresh for _, _, fresh in found) == 23
    assert found[-1][1] == 23


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_text_without_predicted_tokens_is_refused(tokens: int) -> None:
    with pytest.raises(DataError, match=f"at least two tokens of text, got {tokens}"):
        perplexity(lambda ids: torch.zeros(*ids.shape, 7), IDS[:tokens], 5, 5, 1)
