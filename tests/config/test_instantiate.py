"""Oracle: the targets that a config may name, and those that it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from epmq_cli.config.instantiate import MOVED, build, conf_dir, device_of, targets
from epmq_cli.errors import ConfigError

TIES = {"_target_": "epmq_cli.merge.ties.Ties", "density": 0.2, "scale": 0.3, "combine": "sum"}


@pytest.mark.parametrize("hidden", [{"a": [{"_target_": "os.system"}]}, {"a": {"b": {"_target_": "os.system"}}}])
def test_targets_are_instantiated_at_any_depth(hidden: object) -> None:
    assert targets(hidden) == ["os.system"]


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "nowhere.Nothing", "epmq_cli.merge.ties.trim"])
def test_only_config_classes_are_instantiated_at_any_depth(target: str) -> None:
    for value in ({"_target_": target}, [{"_target_": target}]):
        with pytest.raises(ConfigError, match="_target_ must name one of epmq's classes"):
            build("merge", OmegaConf.create({**TIES, "density": value}))


def test_a_group_without_target_and_a_missing_field_are_named() -> None:
    with pytest.raises(ConfigError, match="merge has no _target_; copy the first lines of one of the shipped"):
        build("merge", OmegaConf.create({"density": 0.2}))
    with pytest.raises(ConfigError, match="merge needs combine, but only density, scale is set"):
        build("merge", OmegaConf.create({key: value for key, value in TIES.items() if key != "combine"}))


def test_earlier_names_of_classes_still_work() -> None:
    """Oracle: the objects of the current names."""
    assert targets([{"_target_": old} for old in MOVED]) == list(MOVED.values())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=["bits=3"])
    earlier = {new: old for old, new in MOVED.items()}
    for group in ("suite", "calib", "pack", "eval"):
        made = build(group, cfg[group])
        target = cfg[group]._target_
        named = OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True).replace(target, earlier[target]))
        assert build(group, named[group]) == made


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:0", "cuda:x", 3])
def test_missing_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        device_of(name)


def test_each_process_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(name) for name in ("auto", "cuda", "cuda:1")] == [
        torch.device("cuda", number) for number in (0, 0, 1)
    ]
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [device_of(name).index for name in ("auto", "cuda", "cuda:0")] == [1, 1, 0]
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name in ("auto", "cuda"):
        with pytest.raises(
            ConfigError, match=f"device={name} is not available for process 3 of torchrun: .* 2 CUDA devic"
        ):
            device_of(name)


def test_a_users_suite_can_use_shipped_tasks(tmp_path: Path) -> None:
    lines = ["defaults: [clip_tasks@tasks.mnist: mnist, clip_tasks@tasks.svhn: svhn, _self_]", "name: mine"]
    lines += ["_target_: epmq_cli.data.suite.Suite", "family: clip", "base: b", "experts: 'me/{task}'"]
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.yaml").write_text("\n".join(lines))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=[f"hydra.searchpath=[file://{tmp_path}]", "suite=mine", "data_root=/m", "out=x"])
    members = build("suite", cfg.suite).members
    assert [task.expert for task in members] == ["me/mnist", "me/svhn"]
    assert all(task.data.root == "/m" for task in members)
