"""Oracles: the JSON schema, the files of the command itself, and the refusals that a user would expect."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from epmq_cli.errors import ConfigError, DataError, EpmqError, ModelError
from epmq_cli.report.metrics_json import schema
from tests.conftest import Run
from tests.helpers.hubs import run_in


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_a_run_leaves_a_checkpoint_and_metrics_that_fit_the_schema(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run_in(tmp_path / "run", request.getfixturevalue(f"{name}_hub"), "bits=3")
    files = {path.name for path in checkpoint.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "heads",
        "epmq.json",
        "README.md",
        "tokenizer.json",
    } <= files
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint", "metrics.json", "report.html"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(metrics, schema())
    assert list(metrics["scores"]["tasks"]) == ["first", "second"]
    assert set(metrics["scores"]["average"]) == {"base", "experts", "merged", "quantized"}
    assert metrics["bytes"]["linears_packed"] < metrics["bytes"]["linears_dense"] / 5
    assert metrics["bytes"]["model_packed"] < metrics["bytes"]["model_dense"]
    assert metrics["events"].pop("linears") == 12
    assert set(metrics["events"].values()) == {0}
    assert metrics["config"]["bits"] == 3
    printed = capsys.readouterr().out
    for by_stage in metrics["scores"]["tasks"].values():
        assert all(f"{100 * accuracy:.1f}" in printed for accuracy in by_stage.values())


def test_only_requested_stages_are_scored(clip_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path, clip_hub, "eval.stages=[quantized]", "eval.samples=7")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["scores"]["average"]) == {"quantized"}
    assert all(
        by_stage["quantized"] * 7 == pytest.approx(round(by_stage["quantized"] * 7))
        for by_stage in metrics["scores"]["tasks"].values()
    )


def test_a_run_may_score_nothing(clip_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path, clip_hub, "eval.stages=[]")
    assert json.loads((tmp_path / "metrics.json").read_text())["scores"]["average"] == {}


def test_a_folder_that_holds_a_run_is_not_overwritten(clip_hub: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ConfigError, match="already holds checkpoint; choose another out or remove them"):
        run_in(tmp_path, clip_hub)
    assert list((tmp_path / "checkpoint").iterdir()) == []


BAD = [
    ("seed=-1", ConfigError, r"seed must be a whole number in \[0, 2147483647\], got -1"),
    ("device=tpu", ConfigError, "device must be auto, cpu, cuda or cuda:<index>, got 'tpu'"),
    ("calib.samples=0", ConfigError, "calib.samples must be a whole number in"),
    ("calib.batch_size=none", ConfigError, "calib.batch_size must be a whole number, got .none."),
    ("pack.dtype=int8", ConfigError, "pack.dtype must be one of auto, float32, float16, bfloat16, got 'int8'"),
    ("pack.shard_size=5", ConfigError, "pack.shard_size must be a number with a unit .KB, MB, GB"),
    ("pack.shard_size=0GB", ConfigError, "pack.shard_size"),
    ("eval.stages=[packed]", ConfigError, "eval.stages must be one of base, experts, merged, quantized, got 'packed'"),
    ("eval.samples=0", ConfigError, "eval.samples must be a whole number in"),
    ("+merge.densty=1", ConfigError, "merge has no option 'densty', the options are scale"),
    ("merge.scale=${nowhere}", ConfigError, "the config cannot be resolved: Interpolation key 'nowhere' not found"),
    ("seed=???", ConfigError, "seed must be given, for instance seed=..."),
    ("bits=???", ConfigError, "the config cannot be resolved: .*Missing mandatory value: bits"),
    ("merge._target_=os.system", ConfigError, "merge._target_ must name one of epmq's classes, got 'os.system'"),
    ("suite.family=gpt", ConfigError, "suite.family must be one of auto, bart, beit, bert, .*, got 'gpt'"),
    (
        "+suite.tasks.first.clases=[a]",
        ConfigError,
        r"suite.tasks.first has no option 'clases'.* did you mean classes\?",
    ),
    ("suite.tasks.first.classes=[a]", ConfigError, "suite.tasks.first.classes must be two or more different names"),
    ("suite.tasks.first.templates=[plain]", ConfigError, "suite.tasks.first.templates must each have one {}"),
    ("suite.tasks.first.classes=null", ConfigError, "suite.tasks.first needs classes and templates"),
    (
        "suite.tasks.first.classes=[red,blue]",
        DataError,
        "task first: labels must lie in 0..1 as its head has 2 classes, got 0..2",
    ),
    ("suite.tasks.first.data.path=gone.npz", DataError, r"gone.npz cannot be read as npz"),
    ("suite.base=./gone", ModelError, "base: ./gone is neither an existing folder or file"),
    (
        "suite.tasks.first.expert=./gone",
        ModelError,
        "expert of task first: ./gone is neither an existing folder or file",
    ),
]


@pytest.mark.parametrize(("override", "error", "message"), BAD, ids=[override for override, _, _ in BAD])
def test_bad_input_is_refused_in_one_sentence_and_leaves_no_files(
    override: str, error: type[EpmqError], message: str, clip_hub: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as raised:
        run_in(tmp_path, clip_hub, override)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_models_of_another_family_are_refused(clip_hub: Path, bert_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="base: .* holds a model of type bert, family clip takes clip and clip_vision_model"
    ):
        run_in(tmp_path, clip_hub, f"suite.base={bert_hub / 'base'}")
    with pytest.raises(
        ModelError, match="expert of task first: .* holds a model of type clip_vision_model, family bert takes bert"
    ):
        run_in(tmp_path, bert_hub, f"suite.tasks.first.expert={clip_hub / 'first'}")


def test_lengths_beyond_the_positions_of_the_model_are_refused(bert_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="suite.tasks.first.max_length must be at most 32, the positions of the model in"
    ):
        run_in(tmp_path, bert_hub, "suite.tasks.first.max_length=33")


def test_a_quantized_base_is_refused(clip_hub: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path / "run", clip_hub, "eval.stages=[]")
    with pytest.raises(ModelError, match="base: .* is quantized already; give the original model"):
        run_in(tmp_path / "again", clip_hub, f"suite.base={checkpoint}")


def test_the_command_runs_and_its_checkpoint_evaluates_to_the_same_scores(
    bert_hub: Path, epmq: Run, epmq_inside: Run, tmp_path: Path
) -> None:
    options = ("--config-dir", str(bert_hub / "configs"), "suite=mini", "group_size=16", "out=here")
    result = epmq("run", *options)
    assert result.returncode == 0, result.stderr
    assert "here/checkpoint" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr  # plain without a terminal
    assert (
        "WARNING epmq: task first: calibration uses all 40 training samples"
        in (tmp_path / "here" / "run.log").read_text()
    )
    first = json.loads((tmp_path / "here" / "metrics.json").read_text())
    assert first["overrides"] == list(options[2:])
    again = epmq_inside("eval", "here/checkpoint", "out=there")
    assert again.returncode == 0, again.stderr
    second = json.loads((tmp_path / "there" / "metrics.json").read_text())
    jsonschema.validate(second, schema())
    for task, by_stage in second["scores"]["tasks"].items():
        assert by_stage["quantized"] == first["scores"]["tasks"][task]["quantized"]


def test_a_sweep_runs_every_combination_in_its_own_folder(bert_hub: Path, epmq_inside: Run, tmp_path: Path) -> None:
    options = (
        "--config-dir",
        str(bert_hub / "configs"),
        "suite=mini",
        "group_size=16",
        "eval.stages=[quantized]",
        "eval.samples=5",
    )
    result = epmq_inside("run", "-m", *options, "merge=ties,task_arithmetic", "bits=3,4", "out=sweep")
    assert result.returncode == 0, result.stderr
    folders = sorted((tmp_path / "sweep").glob("*/metrics.json"))
    settings = {
        (m["config"]["merge"]["_target_"].rsplit(".", 1)[1], m["config"]["bits"])
        for m in (json.loads(folder.read_text()) for folder in folders)
    }
    assert settings == {(merge, bits) for merge in ("Ties", "TaskArithmetic") for bits in (3, 4)}
    checkpoint = next(
        folder.parent for folder in folders if "bits=3" in folder.parent.name and "ties" in folder.parent.name
    )
    evaluated = epmq_inside("eval", str(checkpoint.relative_to(tmp_path) / "checkpoint"), "eval.samples=5", "out=e")
    assert evaluated.returncode == 0, evaluated.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("run", "bits=9"),
            "epmq: bits must be one of 2, 3, 4, 5, 6, 7, 8, or a number between them for a mix such as 3.5, got 9",
        ),
        (
            ("eval", "nowhere"),
            "epmq: nowhere has no readable epmq.json; give the checkpoint folder that epmq run wrote",
        ),
        (("eval",), "epmq: checkpoint must be given"),
    ],
)
def test_errors_of_the_command_have_no_traceback(arguments: tuple[str, ...], message: str, epmq_inside: Run) -> None:
    result = epmq_inside(*arguments)
    assert result.returncode == 1
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout


def test_a_damaged_checkpoint_is_refused(bert_hub: Path, epmq_inside: Run, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path / "run", bert_hub, "eval.stages=[]")
    heads = checkpoint / "heads" / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-10])
    result = epmq_inside("eval", str(checkpoint))
    assert result.returncode == 1
    assert "heads.safetensors cannot be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_checkpoint_cannot_name_its_own_code(bert_hub: Path, tmp_path: Path, epmq_inside: Run) -> None:
    checkpoint = run_in(tmp_path / "run", bert_hub, "eval.stages=[]")
    record = checkpoint / "epmq.json"
    record.write_text(record.read_text().replace("epmq_cli.data.table.Table", "tests.data.evil.Table"))
    result = epmq_inside("eval", str(checkpoint))
    assert result.returncode == 1
    assert "names tests.data.evil.Table, which is not a class of epmq; if you trust it" in result.stderr
    trusted = epmq_inside("eval", str(checkpoint), "--config-dir", str(bert_hub / "configs"), "suite=mini")
    assert trusted.returncode == 0, trusted.stderr


def test_an_interrupted_run_reports_it_and_leaves_no_checkpoint(
    bert_hub: Path, tmp_path: Path, epmq_inside: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("epmq_cli.pipeline.calibration.run_passes", interrupt)
    result = epmq_inside("run", "--config-dir", str(bert_hub / "configs"), "suite=mini", "group_size=16", "out=x")
    assert result.returncode == 130
    wanted = "epmq: interrupted; start the same command again to continue after the last finished block\n"
    assert result.stderr.endswith(wanted)
    assert {path.name for path in (tmp_path / "x").iterdir()} == {".hydra", ".resume", "run.log"}
