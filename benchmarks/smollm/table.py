"""Measures the suite smollm3: perplexities, exact answers to arithmetic, and the KL divergence from each expert.

    python benchmarks/smollm/table.py
    python benchmarks/smollm/table.py --merges task_arithmetic --rows "merge, dense" GPTQ --seeds 0

Needs the models of lora.py. Rows are those of quality.py, in 4 bits and groups of 64; merges other than the first are
measured dense, and random ones with every seed. Test samples are the same for all seeds, and calibration does not see
them. The loss of the arithmetic expert counted answers only, and so do its perplexity and KL divergence, which are of
READ questions; the last two columns are over whole conversations. Results under --out are reused.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quality import ROWS, Session, values

from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.evaluate.metrics import PERPLEXITY, average
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.models.fast_linears import fast_linears
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps
from epmq_cli.pipeline.agreement import Agreement
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import Job
from epmq_cli.pipeline.scored_tasks import EvaluationData

ASKED, READ, QUESTIONS, LENGTH = "arithmetic", 96, 256, 8
"""The task that is also scored by exact answers, its test questions for perplexity and KL divergence and for exact
answers, and the most tokens of an answer."""
RANDOM = ("dare_linear", "dare_ties", "della")
DENSE = "merge, dense"
BITS = "4"


class Answers(Session):
    """The suite with the outputs of its experts."""

    def load(self, job: Job) -> None:
        """Reads models and tasks, scores base and experts, and runs the experts on test samples."""
        self.models, self.model, self.dtype = steps.open_models(job)
        self.tasks = steps.prepare_tasks(job, self.model, self.models)
        place = [task.name for task in self.tasks].index(ASKED)
        self.tasks[place] = self._asked(job, READ)
        self.questions = self._asked(job, QUESTIONS, metric="exact_match", answer_length=LENGTH)
        self.whole = self._asked(job, job.evaluation.samples, assistant_only_loss=False)
        context, source = RunContext.of(job), self.models.source
        self.agreement = Agreement.of(context, self.model, self.tasks, source)
        self.agreement_of_whole = Agreement.of(context, self.model, [self.whole], source)
        if not {"base", "experts"} <= self.known.keys():
            copy_into(self.model, ((name, source.base(name)) for name in source.names))
            scores = steps.score_parts(context, self.model, self.models, self.tasks)
            copy_into(self.model, source.model(ASKED))
            self.keep("experts", {"tasks": values(scores["experts"]), **self._answers(context)})
            copy_into(self.model, ((name, source.base(name)) for name in source.names))
            self.keep("base", {"tasks": values(scores["base"]), **self.further(context)})
        self.loaded = True

    def further(self, context: RunContext) -> dict[str, Any]:
        """Returns what `_answers` returns, and the KL divergences from the experts: of the tasks, and over whole
        conversations."""
        self.agreement.measure("quantized", self.tasks)
        self.agreement_of_whole.measure("quantized", [self.whole])
        kl, whole = (dict(found.stages["quantized"]) for found in (self.agreement, self.agreement_of_whole))
        return {**self._answers(context), "kl": kl, "kl of whole": whole[ASKED]}

    def _answers(self, context: RunContext) -> dict[str, float]:
        """Returns the model's share of exact answers, and its perplexity over whole conversations."""
        asked = {"exact": self.questions, "whole": self.whole}
        with fast_linears(self.model):
            return {name: context.scorer.score(self.model, task).value for name, task in asked.items()}

    def _asked(self, job: Job, count: int | None, **changed: Any) -> ScoredTask:
        """Returns the task ASKED with some options changed, and so many test samples."""
        task = next(task for task in job.suite.members if task.name == ASKED)
        data = EvaluationData(job.family, self.models.base.path, count, 0)
        return data.scored_task(replace(task, **changed), {}, None)


def line(name: str, tasks: list[str], entry: dict[str, Any]) -> str:
    """A row of the table."""
    own = [entry["tasks"][task] for task in tasks]
    cells = [*(f"{value:.2f}" for value in own), f"{average(own, PERPLEXITY):.2f}", f"{100 * entry['exact']:.1f}"]
    if "kl" in entry:
        parts = [entry["kl"][task]["kl"] for task in tasks]
        cells += [*(f"{part:.4f}" for part in parts), f"{sum(parts) / len(parts):.4f}"]
        cells += [f"{entry['whole']:.2f}", f"{entry['kl of whole']['kl']:.4f}"]
    else:
        cells += [""] * (len(own) + 1) + [f"{entry['whole']:.2f}", ""]
    return f"| {name} | " + " | ".join(cells) + " |"


def table(session: Answers, arguments: argparse.Namespace) -> None:
    """Measures missing results and prints a Markdown table."""
    lines = {}
    for seed in arguments.seeds:
        for merge in arguments.merges:
            rows = arguments.rows if merge == arguments.merges[0] else [DENSE]
            for row in rows:
                if row == DENSE and merge not in RANDOM and seed != arguments.seeds[0]:
                    continue
                name = f"{merge}, dense" if row == DENSE else row
                lines[f"{name}, seed {seed}"] = session.measure(row, merge, BITS, seed)
    tasks = list(session.known["experts"]["tasks"])
    lines = {"base": session.known["base"], **lines, "experts": session.known["experts"]}
    heads = [*tasks, "geometric mean", "exact, %", *(f"KL, {task}" for task in tasks), "mean KL", "whole", "KL, whole"]
    print("| | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
    for name, entry in lines.items():
        print(line(name, tasks, entry))


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm3/quality"))
    parser.add_argument("--merges", nargs="+", default=["task_arithmetic", "ties", "dare_ties"])
    parser.add_argument("--rows", nargs="+", default=[DENSE, "GPTQ", "E-PMQ", "+ safe = feature"], choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    small = ["calib.samples=16", "calib.batch_size=8", "eval.batch_size=8", "eval.samples=32"]
    parser.add_argument("--overrides", nargs="*", default=small, help="further overrides of every run")
    arguments = parser.parse_args()
    arguments.suite, arguments.config_dir = "smollm3", Path(__file__).parent / "configs"
    quiet_libraries()
    with torch.no_grad():
        table(Answers(arguments), arguments)


if __name__ == "__main__":
    main()
