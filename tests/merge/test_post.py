"""Oracles: SVC by loops over directions and tasks; no post-processors leave the bytes of each merge; wrong entries are
refused before a model is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from epmq_cli.commands.overrides import addable
from epmq_cli.config.instantiate import build, conf_dir
from epmq_cli.errors import ConfigError
from epmq_cli.merge.svc import calibrate
from epmq_cli.merge.ties import Ties
from tests.helpers.merging import METHODS, merged, method, taken, tensors
from tests.merge.test_iso import given, random

BASE, EXPERTS = tensors(0), [tensors(1), tensors(2), tensors(3)]
DATA_FREE = [name for name in METHODS if not method(name).needs]


def reference(total: Tensor, vectors: Sequence[Tensor], alpha: float) -> Tensor:
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    for r in range(len(S)):
        response = U[:, r] @ total
        own = [U[:, r] @ vector for vector in vectors]
        S[r] *= len(own) / sum(max(alpha, float(response @ a / (a @ a))) for a in own)
    return U @ torch.diag(S) @ Vh


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_svc_is_the_papers_algorithm(alpha: float) -> None:
    vectors = [random(8, 6, seed=seed) for seed in range(3)]
    total = torch.stack(vectors).sum(0)
    torch.testing.assert_close(calibrate(total, given(vectors), alpha), reference(total, vectors, alpha))


def test_svc_of_equal_task_vectors_is_one_of_them() -> None:
    vector = random(8, 6)
    torch.testing.assert_close(calibrate(3 * vector, given([vector] * 3), 1 / 3), vector)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_svc_enlarges_directions_by_1_over_alpha_at_most(alpha: float) -> None:
    """Of orthogonal task vectors, a direction has the merge's scale in its own one and nothing in the others."""
    vectors = list(torch.diag_embed(torch.eye(4, dtype=torch.float64)))
    total = torch.stack(vectors).sum(0)
    for scale in (0.1, 0.3, 1.0):
        wanted = scale * total / max(alpha, (scale + 3 * alpha) / 4)
        torch.testing.assert_close(calibrate(scale * total, given(vectors), alpha), wanted)


def test_svc_of_zero_task_vectors_is_finite() -> None:
    zero = torch.zeros(8, 6, dtype=torch.float64)
    assert torch.equal(calibrate(zero, given([zero, zero]), 0.5), zero)
    assert calibrate(random(8, 6), given([zero, random(8, 6)]), 0.5).isfinite().all()


def test_svc_changes_matrices_only_and_takes_1_over_the_experts(tmp_path: Path) -> None:
    plain = merged(tmp_path / "x", method("task_arithmetic", scale=1), BASE, EXPERTS)
    found = merged(tmp_path / "y", method("task_arithmetic", scale=1, post=["svc"]), BASE, EXPERTS)
    for name in ("a.bias", "scalar"):
        assert torch.equal(found[name], plain[name])
    vectors = [(expert["a.weight"] - BASE["a.weight"]).double() for expert in EXPERTS]
    wanted = BASE["a.weight"] + reference(torch.stack(vectors).sum(0), vectors, 1 / 3).float()
    torch.testing.assert_close(found["a.weight"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DATA_FREE)
def test_every_method_takes_post_processors_in_their_order(name: str, tmp_path: Path) -> None:
    """A line that starts and ends at 1 changes nothing; one at 0 gives the base, whatever comes next."""
    same, zero = ({"name": "lines", "alpha": alpha, "beta": 0} for alpha in (1, 0))
    plain = merged(tmp_path / "x", method(name), BASE, EXPERTS[: taken(name)])
    torch.testing.assert_close(merged(tmp_path / "y", method(name, post=[same]), BASE, EXPERTS[: taken(name)]), plain)
    found = merged(tmp_path / "z", method(name, post=[zero, "svc"]), BASE, EXPERTS[: taken(name)])
    torch.testing.assert_close(found, BASE)


def test_the_result_is_rounded_after_post_processing(tmp_path: Path) -> None:
    half = [{name: tensor.half() for name, tensor in model.items()} for model in (BASE, *EXPERTS)]
    found = merged(tmp_path / "x", method("ties", post=["svc"]), half[0], half[1:])
    wide = [{name: tensor.float() for name, tensor in model.items()} for model in half]
    expected = merged(tmp_path / "y", method("ties", post=["svc"]), wide[0], wide[1:])
    assert all(torch.equal(found[name], expected[name]) for name in BASE)


@pytest.mark.parametrize(
    ("post", "message"),
    [
        ("svc", r"merge.post must be a list of post-processors, such as \[lines, svc\]; got 'svc'"),
        (["scv"], r"merge.post\[0\] has no option 'scv', the options are lines, svc; did you mean svc\?"),
        (
            [3],
            r"merge.post\[0\] must be one of lines, svc, or one with options such as \{name: svc, alpha: 0.1\}; got 3",
        ),
        ([{"alpha": 1}], r"merge.post\[0\] must be one of lines, svc, or one with options"),
        (["lines", {"name": "svc", "alhpa": 1}], r"merge.post\[1\] has no option 'alhpa', .* did you mean alpha\?"),
        ([{"name": "svc", "alpha": 0}], r"merge.post\[0\].alpha must be a number in \(0, 10\], or null, got 0|got 0"),
    ],
)
def test_wrong_entries_are_refused(post: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ties(0.2, 0.3, "sum", post=post)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["run", "merge"])
def test_the_command_line_takes_post_processors(command: str) -> None:
    def composed(*given: str) -> DictConfig:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose(command, overrides=addable(["merge=ties", "out=x", *given]))

    assert list(build("merge", composed().merge).post) == []
    made = build("merge", composed("merge.post=[lines,{name: svc, alpha: 0.1}]").merge)
    assert made.post == ["lines", {"name": "svc", "alpha": 0.1}]
    with pytest.raises(ConfigError, match=r"did you mean svc\?"):
        build("merge", composed("merge.post=[scv]").merge)
