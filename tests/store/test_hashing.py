"""Oracle: any change of a tensor, or of the boundaries between parts, changes the hash."""

from __future__ import annotations

import torch

from epmq_cli.store.hashing import hash_parts, hash_tensors


def test_hashes_of_tensors_depend_on_name_type_shape_and_value() -> None:
    tensors = [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(())},
        {"a": -torch.zeros(2, 3)},
    ]
    assert len({hash_tensors(each) for each in tensors}) == len(tensors)
    assert hash_tensors({"a": torch.arange(6).view(2, 3).T}) == hash_tensors(
        {"a": torch.arange(6).view(2, 3).T.clone()}
    )


def test_hashes_depend_on_the_boundaries_between_parts() -> None:
    assert len({hash_parts(parts) for parts in ([b"ab"], [b"a", b"b"], [b"b", b"a"], [b"ab", b""])}) == 4
