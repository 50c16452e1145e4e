"""Properties: what may change and what stays, and that the contents and the number decide."""

from __future__ import annotations

import torch

from epmq_cli.data.views import REPLACED, replaced, shifted, view

PICTURES = torch.randn(5, 3, 20, 30, generator=torch.Generator().manual_seed(0))


def test_the_first_view_is_the_batch() -> None:
    batch = {"pixel_values": PICTURES}
    assert view(batch, 0, 0) is batch


def test_contents_seed_and_number_decide() -> None:
    batch = {"pixel_values": PICTURES}
    one = view(batch, 0, 1)["pixel_values"]
    assert torch.equal(one, view({"pixel_values": PICTURES.clone()}, 0, 1)["pixel_values"])
    for other in (view(batch, 0, 2), view(batch, 1, 1), view({"pixel_values": PICTURES.flip(0)}, 0, 1)):
        assert not torch.equal(one, other["pixel_values"])


def test_pictures_are_shifted_and_reflected_at_the_edges() -> None:
    padded = torch.nn.functional.pad(PICTURES, (3, 3, 2, 2), mode="reflect")
    places = set()
    for sample, picture in enumerate(shifted(PICTURES, torch.Generator().manual_seed(1))):
        [place] = [
            (y, x)
            for y in range(5)
            for x in range(7)
            if torch.equal(padded[sample, :, y : y + 20, x : x + 30], picture)
        ]
        places.add(place)
    assert len(places) > 1


def test_some_words_are_replaced_by_words_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, 900, (40, 50), generator=generator)
    tokens[:, 0], tokens[:, 7] = 1, 2  # all texts have them in common
    lengths = torch.randint(20, 51, (40,), generator=generator)
    real = torch.arange(50) < lengths[:, None]
    tokens[torch.arange(40), lengths - 1] = torch.arange(40)
    tokens[~real] = 0
    found = replaced(tokens, real, generator)
    changed = found != tokens
    free = real.clone()
    free[:, [0, 7]] = False
    free[torch.arange(40), lengths - 1] = False
    assert not changed[~free].any()
    assert abs(float(changed[free].float().mean()) - REPLACED) < 0.03
    assert torch.isin(found[changed], tokens[free]).all()


def test_texts_without_free_tokens_stay() -> None:
    tokens = torch.tensor([[1, 2], [1, 3]])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(view(batch, 0, 1)["input_ids"], tokens)
