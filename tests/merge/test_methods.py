"""Oracles: closed forms on a few numbers, and invariants of every method."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from epmq_cli.config.instantiate import conf_dir, option_name
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.method import ElementwiseRule, MergeMethod, Piece, check_method, method_name, refuse_needs
from epmq_cli.merge.task_arithmetic import TaskArithmetic
from epmq_cli.merge.ties import Options, Ties, elected, kth_largest_magnitudes
from tests.helpers.merging import SHAPES, merged, method, source, tensors


@pytest.mark.parametrize("name", ["average", "fisher", "regmean"])
def test_the_mean_of_one_expert_is_that_expert(name: str, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method(name), tensors(0), [tensors(1)])
    assert all(torch.equal(found[part], tensors(1)[part]) for part in SHAPES)


def test_random_numbers_of_a_piece_depend_on_seed_task_name_and_offset(tmp_path: Path) -> None:
    shapes = {"long": (140_000,)}
    opened = source(tmp_path / "x", tensors(0, shapes), [tensors(1, shapes)])
    pieces = [reader() for reader in opened.pieces("long")]
    assert [piece.offset for piece in pieces] == [0, 1 << 16, 1 << 17]
    assert torch.equal(torch.cat([piece.base for piece in pieces]), tensors(0, shapes)["long"])
    piece = Piece("a", 0, torch.zeros(1), {})
    others = [(piece, 1, "t"), (piece, 0, "u"), (Piece("b", 0, piece.base, {}), 0, "t")]
    others.append((Piece("a", 1 << 16, piece.base, {}), 0, "t"))
    wanted = piece.generator(0, "t").random(4).tolist()
    assert piece.generator(0, "t").random(4).tolist() == wanted
    assert all(other.generator(seed, task).random(4).tolist() != wanted for other, seed, task in others)


def test_errors_name_a_method_as_its_option() -> None:
    """Oracle: the file names in conf/merge; each class has one file."""
    targets = {path.stem: OmegaConf.load(path)._target_ for path in (conf_dir() / "merge").glob("*.yaml")}
    assert len(set(targets.values())) == len(targets) > 40
    for name, target in targets.items():
        assert option_name("merge", get_class(target)) == name
    assert method_name(method("della_linear")) == "della_linear"
    with pytest.raises(ConfigError, match="^merge=slerp merges 1 or 2 experts"):
        method("slerp").check(["a", "b", "c"])
    with pytest.raises(ConfigError, match="^merge=regmean_pp needs calibration data, .* epmq run merge=regmean_pp "):
        refuse_needs(method("regmean_pp"))
    assert option_name("merge", Mine) == "mine"


class Old:
    """A user's method with the interface of earlier versions."""

    def __call__(self) -> None: ...


def test_an_object_that_is_not_a_method_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"merge._target_ names .*Old, which has no needs, check, fit; a merge method"
    ):
        check_method(Old(), ["t0"])  # type: ignore[arg-type]


class Mine:
    """A user's method."""

    needs: ClassVar = frozenset()

    def check(self, tasks: object) -> None: ...

    def fit(self, source: object, data: object) -> ElementwiseRule:
        return ElementwiseRule(lambda piece: piece.base + 1)


def test_a_users_method_merges(tmp_path: Path) -> None:
    mine: MergeMethod = Mine()
    check_method(mine, ["t0"])
    refuse_needs(mine)
    assert torch.equal(merged(tmp_path / "x", mine, tensors(0), [tensors(1)])["a.bias"], tensors(0)["a.bias"] + 1)


def test_average_is_the_mean_without_the_base(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("average"), tensors(0), [tensors(1), tensors(2)])
    for name in SHAPES:
        torch.testing.assert_close(found[name], (tensors(1)[name] + tensors(2)[name]) / 2)


def test_none_is_the_base(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("none"), tensors(0), [tensors(1)])
    assert all(torch.equal(found[name], tensors(0)[name]) for name in SHAPES)


def test_task_arithmetic_closed_form_and_special_scales(tmp_path: Path) -> None:
    base, experts = tensors(0), [tensors(1), tensors(2)]
    for folder_name, scale, weights in (("x", 0.3, 0.3), ("half", 0.5, 0.5), ("zero", 0, 0)):
        found = merged(tmp_path / folder_name, TaskArithmetic(scale), base, experts)
        for name in SHAPES:
            expected = base[name] + weights * sum(expert[name] - base[name] for expert in experts)
            torch.testing.assert_close(found[name], expected)
    average = merged(tmp_path / "a", method("average"), base, experts)
    torch.testing.assert_close(merged(tmp_path / "ta", TaskArithmetic(0.5), base, experts), average)


def test_ties_of_one_expert_at_full_density_is_that_expert(tmp_path: Path) -> None:
    for combine in ("sum", "mean"):
        found = merged(tmp_path / combine, Ties(density=1.0, scale=1.0, combine=combine), tensors(0), [tensors(1)])
        torch.testing.assert_close(found, tensors(1), rtol=1e-6, atol=1e-6)


def test_ties_trims_the_whole_vector_and_keeps_the_exact_count(tmp_path: Path) -> None:
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    expert = tensors(1)
    expert["a.bias"] *= 100  # trimming per tensor would drop some of these
    found = merged(tmp_path / "x", Ties(density=0.2, scale=1.0, combine="sum"), zero, [expert])
    kept = torch.cat([tensor.flatten() for tensor in found.values()])
    every = torch.cat([expert[name].flatten() for name in found])
    assert int((kept != 0).sum()) == int(0.2 * every.numel())
    assert found["a.bias"].count_nonzero() == 4
    assert kept[kept != 0].abs().min() > every[kept == 0].abs().max()


def test_ties_elects_the_larger_total_and_drops_the_rest() -> None:
    vectors = torch.tensor([[3.0, -1.0, 0.0, 2.0], [1.0, 4.0, 0.0, -2.0], [-2.0, -1.0, 0.0, 0.5]])
    base, experts = torch.tensor([1.0, 0.0, 5.0, 0.0]), list(vectors + torch.tensor([1.0, 0.0, 5.0, 0.0]))
    for sign, mean, wanted in (
        (1.0, False, [5.0, 4.0, 5.0, 2.0]),
        (1.0, True, [3.0, 4.0, 5.0, 2.0]),
        (-1.0, False, [5.0, 4.0, 5.0, -2.0]),
    ):
        assert elected(base, experts, Options([0.0, 0.0, 1.0], [1.0] * 3, sign, 1.0, mean)).tolist() == wanted


def test_ties_resolves_ties_by_the_majority_sign_of_the_whole_vector(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor([1.0, -1.0, -1.0, 5.0])}, {"w": torch.tensor([-1.0, -1.0, -1.0, 5.0])}]
    found = merged(tmp_path / "x", Ties(density=1.0, scale=1.0, combine="sum"), base, experts)
    assert found["w"].tolist() == [-1.0, -2.0, -2.0, 10.0]


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_kth_largest_matches_a_sort(density: float) -> None:
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((50, 7), (31,), (1,))]
    parts.append(torch.tensor([0.0, 1e-42, -1e30]))
    reads = [[partial(list, [piece, -2 * piece]) for piece in part.flatten().split(100)] for part in parts]
    every = torch.cat([part.abs().flatten() for part in parts]).sort(descending=True).values
    wanted = every[max(1, int(density * len(every))) - 1].item()
    assert kth_largest_magnitudes(lambda: reads, [density, density]) == [wanted, 2 * wanted]


def test_the_merge_is_rounded_once_to_the_checkpoint_type(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    opened = source(tmp_path / "x", tensors(0), [tensors(1), tensors(2)])
    exact = dict(LazyMerge(opened, TaskArithmetic(0.3), torch.float32))
    rounded = dict(LazyMerge(opened, TaskArithmetic(0.3), torch.float16))
    for name in SHAPES:
        assert rounded[name].dtype == torch.float32
        assert torch.equal(rounded[name], exact[name].half().float())


def test_half_precision_models_are_merged_in_float32(tmp_path: Path) -> None:
    base, expert = ({name: tensor.half() for name, tensor in tensors(seed).items()} for seed in (0, 1))
    found = merged(tmp_path / "x", TaskArithmetic(0.3), base, [expert])
    expected = base["a.weight"].float() + 0.3 * (expert["a.weight"].float() - base["a.weight"].float())
    assert torch.equal(found["a.weight"], expected)


def changed(change: str) -> dict[str, Tensor]:
    content = tensors(1)
    if change == "missing":
        del content["a.bias"]
    elif change == "extra":
        content["b"] = torch.zeros(2)
    elif change == "shape":
        content["a.weight"] = torch.zeros(4, 5)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "a.bias is missing from the expert"),
        ("extra", "b is missing from the base"),
        ("shape", r"a.weight is \[4, 5\] in the expert and \[4, 6\] in the base"),
    ],
)
def test_models_that_do_not_match_are_refused_by_name(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"t0 .* does not fit the base .*{message}"):
        source(tmp_path, tensors(0), [changed(change)])


def test_the_error_lists_only_the_first_differences(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"; .*; .* and 4 more; give an expert"):
        source(tmp_path, {f"w{i}": torch.zeros(1) for i in range(6)}, [{"other": torch.zeros(1)}])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    broken = tensors(1)
    broken["a.bias"][2] = value
    opened = source(tmp_path, tensors(0), [broken])
    with pytest.raises(ModelError, match=r"t0: a.bias holds a NaN or an infinity; train or fetch the model again"):
        dict(LazyMerge(opened, TaskArithmetic(0.3), torch.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 2.0}, r"merge.density must be a number in \(0, 1\], got 2.0"),
        ({"density": 0}, "merge.density"),
        ({"density": "0.2"}, "merge.density"),
        ({"scale": -0.1}, "merge.scale"),
        ({"combine": "median"}, "merge.combine must be one of sum, mean, got 'median'"),
    ],
)
def test_bad_options_of_ties_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ties(**{"density": 0.2, "scale": 0.3, "combine": "sum", **fields})  # type: ignore[arg-type]


def test_a_bad_scale_of_task_arithmetic_is_refused() -> None:
    for scale in (11, -1, float("nan"), "x", None, True):
        with pytest.raises(ConfigError, match=r"merge.scale must be a number in \[0, 10\]"):
            TaskArithmetic(scale)  # type: ignore[arg-type]
