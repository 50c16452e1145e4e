"""Checks of a config's options against each other, before any model is opened."""

from __future__ import annotations

from collections.abc import Sequence

from epmq_cli.calibrate.guidance import AUTO, Guidance
from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.config.instantiate import option_name
from epmq_cli.config.schema import GENERATE, Calib, Evaluation, Harness
from epmq_cli.config.validate import check_choice
from epmq_cli.data.ranking import RANKINGS
from epmq_cli.data.suite import TEXT_METRICS, Suite, Task
from epmq_cli.errors import ConfigError
from epmq_cli.evaluate.metrics import CORRELATIONS, PERPLEXITY
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.merge.method import MergeMethod, method_name
from epmq_cli.merge.slices import sliced
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.formats.names import labels
from epmq_cli.quantize.gptaq import Gptaq
from epmq_cli.quantize.mixed_precision import MixedPrecision, first_of, formats_of, transforms
from epmq_cli.quantize.quantizer import Quantizer
from epmq_cli.refine.distill import Distill
from epmq_cli.refine.none import NoRefinement
from epmq_cli.report.numbers import LOWER_IS_BETTER


def check_gradients(method: MergeMethod, family: Family) -> None:
    """Raises ConfigError if a merge method needs gradients of class probabilities and the family has no heads."""
    if "gradients" in method.needs and family.heads == "none":
        raise ConfigError(
            f"merge={method_name(method)} needs gradients of the heads' class probabilities, but models of "
            f"family {family.name} have no heads; use another merge method"
        )


def check_refinement(
    refinement: Distill | NoRefinement, merge: MergeMethod, calib: Calib, formats: Sequence[NumberFormat]
) -> None:
    """Raises ConfigError if a refinement does not fit the rest of the config."""
    if isinstance(refinement, NoRefinement):
        return
    if calib.student != "memory":
        raise ConfigError(
            f"refine=distill trains the model in memory, got calib.student={calib.student}; use calib.student=memory"
        )
    if sliced(merge):
        raise ConfigError(
            "refine=distill needs experts with the layers of the result, which merge.slices changes; use refine=none"
        )
    coarse = [format.name for format in formats if format.scale_bits is not None or format.row_block > 1]
    if refinement.packed_epochs and coarse:
        raise ConfigError(
            f"refine.packed_epochs trains integers or scales, but quant.format={coarse[0]} has coarse or shared scales"
            "; use refine.packed_epochs=0, or quant.format=int or fp8"
        )
    other = [format.name for format in formats if not isinstance(format, IntFormat)]
    if refinement.packed_epochs and refinement.packed == "codes" and other:
        raise ConfigError(
            f"refine.packed=codes trains integers, got quant.format={other[0]}; use quant.format=int, or "
            "refine.packed=scales"
        )


def check_kv_cache(kv_cache: str | None, family: Family, exporter: Exporter, formats: Sequence[NumberFormat]) -> None:
    """Raises ConfigError if scales of cached keys and values are asked for and cannot be measured or stored."""
    if kv_cache is None:
        return
    if not family.caches:
        raise ConfigError(
            f"quant.kv_cache={kv_cache} is for decoders, got models of family {family.name}; use quant.kv_cache=null"
        )
    if not exporter.cache_config:
        raise ConfigError(
            f"pack={option_name('pack', type(exporter))} stores no scales of cached keys and values, got "
            f"quant.kv_cache={kv_cache}; use pack=compressed_tensors, or quant.kv_cache=null"
        )
    if len(formats) > 1:
        raise ConfigError(
            f"quant.kv_cache={kv_cache} takes one number format, because transformers rounds cached keys and values of "
            f"checkpoints with several, got {' and '.join(labels(formats))}; use quant.kv_cache=null"
        )


def check_block_refinement(quantizer: Quantizer | MixedPrecision) -> None:
    """Raises ConfigError if a quantizer's weights are not integers in the layer's own channels."""
    name = option_name("quant", type(first_of(quantizer)))
    formats = formats_of(quantizer)
    if not formats:
        raise ConfigError(
            f"refine=blocks refines quantized weights, got quant={name}, which leaves them dense; use another quant, "
            "or refine=distill"
        )
    if transforms(quantizer):
        raise ConfigError(
            f"refine=blocks does not work with quant={name}, which scales input channels; use quant=gptq, rtn or hqq"
        )
    for format in formats:
        if not isinstance(format, IntFormat):
            raise ConfigError(f"refine=blocks rounds to integers, got quant.format={format.name}; use quant.format=int")


def check_targets(quantizer: Quantizer | MixedPrecision, guidance: Guidance) -> None:
    """Raises ConfigError if a quantizer needs targets that the guidance does not give."""
    if isinstance(first_of(quantizer), Gptaq) and guidance.alpha == 0:
        raise ConfigError(
            "quant=gptaq fits layers to a teacher's own activations, got guidance.alpha=0, which does not read them; "
            "use guidance=gptaq, or quant=gptq"
        )


def check_slices(method: MergeMethod, guidance: Guidance) -> None:
    """Raises ConfigError if a merge changes the layers and the guidance compares them with those of other models."""
    options: dict[str, float | str] = dict.fromkeys(guidance.open, AUTO)
    options |= {"targets": guidance.targets} if guidance.targets != "merged" else {}
    options |= {"rho": guidance.rho} if guidance.rho != 1 else {}
    if sliced(method) and options:
        name, value = options.popitem()
        raise ConfigError(
            f"merge={method_name(method)} with merge.slices changes the layers of the model, but "
            f"guidance.{name}={value} needs a base and experts with the same layers; use guidance=merged, or epmq merge"
        )


def check_transform(transform: object, method: MergeMethod) -> None:
    """Raises ConfigError if `transform` is unknown, or a merge changes the layers that it rotates."""
    check_choice("transform", transform, ("none", "hadamard"))
    if transform != "none" and sliced(method):
        raise ConfigError(
            f"merge={method_name(method)} with merge.slices changes the layers of the model, which "
            f"transform={transform} does not rotate; use transform=none, or merge with epmq merge first"
        )


def check_generation(calib: Calib, family: Family) -> None:
    """Raises ConfigError if the experts shall write the calibration text and cannot."""
    if calib.source == GENERATE and not isinstance(family.tasks, LanguageModel):
        raise ConfigError(
            f"calib.source={GENERATE} lets language models write text, got models of family {family.name}; use "
            "calib.source=data"
        )


def check_prompts(guidance: Guidance, calib: Calib, family: Family) -> None:
    """Raises ConfigError if prompts shall weigh less than answers and there are none."""
    if guidance.prompt_weight != 1 and (calib.source == GENERATE or not isinstance(family.tasks, LanguageModel)):
        raise ConfigError(
            f"guidance.prompt_weight={guidance.prompt_weight:g} needs language models and data with conversations, got "
            f"models of family {family.name} and calib.source={calib.source}; leave it at 1"
        )


def check_scoring(suite: Suite, family: Family, evaluation: Evaluation, scored: bool) -> None:
    """Raises ConfigError if the tasks or the evaluation cannot score models of the family. `scored`: whether tasks are
    scored on their test samples."""
    kinds = sorted(set(suite.metrics.values()))
    falling = [kind for kind in kinds if kind in LOWER_IS_BETTER]
    if falling and len(kinds) > 1:
        raise ConfigError(
            f"suite.tasks must all have the metric {falling[0]} if one has, because smaller is better and averages are "
            f"over all tasks, got {', '.join(kinds)}; use {falling[0]} for all or for none, and score the checkpoint "
            "by the other metric with epmq eval and a second suite"
        )
    for task in suite.members:
        check_choice(f"suite.tasks.{task.name}.metric", task.metric, family.metrics)
        family.check_task(task)
        check_metric(task, scored, answered=isinstance(family.tasks, LanguageModel))
        if task.assistant_only_loss and not isinstance(family.tasks, LanguageModel):
            raise ConfigError(
                f"suite.tasks.{task.name}.assistant_only_loss is for decoders, which read questions and answers as one "
                f"text, got models of family {family.name}; leave it out"
            )
        if task.heads == "expert" and family.heads == "none":
            raise ConfigError(
                f"suite.tasks.{task.name}.heads must be base because models of family {family.name} have no heads, got "
                f"{task.heads!r}"
            )
    if isinstance(evaluation, Harness) and not isinstance(family.tasks, LanguageModel):
        raise ConfigError(
            f"eval=lm_eval scores language models only, got models of family {suite.family}; use eval=default"
        )


def check_no_server(evaluation: Evaluation) -> None:
    """Raises ConfigError if a run shall score what a server answers."""
    if isinstance(evaluation, Harness) and evaluation.server is not None:
        raise ConfigError(
            "eval.server is an option of epmq eval, because the checkpoint that a server loads exists only after the "
            "run; run without it, start a server of the checkpoint, then start epmq eval"
        )


def check_metric(task: Task, scored: bool, answered: bool) -> None:
    """Raises ConfigError if a task's metric does not suit the labels that its data declares. `answered`: whether its
    data may be conversations that hold the answers."""
    where, regression = f"suite.tasks.{task.name}", getattr(task.data, "regression", None)
    if task.metric in (PERPLEXITY, *RANKINGS):
        return
    written, answer = task.metric in TEXT_METRICS, getattr(task.data, "answer", ...)
    if written and scored and answer is None and not answered:
        raise ConfigError(
            f"{where}.metric is {task.metric}, which compares answers with texts; name their column in data.answer"
        )
    if written:
        return
    if isinstance(answer, str):
        raise ConfigError(
            f"{where}.data.answer is {answer}, a column of texts, and {task.metric} compares classes or numbers; use "
            f"metric: {' or '.join(TEXT_METRICS)}, or leave out data.answer"
        )
    if regression is True and task.metric not in CORRELATIONS:
        raise ConfigError(
            f"{where}.metric must be spearman or pearson if data.regression is true, got {task.metric}, which compares "
            "classes; if the labels are classes, set data.regression: false"
        )
    if regression is False and task.metric in CORRELATIONS:
        raise ConfigError(
            f"{where}.metric is {task.metric}, which compares numbers, but the labels are classes because "
            "data.regression is false; set data.regression: true or metric: accuracy"
        )
    if scored and getattr(task.data, "label", "") is None:
        raise ConfigError(
            f"{where}.data.label is null, but {task.metric} needs labels; set it to the column of the labels, or set "
            "eval.stages=[] to merge and calibrate without scoring"
        )
