"""Oracle: the labels are the expert's own predictions in transformers, by name, so its accuracy is 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertForSequenceClassification

from epmq_cli.commands.eval import evaluate
from epmq_cli.data.images import ImageFolder
from epmq_cli.data.suite import Task
from epmq_cli.data.table import Table
from epmq_cli.errors import ConfigError, DataError, EpmqError, ModelError
from epmq_cli.families import family_of
from epmq_cli.pipeline import scored_tasks
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.report.metrics_json import schema
from tests.conftest import WORDS, write_suite
from tests.helpers.hubs import config, eval_config, run_in

NAMES = ["Red Film", "green_film", "blue-film"]  # the order of the head's rows
DATA = ["blue film", "red film", "green film"]  # the order of the data
PLAIN = ("quant=none", "merge=average", "guidance=merged", "calib.samples=4", "group_size=-1")


@pytest.fixture(scope="module")
def hub(bert_hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lone expert whose predictions cover its classes, and its data; the test file is sorted by label."""
    folder = tmp_path_factory.mktemp("order")
    expert: Any = BertForSequenceClassification.from_pretrained(bert_hub / "first").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(bert_hub / "base")
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, generator.integers(1, 9))) for _ in range(90)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expert.classifier.weight.mul_(20)
        expert.classifier.bias.sub_(expert(**batch).logits.mean(0))
        found = expert(**batch).logits.argmax(-1).tolist()
    assert len(set(found)) == 3
    expert.config.id2label, expert.config.label2id = dict(enumerate(NAMES)), {n: i for i, n in enumerate(NAMES)}
    expert.save_pretrained(folder / "expert")
    spelled = [DATA[1], DATA[2], DATA[0]]
    rows = sorted(zip((spelled[label] for label in found), texts, strict=True))
    (folder / "test.tsv").write_text("\n".join(["label\ttext", *map("\t".join, rows)]) + "\n")
    (folder / "train.tsv").write_text("\n".join(["text", *texts[:40]]) + "\n")  # no labels
    data = {"_target_": "epmq_cli.data.table.Table", "labels": DATA}
    data |= {split: str(folder / f"{split}.tsv") for split in ("train", "test")}
    task = {"expert": str(folder / "expert"), "max_length": 16, "data": data}
    write_suite(folder, {"family": "bert", "base": str(bert_hub / "base"), "tasks": {"films": task}})
    return folder


def measured(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    jsonschema.validate(found, schema())
    return found


def test_labels_are_matched_by_name_in_run_and_eval(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also calibrated on data without labels."""
    checkpoint = run_in(tmp_path / "run", hub, *PLAIN)
    found = measured(tmp_path / "run")
    assert found["scores"]["tasks"]["films"]["experts"] == found["scores"]["tasks"]["films"]["quantized"] == 1
    assert found["expert_checks"]["films"]["at_chance"] is False
    assert "task films: classes are matched by name: the data has blue film, red film" in capsys.readouterr().err
    assert json.loads((checkpoint / "epmq.json").read_text())["classes"] == {"films": NAMES}
    (tmp_path / "eval").mkdir()
    evaluate(eval_config(checkpoint), tmp_path / "eval", [])
    assert measured(tmp_path / "eval")["scores"]["tasks"]["films"] == {"quantized": 1}


def test_labels_can_be_matched_by_position_and_a_bad_expert_is_a_warning(
    hub: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By position every label is another class of the head, so all predictions are wrong."""
    run_in(tmp_path, hub, *PLAIN, "eval.stages=[experts]", "+suite.tasks.films.match_labels=position")
    assert measured(tmp_path)["scores"]["tasks"]["films"] == {"experts": 0}
    assert measured(tmp_path)["expert_checks"]["films"]["at_chance"] is True
    assert "task films: the expert scores 0.0 (accuracy in %) on 90 test samples, where chance is" in caplog.text


def test_no_test_data_are_needed_without_scores(hub: Path, tmp_path: Path) -> None:
    """The names of the head are still recorded, for `epmq eval`."""
    options = (*PLAIN, "eval.stages=[]", "suite.tasks.films.data.test=gone.tsv")
    checkpoint = run_in(tmp_path / "run", hub, *options)
    assert measured(tmp_path / "run")["scores"]["tasks"] == {}
    assert json.loads((checkpoint / "epmq.json").read_text())["classes"] == {"films": NAMES}
    with pytest.raises(DataError, match="gone.tsv is not a file"):
        evaluate(eval_config(checkpoint), tmp_path / "eval", [])


def expert(hub: Path, folder: Path, **settings: Any) -> str:
    """The override that names a copy of the expert with other settings in its config.json."""
    shutil.copytree(hub / "expert", folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return f"suite.tasks.films.expert={folder}"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {}}, DataError, "classes a, b, c and the data blue"),
        ({"label2id": {name: 2 - i for i, name in enumerate(NAMES)}}, ModelError, "contradicts its label2id"),
        ({"problem_type": "multi_label_classification"}, ModelError, "does not take multi-label heads"),
    ],
)
def test_experts_whose_labels_do_not_match_are_refused_first(
    settings: dict[str, Any], error: type[EpmqError], message: str, hub: Path, tmp_path: Path
) -> None:
    """The run writes nothing; it accepts the same expert if nothing is scored."""
    option = expert(hub, tmp_path / "expert", **settings)
    with pytest.raises(error, match=message):
        run_in(tmp_path / "run", hub, *PLAIN, option)
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert run_in(tmp_path / "other", hub, *PLAIN, option, "eval.stages=[]").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.labels=null", "data.regression=true"], "metric must be spearman or pearson if data.regression is true"),
        (["data.regression=true", "metric=matthews", "data.labels=null"], "got matthews, which compares classes"),
        (["metric=spearman"], "metric is spearman, which compares numbers, but the labels are classes"),
        (["data.label=null"], r"data.label is null, but accuracy needs labels; .*eval.stages=\[\]"),
        (["match_labels=names"], "match_labels must be one of name, position, got 'names'"),
    ],
)
def test_metrics_that_do_not_match_the_labels_are_refused_first(options: list[str], message: str, hub: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_job(config(hub, *(f"++suite.tasks.films.{option}" for option in options)))


def test_heads_with_one_output_need_numbers_not_classes(hub: Path, tmp_path: Path) -> None:
    """Cross-encoders have such heads for labels 0 and 1: accuracy is refused, spearman ranks them."""
    model: Any = BertForSequenceClassification.from_pretrained(
        hub / "expert", num_labels=1, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "expert")
    (tmp_path / "test.tsv").write_text("label\ttext\n0\tred\n1\tgood film\n1\tnot bad\n")
    options = [
        f"suite.tasks.films.expert={tmp_path / 'expert'}",
        f"suite.tasks.films.data.test={tmp_path / 'test.tsv'}",
    ]
    options += [*PLAIN, "eval.stages=[experts]", "suite.tasks.films.data.labels=null"]
    with pytest.raises(DataError, match=r"head has one output, a number, and the labels of the data are classes"):
        run_in(tmp_path / "a", hub, *options)
    ranked = ["+suite.tasks.films.data.regression=true", "+suite.tasks.films.metric=spearman"]
    run_in(tmp_path / "b", hub, *options, *ranked)
    assert measured(tmp_path / "b")["scores"]["metrics"] == {"films": "spearman"}
    with pytest.raises(DataError, match=r"labels of the data are numbers, and the expert's head has 3 outputs"):
        run_in(tmp_path / "c", hub, *options[1:], *ranked)


def test_run_and_eval_draw_the_same_test_samples(hub: Path, tmp_path: Path) -> None:
    """Each draw keeps the class shares of a file sorted by label, and eval uses the seed of the run."""
    job = make_job(config(hub, "seed=5"))
    task = job.suite.members[0]
    whole, drawn = task.data.load("test"), scored_tasks.evaluation_samples(task, 30, 5)
    shares = [samples.labels.bincount() / len(samples) for samples in (whole, drawn) if samples.labels is not None]
    torch.testing.assert_close(*shares, atol=1 / 30, rtol=0)
    assert list(drawn.inputs) != list(scored_tasks.evaluation_samples(task, 30, 6).inputs)
    seen: list[list[str]] = []
    real = scored_tasks.evaluation_samples

    def recorded(*given: Any) -> Any:
        seen.append(list(real(*given).inputs))
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scored_tasks, "evaluation_samples", recorded)
        checkpoint = run_in(tmp_path / "run", hub, *PLAIN, "seed=5", "eval.samples=30", "eval.stages=[quantized]")
        (tmp_path / "eval").mkdir()
        evaluate(eval_config(checkpoint, "eval.samples=30"), tmp_path / "eval", [])
    assert seen == [list(drawn.inputs)] * 2


def test_classes_of_prompts_are_matched_with_class_folders(clip_hub: Path, tmp_path: Path) -> None:
    """The shade of each picture is the position of its class in the suite."""
    classes = ("red", "blue", "green")
    for split in ("train", "test"):
        for position, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (position, 0, 0)).save(tmp_path / split / name / "a.png")
    for labels in (None, ["green", "red", "blue"]):
        data = ImageFolder(str(tmp_path / "train"), str(tmp_path / "test"), labels)
        task = Task("t", "expert", data, classes=classes, templates=("a {}",))
        head = {"weight": torch.eye(3)}
        data_of_clip = scored_tasks.EvaluationData(family_of("clip"), clip_hub / "base", None, 0)
        found = data_of_clip.scored_task(task, head, classes).samples
        assert found.labels is not None
        assert found.labels.tolist() == [image.getpixel((0, 0))[0] for image in found.inputs]
        assert found.classes == classes


def test_perplexity_needs_no_labels(tmp_path: Path) -> None:
    """The label column of the default config does not exist in the table."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)))
    task = Task("t", "expert", Table(*[str(tmp_path / "x.jsonl")] * 2), metric="perplexity")
    assert len(scored_tasks.evaluation_samples(task, None, 0)) == 9
    drawn = [list(scored_tasks.evaluation_samples(task, 4, seed).inputs) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(drawn[0]) != drawn[2]
