"""Oracles: cores by explicit singular value decompositions in float64; the dense merge, for methods whose result does
not depend on the basis."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from safetensors.torch import save_file
from torch import Tensor

from epmq_cli.commands.overrides import addable
from epmq_cli.config.instantiate import build, conf_dir
from epmq_cli.errors import ModelError
from epmq_cli.merge.core_space import CoreSource, Factors, cores
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.task_arithmetic import TaskArithmetic
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.model_folder import ModelFolder
from tests.helpers.merging import METHODS, folder, merged, method, own_names, taken, tensors

SHAPES = {
    "x.0.q.weight": (8, 6),
    "x.0.q.bias": (8,),
    "x.0.k.weight": (5, 8),
    "x.1.q.weight": (8, 6),
    "x.1.k.weight": (1, 8),
    "conv.weight": (4, 3, 2, 2),
    "embed.weight": (7, 4),
    "norm.weight": (6,),
}
RANKS = {"x.0.q": (2, 3, 1), "x.0.k": (2, 0, 0), "x.1.q": (4, 9, 1), "x.1.k": (2, 2, 2)}
"""The rank of each of three adapters on the linears; they have 0 to 9 directions in common."""
TASKS = ("t0", "t1", "t2")
DATA_FREE = [name for name in METHODS if not method(name).needs]


def linear(name: str, rank: int, seed: int = 0, shapes: Mapping[str, Any] = SHAPES) -> dict[str, Tensor]:
    """The parts of a linear's adapter."""
    rows, columns = shapes[f"{name}.weight"]
    own = {f"{name}.lora_A.weight": (rank, columns), f"{name}.lora_B.weight": (rows, rank)}
    return tensors(sum(name.encode()) + seed, own) if rank else {}


def adapters() -> list[dict[str, Tensor]]:
    """Three adapters of linears; one also has a convolution, an embedding and a whole tensor."""
    made: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, ranks in RANKS.items():
        for index, rank in enumerate(ranks):
            made[index] |= linear(name, rank, index)
    others = {"conv.lora_A.weight": (2, 3, 2, 2), "conv.lora_B.weight": (4, 2, 1, 1), "norm.weight": (6,)}
    made[1] |= tensors(9, {**others, "embed.lora_embedding_A": (2, 7), "embed.lora_embedding_B": (4, 2)})
    return made


def source(
    path: Path, parts: Sequence[dict[str, Tensor]], shapes: Mapping[str, Any] = SHAPES, **config: Any
) -> MergeSource:
    """A base and its adapters in folders, with the scales 3 / rank, 4 / rank, ..."""
    base, experts = folder(path / "base", tensors(0, shapes)), {}
    for index, own in enumerate(parts):
        place = path / TASKS[index]
        place.mkdir()
        values = {"peft_type": "LORA", "lora_alpha": 3 + index, "r": 2, "modules_to_save": ["norm"], **config}
        (place / "adapter_config.json").write_text(json.dumps(values))
        save_file(own, place / "adapter_model.safetensors")
        adapted = Adapted(place, TASKS[index], base, [])
        experts[TASKS[index]] = own_names(ModelFolder(place, TASKS[index], base.config, adapted))
    return MergeSource(own_names(base), experts)


def both(opened: MergeSource, name: str, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The merges in the core space and in the full one."""
    core, full = method(name, space="core", **options), method(name, **options)
    return dict(LazyMerge(opened, core, torch.float32)), dict(LazyMerge(opened, full, torch.float32))


def random_factors(*ranks: int, rows: int = 8, columns: int = 6) -> list[Factors]:
    return [
        (*tensors(seed, {"B": (rows, rank), "A": (rank, columns)}).values(), 0.5 + seed)  # type: ignore[misc]
        for seed, rank in enumerate(ranks)
    ]


@pytest.mark.parametrize("ranks", [(2, 1), (3, 0, 1), (9, 2), (7, 7), (0, 1)])
def test_cores_lose_nothing(ranks: tuple[int, ...]) -> None:
    factors = random_factors(*ranks)
    found, m, n = cores(factors), min(8, sum(ranks)), min(6, sum(ranks))
    assert (found.U.shape, found.V.shape) == ((8, m), (6, n))
    for core, (B, A, scale) in zip(found.cores, factors, strict=True):
        torch.testing.assert_close(found.U @ core @ found.V.T, scale * B @ A, rtol=1e-5, atol=1e-5)


def test_directions_without_a_singular_value_are_zero() -> None:
    (B, A, scale), (zero, _, _) = random_factors(2, 2)
    found = cores([(B, A, scale)] * 3)
    assert found.cores[0].shape == (6, 6)
    assert found.cores[0][2:].count_nonzero() == found.cores[0][:, 2:].count_nonzero() == 0
    torch.testing.assert_close(found.U @ found.cores[2] @ found.V.T, scale * B @ A)
    assert not cores([(torch.zeros_like(zero), A, 1.0)]).cores[0].any()


def test_only_tensors_that_products_alone_change_have_cores(tmp_path: Path) -> None:
    found = CoreSource(source(tmp_path, adapters()))
    assert found.ranks == {f"{name}.weight": [*ranks] for name, ranks in RANKS.items()}
    assert found.shape("x.0.k.weight") == (2, 2)
    assert found.shape("conv.weight") == SHAPES["conv.weight"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("task_arithmetic", {"weights": {"t1": -2}}),
        ("average", {"weights": {"t0": 3}}),
        ("linear", {"normalize": True}),
        ("lines", {}),
        ("geometric_median", {}),
        ("iso_c", {}),
        ("iso_cts", {"common_space_fraction": 1}),
        ("task_arithmetic", {"post": ["svc", "lines"]}),
    ],
)
def test_methods_that_do_not_depend_on_the_basis_give_the_dense_merge(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    core, full = both(source(tmp_path, adapters()), name, **options)
    torch.testing.assert_close(core, full, rtol=1e-5, atol=2e-5)
    assert not torch.equal(core["x.0.q.weight"], full["x.0.q.weight"])


def magmax(own: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(own)
    return np.take_along_axis(stacked, np.abs(stacked).argmax(0)[None], 0)[0]


def ties(own: list[np.ndarray]) -> np.ndarray:
    kept = [core * (np.abs(core) >= np.sort(np.abs(core).ravel())[-int(0.3 * core.size)]) for core in own]
    sign = np.sign(sum(kept))
    return np.sum([core * (np.sign(core) == sign) for core in kept], 0)


def tsv_m(own: list[np.ndarray]) -> np.ndarray:
    def polar(columns: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(columns.T @ columns)
        return columns @ (vectors * values**-0.5) @ vectors.T

    svds = [np.linalg.svd(core) for core in own]
    rank = [min(len(own[0]) // len(own), int((S > 1e-6).sum())) for _, S, _ in svds]
    U = np.hstack([U[:, :r] for (U, _, _), r in zip(svds, rank, strict=True)])
    V = np.hstack([Vh[:r].T for (_, _, Vh), r in zip(svds, rank, strict=True)])
    S = np.concatenate([S[:r] for (_, S, _), r in zip(svds, rank, strict=True)])
    return (polar(U) * S) @ polar(V).T


@pytest.mark.parametrize(
    ("name", "options", "oracle"),
    [
        ("magmax", {"scale": 1}, magmax),
        ("ties", {"density": 0.3, "scale": 1, "scope": "tensor"}, ties),
        ("tsv_m", {"scale": 1}, tsv_m),
    ],
)
def test_methods_merge_the_cores(name: str, options: dict[str, Any], oracle: Any, tmp_path: Path) -> None:
    parts = adapters()
    core, full = both(source(tmp_path, parts), name, **options)
    B, A = ([own[f"x.0.q.lora_{part}.weight"].double().numpy() for own in parts] for part in "BA")
    U = np.linalg.svd(np.hstack(B), full_matrices=False)[0]
    Vh = np.linalg.svd(np.vstack(A), full_matrices=False)[2]
    C = oracle([s / r * (U.T @ b) @ (a @ Vh.T) for s, r, b, a in zip((3, 4, 5), RANKS["x.0.q"], B, A, strict=True)])
    wanted = tensors(0, SHAPES)["x.0.q.weight"].double() + torch.from_numpy(U @ C @ Vh)
    torch.testing.assert_close(core["x.0.q.weight"].double(), wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(core[name], full[name]) for name in ("conv.weight", "embed.weight", "norm.weight"))
    # the singular vectors that TSV-M keeps here are the same in both spaces
    assert torch.allclose(full["x.0.q.weight"].double(), wanted, rtol=1e-2) == (name == "tsv_m")


def needed(name: str) -> dict[str, Any] | None:
    """The options that a method needs for the core space; None if it does not take it."""
    option = getattr(type(method(name)), "core", False)
    return {option: True} if isinstance(option, str) else {} if option else None


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[MergeSource]]:
    """For each number of experts: adapters of all kinds, and equal ones; in the third, B = 0."""
    path, first = tmp_path_factory.mktemp("core"), adapters()[1]
    zero = {key: torch.zeros_like(part) if "lora_B" in key else part for key, part in first.items()}
    kinds = adapters(), [first, first, zero]
    return {most: [source(path / f"{most}{i}", parts[:most]) for i, parts in enumerate(kinds)] for most in (2, 3)}


@pytest.mark.parametrize("name", [name for name in DATA_FREE if needed(name) is not None])
def test_every_method_of_task_vectors_stays_finite(name: str, opened: dict[int, list[MergeSource]]) -> None:
    for each in opened[taken(name)]:
        found = dict(LazyMerge(each, method(name, space="core", **(needed(name) or {})), torch.float32))
        assert {part: tuple(tensor.shape) for part, tensor in found.items()} == SHAPES
        assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("name", DATA_FREE)
def test_methods_that_take_core_merge_task_vectors_whatever_the_base_is(name: str, tmp_path: Path) -> None:
    """What such a method adds to the base depends on the task vectors alone; another method is refused."""
    options, message = needed(name), rf"low rank, and merge={name} does not merge task vectors; choose"
    if options is None:
        with pytest.raises(InstantiationException, match=message):
            method(name, space="core")
        return
    steps = [{part: (64 * tensor).round() / 64 for part, tensor in tensors(seed).items()} for seed in range(4)]
    zero = {part: torch.zeros_like(tensor) for part, tensor in steps[0].items()}
    own = steps[1 : 1 + taken(name)]
    at_zero = merged(tmp_path / "x", method(name, **options), zero, own)
    moved = [{part: tensor + steps[0][part] for part, tensor in each.items()} for each in own]
    at_base = merged(tmp_path / "y", method(name, **options), steps[0], moved)
    for part, tensor in at_zero.items():
        torch.testing.assert_close(at_base[part] - steps[0][part], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("regmean", {}, "low rank, which merge=regmean cannot measure on data; choose merge.space=full"),
        ("linear", {"normalize": False}, "low rank; set merge.normalize=true, or choose merge.space=full"),
        ("nuslerp", {"task_vectors": False}, "low rank; set merge.task_vectors=true, or"),
        ("ties", {"space": "half"}, "merge.space must be one of full, core, got 'half'"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InstantiationException, match=message):
        method(name, **{"space": "core", **options})


def test_experts_that_are_not_adapters_of_the_base_are_refused_by_name(tmp_path: Path) -> None:
    opened = source(tmp_path, adapters()[:1])
    whole, other = folder(tmp_path / "whole", tensors(1, SHAPES)), source(tmp_path / "other", adapters()[:1])
    message = r"{}: .* is not a LoRA adapter of the base, and merge.space=core merges adapters alone; give the folder"
    for role, expert in (("whole", own_names(whole)), ("t0", other._experts["t0"])):
        mixed = MergeSource(opened._base, {"a": opened._experts["t0"], "b": expert})
        with pytest.raises(ModelError, match=message.format(role)):
            LazyMerge(mixed, TaskArithmetic(1, space="core"), torch.float32)


def test_an_adapter_with_a_nan_is_refused_by_name(tmp_path: Path) -> None:
    parts = adapters()
    parts[1]["x.0.q.lora_A.weight"][0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"t1: x.0.q.weight holds a NaN or an infinity"):
        both(source(tmp_path, parts), "tsv_m")


def test_dora_and_initializations_that_change_the_base_are_merged_as_before(tmp_path: Path) -> None:
    parts = adapters()
    parts[2]["x.0.q.lora_magnitude_vector"] = torch.ones(8)
    opened = source(tmp_path / "dora", parts)
    assert "x.0.q.weight" not in CoreSource(opened).ranks
    core, full = both(opened, "tsv_m")
    assert torch.equal(core["x.0.q.weight"], full["x.0.q.weight"])
    assert not CoreSource(source(tmp_path / "pissa", adapters(), init_lora_weights="pissa")).ranks


def test_transposed_weights_have_cores(tmp_path: Path) -> None:
    """As in GPT-2, whose linears are stored as (in, out)."""
    shapes = {"x.0.q.weight": (6, 8)}
    parts = [linear("x.0.q", rank, rank, {"x.0.q.weight": (8, 6)}) for rank in (1, 2)]
    opened = source(tmp_path, parts, shapes, fan_in_fan_out=True)
    assert CoreSource(opened).ranks == {"x.0.q.weight": [1, 2]}
    core, full = both(opened, "task_arithmetic", scale=1)
    torch.testing.assert_close(core, full, rtol=1e-5, atol=1e-5)


def test_no_dense_tensor_of_an_expert_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, tensor = set[str](), Adapted.tensor
    monkeypatch.setattr(Adapted, "tensor", lambda self, name: read.add(name) or tensor(self, name))
    opened = source(tmp_path, adapters())
    for name in ("tsv_m", "ties", "breadcrumbs"):
        read.clear()
        dict(LazyMerge(opened, method(name, space="core", post=["svc"]), torch.float32))
        assert read == {name for name in SHAPES if name.removesuffix(".weight") not in RANKS}


def test_layers_at_another_place_are_merged_as_before(tmp_path: Path) -> None:
    """As in slices: the expert's layer adds a product to a layer of the base other than that it is merged with."""
    names = {task: {"x.0.q.weight": "x.1.q.weight"} for task in TASKS}
    moved = source(tmp_path, adapters()).renamed({"x.0.q.weight": "x.0.q.weight"}, names, None, {})
    core, full = both(moved, "tsv_m")
    assert torch.equal(core["x.0.q.weight"], full["x.0.q.weight"])


@pytest.mark.parametrize("command", ["run", "merge"])
def test_the_command_line_takes_the_space(command: str) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(command, overrides=addable(["merge=ties", "out=x", "merge.space=core"]))
    assert build("merge", cfg.merge).space == "core"
