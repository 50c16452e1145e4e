"""Oracle: the outputs of transformers on an expert's folder, with the folder's tokenizer or image processor."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from epmq_cli.commands.eval import evaluate
from epmq_cli.errors import CheckpointError, DataError, ModelError
from epmq_cli.evaluate.score import Scorer
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline import task_processors as own
from epmq_cli.pipeline.job import make_job
from epmq_cli.store.manifest import file_problems
from tests.commands.test_merge import merged
from tests.conftest import WORDS
from tests.families.conftest import hub
from tests.helpers.edited import copied
from tests.helpers.hubs import config, eval_config, run_in
from tests.helpers.minihub import Hub
from tests.helpers.tiers import first

__all__ = ["hub"]
CPU = torch.device("cpu")
PIXELS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.7, 0.6, 0.5]}
TEXT_KINDS = ("bert", "roberta", "deberta", "distilbert")


def texts(seed: int) -> list[str]:
    """Words in upper case, which only a lower-casing tokenizer knows."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, 9))).upper() for _ in range(30)]


def unchanged(tokenizer: Any) -> None:
    pass


def tokenizer_of(base: Path, expert: Path, change: Callable[[Any], None], **options: Any) -> None:
    """Saves the base's tokenizer, changed, as the expert's own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, **options)
    change(tokenizer)
    tokenizer.save_pretrained(expert)


def lower(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def balance(model: Any, batch: Any, folder: Path) -> None:
    """Moves the classifier's bias so that every class is predicted."""
    (bias,) = (tensor for name, tensor in model.named_parameters() if name.endswith("bias") and tensor.shape == (3,))
    with torch.no_grad():
        bias -= model(**batch).logits.mean(0)
    model.save_pretrained(folder)


def text_hub(source: Path, folder: Path, change: Callable[[Any], None] = lower, **options: Any) -> Path:
    """A copy whose first expert has its own tokenizer and upper-case texts. Their labels are its predictions in
    transformers with that tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = copied(source, folder)
    tokenizer_of(found / "base", found / "first", change, **options)
    tokenizer = AutoTokenizer.from_pretrained(found / "first")
    model = AutoModelForSequenceClassification.from_pretrained(found / "first").eval()
    balance(model, tokenizer(texts(0), padding=True, return_tensors="pt"), found / "first")
    for seed, split in enumerate(("train", "test")):
        with torch.inference_mode():
            ids = tokenizer(texts(seed), padding=True, truncation=True, max_length=16, return_tensors="pt")
            labels = model(**ids).logits.argmax(-1).tolist()
        rows = [f"{label}\t{text}" for label, text in zip(labels, texts(seed), strict=True)]
        (found / f"first_{split}.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
    return found


def picture_hub(source: Path, folder: Path, labels_of: Callable[[Path, list[Any]], Tensor], **settings: Any) -> Path:
    """A copy whose first expert has its own image processor. The labels are its predictions in transformers with
    that processor."""
    from transformers import AutoImageProcessor

    found = copied(source, folder)
    processor = AutoImageProcessor.from_pretrained(found / "base")
    for name, value in settings.items():
        setattr(processor, name, value)
    processor.save_pretrained(found / "first")
    arrays = dict(np.load(found / "first.npz"))
    for split in ("test", "train"):
        pictures = [Image.fromarray(array) for array in arrays[f"{split}_images"]]
        arrays[f"{split}_labels"] = labels_of(found, pictures).numpy()
    np.savez(found / "first.npz", **arrays)
    return found


def vit_labels(found: Path, pictures: list[Any]) -> Tensor:
    from transformers import AutoImageProcessor, ViTForImageClassification

    batch = AutoImageProcessor.from_pretrained(found / "first")(images=pictures, return_tensors="pt")
    model = ViTForImageClassification.from_pretrained(found / "first").eval()
    if not (found / "balanced").is_file():  # only for the test split
        balance(model, batch, found / "first")
        (found / "balanced").touch()
    with torch.inference_mode():
        return model(**batch).logits.argmax(-1)


def clip_labels(found: Path, pictures: list[Any]) -> Tensor:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPVisionModel

    model = CLIPModel.from_pretrained(found / "base").eval()
    model.vision_model = CLIPVisionModel.from_pretrained(found / "first").eval()
    words = ["a photo of a red", "a photo of a blue", "a photo of a green"]
    batch = AutoTokenizer.from_pretrained(found / "base")(words, padding=True, return_tensors="pt")
    batch |= AutoImageProcessor.from_pretrained(found / "first")(images=pictures, return_tensors="pt")
    with torch.inference_mode():
        texts, images = model.get_text_features(input_ids=batch["input_ids"]), None
        pooled = model.vision_model(pixel_values=batch["pixel_values"]).pooler_output
        images = model.visual_projection(pooled)
        return (images @ torch.nn.functional.normalize(texts.pooler_output, dim=-1).T).argmax(-1)


def expert_score(found: Path, *overrides: str) -> float:
    """The first expert's score on its task."""
    job = make_job(config(found, *overrides))
    models, model, _ = steps.open_models(job)
    processors = own.task_processors(
        job.family, models, job.suite.members, own.calibration_samples(job.seed, job.family, job.calib)
    )
    task = steps.prepare_tasks(job, model, models, processors)[0]
    copy_into(model, models.source.model("first"))
    return Scorer(job.evaluation, job.family, CPU).score(model, task).value


def own_processors(found: Path, *overrides: str) -> dict[str, Any]:
    """The tasks that use their expert's own processor."""
    job = make_job(config(found, *overrides))
    models, _, _ = steps.open_models(job)
    return own.task_processors(
        job.family, models, job.suite.members, own.calibration_samples(job.seed, job.family, job.calib)
    )


@pytest.mark.parametrize("kind", first(1, TEXT_KINDS))
def test_an_expert_with_its_own_tokenizer_scores_as_in_transformers(
    kind: str, hub: Hub, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = request.getfixturevalue("bert_hub") if kind == "bert" else hub(kind)
    own_case = (unchanged, {"do_lower_case": False}) if kind == "bert" else (lower, {})
    found = text_hub(source, tmp_path / "hub", own_case[0], **own_case[1])
    with caplog.at_level(logging.INFO, "epmq"):
        assert expert_score(found) == 1
    assert "expert of task first: its own tokenizer reads '" in caplog.text
    assert "epmq uses it for its task and saves it in processors/first of the checkpoint" in caplog.text
    assert list(own_processors(found)) == ["first"]
    caplog.clear()
    assert own_processors(found, "++suite.processor=base") == {}
    assert "suite.processor=base reads its task with the base's" in caplog.text
    assert expert_score(found, "++suite.processor=base") < 1
    with pytest.raises(ModelError, match=r"expert of task first .*: its own tokenizer reads '.*' as \[.*\], and the"):
        own_processors(found, "++suite.processor=same")


@pytest.mark.parametrize("kind", first(1, ["clip", "vit"]))
def test_an_expert_with_its_own_image_processor_scores_as_in_transformers(
    kind: str, hub: Hub, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor

    source = request.getfixturevalue("clip_hub") if kind == "clip" else hub(kind)
    found = picture_hub(source, tmp_path / "hub", clip_labels if kind == "clip" else vit_labels, **PIXELS)
    one = () if kind == "vit" else ("suite.tasks.first.templates=['a photo of a {}']",)
    assert expert_score(found, *one) == 1
    assert list(own_processors(found)) == ["first"]
    message = r"\(preprocessor_config.json\) has image_mean \[0.1, 0.2, 0.3\] where the base's has \[0\.\d+, "
    with pytest.raises(ModelError, match=message):
        own_processors(found, "++suite.tasks.first.processor=same")
    assert own_processors(found, "++suite.each.processor=base") == {}
    assert kind == "clip" or expert_score(found, "++suite.processor=base") < 1
    pictures = [Image.fromarray(array) for array in np.load(found / "first.npz")["test_images"]]
    job = make_job(config(found))
    made = job.family.collate(found / "base", job.suite.members[0], own_processors(found)["first"])(pictures)[
        "pixel_values"
    ]
    wanted = AutoImageProcessor.from_pretrained(found / "first")(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("kind", first(1, ["llama", "t5"]))
def test_prompts_and_running_text_use_the_experts_own_tokenizer(kind: str, hub: Hub, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = copied(hub(kind), tmp_path / "hub")
    tokenizer_of(found / "base", found / "first", lower)
    for seed, split in enumerate(("train", "test")):
        rows = [f"0\t{text}" for text in texts(seed)]
        (found / f"first_{split}.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
        (found / f"first_{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(seed)))
    job = make_job(config(found))
    models, model, _ = steps.open_models(job)
    processors = own_processors(found)
    assert list(processors) == ["first"]
    task = steps.prepare_tasks(job, model, models, processors)[0]
    tokenizer = AutoTokenizer.from_pretrained(found / "first")
    drawn = steps.calibration_batches(job, models.base.path, processors)["first"]
    assert not torch.any(torch.cat([batch["input_ids"].flatten() for batch in drawn]) == tokenizer.unk_token_id)
    if kind == "llama":
        wanted = tokenizer("\n\n".join(texts(1)), return_tensors="pt")["input_ids"][0]
        assert torch.equal(task.samples.inputs[0], wanted)
    else:
        batch = task.collate(texts(1))
        assert torch.equal(batch["input_ids"], tokenizer(texts(1), padding=True, return_tensors="pt")["input_ids"])


def test_equivalent_processors_count_as_one_despite_different_files(
    hub: Hub, clip_hub: Path, bert_hub: Path, tmp_path: Path
) -> None:
    from transformers import CLIPImageProcessorPil

    pictures = copied(clip_hub, tmp_path / "clip")
    CLIPImageProcessorPil.from_pretrained(pictures / "base").save_pretrained(pictures / "first")
    assert (pictures / "first" / "preprocessor_config.json").is_file()
    assert own_processors(pictures, "++suite.processor=same") == {}
    words = copied(bert_hub, tmp_path / "bert")
    tokenizer_of(words / "base", words / "first", unchanged)
    path = words / "first" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    assert own_processors(words, "++suite.processor=same") == {}


def test_a_checkpoint_stores_the_experts_processor_and_is_scored_with_it(hub: Hub, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = text_hub(hub("roberta"), tmp_path / "hub")
    checkpoint = run_in(tmp_path / "run", found, "eval.stages=[experts,quantized]")
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())["scores"]["tasks"]
    assert scores["first"]["experts"] == 1
    ids = [AutoTokenizer.from_pretrained(path)(texts(1))["input_ids"] for path in (found / "first", saved(checkpoint))]
    assert ids[0] == ids[1]
    assert json.loads((checkpoint / "epmq.json").read_text())["processors"] == ["first"]
    assert "- first: `processors/first`" in (checkpoint / "README.md").read_text()
    assert file_problems(checkpoint) == []
    evaluate(eval_config(checkpoint), new_folder(tmp_path, "again"), [])
    assert scores["first"]["quantized"] == eval_score(tmp_path / "again")
    (saved(checkpoint) / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert file_problems(checkpoint) == ["processors/first/tokenizer.json is missing"]
    for file in saved(checkpoint).iterdir():
        file.unlink()
    saved(checkpoint).rmdir()
    with pytest.raises(CheckpointError, match="processors/first, the processor of task first, is missing"):
        evaluate(eval_config(checkpoint), new_folder(tmp_path, "gone"), [])


def saved(checkpoint: Path) -> Path:
    return checkpoint / "processors" / "first"


def new_folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def eval_score(folder: Path) -> float:
    found: float = json.loads((folder / "metrics.json").read_text())["scores"]["tasks"]["first"]["quantized"]
    return found


def test_a_run_with_equal_processors_stores_none(bert_hub: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path / "run", bert_hub, "eval.stages=[]")
    assert not (checkpoint / "processors").exists()
    assert "processors" not in json.loads((checkpoint / "epmq.json").read_text())


def test_a_merge_compares_processors_without_data_and_stores_the_experts(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    found = copied(hub("llama"), tmp_path / "hub")
    tokenizer_of(found / "base", found / "first", lower)
    for file in found.glob("*.jsonl"):
        file.unlink()
    checkpoint = merged(found, tmp_path / "run", "merge=average")
    assert AutoTokenizer.from_pretrained(saved(checkpoint))("RED")["input_ids"] == [1, 5]
    assert file_problems(checkpoint) == []
    with pytest.raises(ModelError, match="its own tokenizer reads '"):
        merged(found, tmp_path / "same", "merge=average", "++suite.processor=same")
    plain = merged(found, tmp_path / "base", "merge=average", "++suite.processor=base")
    assert not (plain / "processors").exists()
    assert "suite.processor=base reads its task with the base's" in caplog.text


def test_without_a_base_tokenizer_each_task_uses_its_experts(hub: Hub, tmp_path: Path) -> None:
    found = text_hub(hub("roberta"), tmp_path / "hub")
    tokenizer_of(found / "base", found / "second", unchanged)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (found / "base" / name).unlink()
    assert list(own_processors(found)) == ["first", "second"]
    assert expert_score(found) == 1
    with pytest.raises(ModelError, match="has no tokenizer, but expert of task first has one; add the base"):
        own_processors(found, "++suite.processor=base")


def test_an_image_processor_that_does_not_fit_the_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    found = picture_hub(hub("vit"), tmp_path / "hub", lambda _, pictures: torch.zeros(len(pictures)).long())
    path = found / "first" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"height": 32, "width": 32}}))
    with pytest.raises(ModelError, match=r"makes images of \[3, 32, 32\], and the model reads \[3, 16, 16\].*=base"):
        own_processors(found)
    assert own_processors(found, "++suite.processor=base") == {}


def test_if_the_bases_processor_fails_the_experts_is_used(hub: Hub, tmp_path: Path) -> None:
    found = picture_hub(hub("vit"), tmp_path / "hub", lambda _, pictures: torch.zeros(len(pictures)).long())
    path = found / "base" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"height": 32, "width": 32}}))
    assert list(own_processors(found)) == ["first"]
    with pytest.raises(ModelError, match=r"reads the task's samples, which the base's does not \(.*\[3, 32, 32\]"):
        own_processors(found, "++suite.processor=same")


@pytest.mark.parametrize(("task", "name"), [("a", "a"), ("glue/cola", "glue%2Fcola"), ("..", "%2E."), (".x", "%2Ex")])
def test_the_folder_of_a_task_stays_in_the_checkpoint_and_is_visible(task: str, name: str) -> None:
    assert own.place(task) == f"processors/{name}"


def test_cached_scores_of_another_processor_are_not_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    found = text_hub(hub("distilbert"), tmp_path / "hub")
    options = ("cache=1MB", "guidance=merged", "quant=rtn", "calib.samples=8", "eval.stages=[base,experts]")
    run_in(tmp_path / "base", found, *options, "++suite.processor=base")
    run_in(tmp_path / "own", found, *options)
    base, expert = (
        json.loads((tmp_path / name / "metrics.json").read_text())["scores"]["tasks"] for name in ("base", "own")
    )
    assert base["first"]["experts"] < expert["first"]["experts"] == 1
    assert base["second"] == expert["second"]


def test_an_experts_added_tokens_are_rows_of_the_padded_tables(hub: Hub, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = copied(hub("llama"), tmp_path / "hub")
    tokenizer_of(found / "base", found / "first", lambda tokenizer: tokenizer.add_tokens(["purple"]))
    model = AutoModelForCausalLM.from_pretrained(found / "first")
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 1, mean_resizing=False)
    model.save_pretrained(found / "first")
    for split in ("train", "test"):
        lines = [json.dumps({"text": f"a purple {text.lower()}"}) + "\n" for text in texts(0)]
        (found / f"first_{split}.jsonl").write_text("".join(lines))
    job = make_job(config(found, "++suite.vocabulary=pad"))
    models, base, _ = steps.open_models(job)
    processors = own_processors(found, "++suite.vocabulary=pad")
    task = steps.prepare_tasks(job, base, models, processors)[0]
    assert int(task.samples.inputs[0].max()) == rows
    assert Scorer(job.evaluation, job.family, CPU).score(base, task).value > 0


def test_an_adapters_folder_can_have_its_own_tokenizer(hub: Hub, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    found = copied(hub("llama"), tmp_path / "hub")
    adapter = tmp_path / "adapter"
    tokenizer_of(found / "base", adapter, lower)
    options = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(options))
    where = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {f"{where}.lora_A.weight": torch.ones(1, 32), f"{where}.lora_B.weight": torch.ones(32, 1)}
    save_file(parts, adapter / "adapter_model.safetensors")
    (found / "first_train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(0)))
    processors = own_processors(found, f"suite.tasks.first.expert={adapter}")
    assert processors["first"].folder == adapter


def test_an_open_clip_folder_configures_its_image_processor(clip_hub: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoImageProcessor

    from epmq_cli.models.open_clip.convert import own_processor

    clip, folder = AutoConfig.from_pretrained(clip_hub / "base"), tmp_path / "expert"
    folder.mkdir()
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}))
    made = own_processor(folder, clip, "expert")
    assert made is not None
    assert list(AutoImageProcessor.from_pretrained(made).image_mean) == [0.1, 0.2, 0.3]
    assert own_processor(folder, clip, "expert") == made
    path.write_text(json.dumps({"model_cfg": {}}))
    assert own_processor(folder, clip, "expert") is None
    path.write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": {"resize_mode": "longest"}}))
    with pytest.raises(ModelError, match="describes no image processor of transformers .*resize_mode is 'longest'"):
        own_processor(folder, clip, "expert")


@pytest.mark.parametrize("kind", first(1, TEXT_KINDS))
def test_heads_read_the_first_token_of_left_padded_texts(
    kind: str, hub: Hub, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Oracle: texts one by one in transformers, without padding; also for a tokenizer without a padding token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = text_hub(request.getfixturevalue("bert_hub") if kind == "bert" else hub(kind), tmp_path / "hub")
    tokenizer = AutoTokenizer.from_pretrained(found / "first")
    model = AutoModelForSequenceClassification.from_pretrained(found / "first").eval()
    with torch.inference_mode():
        labels = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts(1)]
    rows = [f"{label}\t{text}\n" for label, text in zip(labels, texts(1), strict=True)]
    (found / "first_test.tsv").write_text("".join(["label\ttext\n", *rows]))
    path = found / "first" / "tokenizer_config.json"
    for change in ({"padding_side": "left"}, {"pad_token": None}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert expert_score(found) == 1


def test_tokenizers_that_differ_only_on_test_texts_are_distinguished(hub: Hub, tmp_path: Path) -> None:
    found = text_hub(hub("roberta"), tmp_path / "hub")
    train = found / "first_train.tsv"
    train.write_text(train.read_text().lower())
    assert list(own_processors(found)) == ["first"]
    assert expert_score(found) == 1


def test_image_processors_that_differ_only_in_resampling_are_distinguished(hub: Hub, tmp_path: Path) -> None:
    """Pictures of the model's own size do not show the difference; a processor that does not resize is not tested on
    others."""
    for number, (settings, names) in enumerate((({"resample": 0}, ["first"]), ({"do_resize": False}, []))):
        found = picture_hub(
            hub("vit"), tmp_path / str(number), lambda _, some: torch.zeros(len(some)).long(), **settings
        )
        assert list(own_processors(found)) == names


TEMPLATE = "{% for each in messages %}{{ each['content'] }} </s> {% endfor %}"
MESSAGES = "+suite.tasks.first.data.text=messages"


def chat_hub(source: Path, folder: Path, **templates: str | None) -> Path:
    """A copy whose first task has conversations, and whose tokenizers differ only in their chat templates."""

    def templated(template: str | None) -> Callable[[Any], None]:
        return lambda tokenizer: setattr(tokenizer, "chat_template", template)

    found = copied(source, folder)
    for name, template in templates.items():
        tokenizer_of(source / "base", found / name, templated(template))
    for split in ("train", "test"):
        rows = [{"messages": [{"role": "user", "content": text.lower()}]} for text in texts(0)]
        (found / f"first_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def chat_tokens(found: Path, *overrides: str) -> list[int]:
    """The tokens of the first task's conversations."""
    job = make_job(config(found, MESSAGES, *overrides))
    models, model, _ = steps.open_models(job)
    processors = own.task_processors(
        job.family, models, job.suite.members, own.calibration_samples(job.seed, job.family, job.calib)
    )
    ids: list[int] = steps.prepare_tasks(job, model, models, processors)[0].samples.inputs[0].tolist()
    return ids


def test_conversations_use_the_template_of_the_expert(hub: Hub, tmp_path: Path) -> None:
    """Also if the base has none, like a model without instruction tuning; if the expert has none, that of the base
    is used."""
    from transformers import AutoTokenizer

    other = TEMPLATE.replace("</s>", "<mask>")
    for number, (templates, wanted, names) in enumerate(
        (
            ({"base": TEMPLATE, "first": other}, other, ["first"]),
            ({"base": None, "first": other}, other, ["first"]),
            ({"base": TEMPLATE, "first": None}, TEMPLATE, []),
        )
    ):
        found = chat_hub(hub("llama"), tmp_path / str(number), **templates)
        assert list(own_processors(found, MESSAGES)) == names
        tokenizer = AutoTokenizer.from_pretrained(hub("llama") / "base")
        chats = [[{"role": "user", "content": text.lower()}] for text in texts(0)]
        rendered = [tokenizer.apply_chat_template(chat, chat_template=wanted, tokenize=False) for chat in chats]
        ids = [number for text in rendered for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert chat_tokens(found) == ids


def test_a_conversation_without_any_template_is_refused(hub: Hub, tmp_path: Path) -> None:
    found = chat_hub(hub("llama"), tmp_path / "hub", base=None, first=None)
    with pytest.raises(DataError, match=r"has no chat template to write it with; put a chat_template.jinja there"):
        chat_tokens(found)
    with pytest.raises(ModelError, match="reads the task's samples, which the base's does not"):
        own_processors(
            chat_hub(hub("llama"), tmp_path / "b", base=None, first=TEMPLATE), MESSAGES, "++suite.processor=same"
        )
