"""Oracle: the tensors that torch.save wrote. epmq reads state dicts only and runs no code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from epmq_cli.errors import ModelError
from epmq_cli.models.open import open_base, open_expert
from epmq_cli.models.state_dict import open_file

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {"state": {"a": {"exp_avg": torch.ones(2, 3)}}, "param_groups": []}},
        {"module": STATE, "optimizer": None, "global_steps": 7, "rng": {"cpu": torch.zeros(9, dtype=torch.uint8)}},
        {"state": {"model": STATE}, "loss": torch.tensor([0.5]), "best": torch.tensor(0.5)},
    ],
    ids=["plain", "Lightning", "a trainer", "DeepSpeed", "nested"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_are_read_in_all_their_wrappings(content: dict[str, Any], zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "expert.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = open_file(path, "expert")
    assert {name: info.dtype for name, info in found.infos.items()} == {
        "a.weight": "F32",
        "b": "BF16",
        "n": "torch.int64",
    }
    assert all(found.infos[name].shape == t.shape and torch.equal(found.tensor(name), t) for name, t in STATE.items())


def test_a_file_with_several_state_dicts_names_them(tmp_path: Path) -> None:
    """Oracle: the command in the message, which saves one of them to a file."""
    path = tmp_path / "both.pt"
    torch.save({"model": STATE, "model_ema": STATE, "epoch": 3}, path)
    with pytest.raises(
        ModelError, match=r"contains several state dicts \(model, model_ema\); save one of them"
    ) as raised:
        open_file(path, "expert")
    command = str(raised.value).partition("for example with ")[2].replace("'one.pt'", repr(str(tmp_path / "one.pt")))
    exec(command, {"torch": torch})
    assert torch.equal(open_file(tmp_path / "one.pt", "expert").tensor("a.weight"), STATE["a.weight"])


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_modules_and_code_are_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "expert.pt", tmp_path / "trace"
    for content in (torch.nn.Linear(2, 2), Marker(trace), {"state_dict": STATE, "callback": Marker(trace)}):
        torch.save(content, path)
        with pytest.raises(
            ModelError, match=r"expert: .* is not a plain state dict: .* epmq never loads; .*state_dict"
        ):
            open_file(path, "expert")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "reason"), [([1, 2], "contains a list, not a state dict"), ({"epoch": 3}, "contains no named tensors")]
)
def test_the_error_for_other_contents_names_what_to_save(content: Any, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "expert.bin")
    with pytest.raises(ModelError, match=f"{reason}; save model.state_dict"):
        open_file(tmp_path / "expert.bin", "expert")


@pytest.mark.parametrize("keep", [0, 100, 600])
def test_truncated_files_are_named(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "expert.pth"
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"expert: .*expert.pth .*save"):
        open_file(path, "expert")


def test_a_file_is_an_expert_with_the_bases_config_but_not_a_base(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    base = open_base(tmp_path, "base")
    torch.save(STATE, tmp_path / "expert.pt")
    for file in ("expert.pt", "model.safetensors"):
        expert = open_expert(tmp_path / file, "expert", base, ())
        assert expert.config is base.config
        assert expert.path == tmp_path / file
        assert torch.equal(expert.tensor("a.weight"), STATE["a.weight"])
    with pytest.raises(ModelError, match=r"base: .*expert.pt is a file; give the model folder"):
        open_base(tmp_path / "expert.pt", "base")


def test_parameters_that_require_gradients_are_read(tmp_path: Path) -> None:
    """The file comes from `torch.save(dict(model.named_parameters()), FILE)`."""
    model = torch.nn.Linear(2, 3)
    torch.save(dict(model.named_parameters()), tmp_path / "expert.pt")
    found = open_file(tmp_path / "expert.pt", "expert")
    for name, parameter in model.named_parameters():
        assert not found.tensor(name).requires_grad
        assert found.tensor(name).numpy().tolist() == parameter.tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to_sparse_csr(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "rows", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_without_plain_values_are_refused(change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    torch.save({**STATE, "w": change(torch.ones(2, 2))}, tmp_path / "expert.pt")
    with pytest.raises(
        ModelError, match=r"expert: .*expert.pt (contains 'w' as a sparse|cannot be read).*; save model"
    ):
        open_file(tmp_path / "expert.pt", "expert")
