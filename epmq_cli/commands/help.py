"""`epmq run --help`, also for merge and eval: the options with the comments of their YAML files."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from epmq_cli.config.files import conf_dir, options

WIDTH = 120
EXAMPLES = {
    "run": """usage: epmq run [group=option ...] [key.name=value ...] [-m] [--config-dir FOLDER]

Merges the experts of a suite, calibrates towards them, quantizes, packs and scores.

examples
  epmq run                                          the built-in suite, offline
  epmq run merge=ties quant=gptq bits=4             other methods
  epmq run guidance.lam=0.01 calib.samples=512      any value below
  epmq run -m merge=ties,task_arithmetic bits=3,4   a sweep: every combination
  epmq run experiment=b32_ta8_epmq                  a published result again
  epmq run --config-dir my_configs suite=mine       a suite of your own (docs/suites.md)
  epmq run --plan merge=ties                        memory, disk, time and refusals of a run, without it
  epmq run --cfg job merge=ties                     show the config of a run and stop
""",
    "merge": """usage: epmq merge [group=option ...] [key.name=value ...] [-m] [--config-dir FOLDER]

Merges the experts of a suite into a dense model, from disk to disk, tensor by tensor.

examples
  epmq merge suite=flan_t5_base_glue merge=ties
  epmq merge --config-dir my_configs suite=mine merge=average pack.dtype=bfloat16
""",
    "eval": """usage: epmq eval CHECKPOINT [key.name=value ...] [-m] [--config-dir FOLDER]

Scores a checkpoint, which transformers loads from disk, on the tasks of its suite.

examples
  epmq eval runs/NAME/checkpoint
  epmq eval runs/NAME/checkpoint device=cpu eval.batch_size=8 eval.samples=100
  epmq eval runs/NAME/checkpoint --config-dir my_configs suite=mine   the same tasks, data elsewhere
""",
}
TAIL = """
-m, --multirun: a sweep of comma-separated values. --cfg job: show the config. --hydra-help: Hydra's options.
--quiet: print warnings and errors only. progress=json: progress as JSON lines on stderr. --debug: print tracebacks.
--config-dir adds options and replaces none: a shipped name always means the shipped thing.
"""


def show(command: str, arguments: list[str]) -> None:
    """Prints the help of a command: the options of the default of each group, or of those that the arguments choose."""
    primary = conf_dir() / f"{command}.yaml"
    defaults = dict(
        line.strip(" -").split(": ") for line in _part(primary, "defaults:", "\n\n").splitlines() if ": " in line
    )
    chosen = defaults | _chosen(defaults, arguments)
    pages = [EXAMPLES[command], "groups: choose with group=option; * is the default"]
    names_of = options([conf_dir()])
    for group, default in defaults.items():
        names = "  ".join(f"{name}{'*' if name == default else ''}" for name in names_of[group])
        pages.append(
            fill(names, WIDTH, break_on_hyphens=False, initial_indent=f"  {group:<10} ", subsequent_indent=" " * 13)
        )
    pages.append(
        "\nvalues: override with key=value\n" + _part(primary, "\n\n", "hydra:").strip("\n").replace("\n\n", "\n")
    )
    for group, option in chosen.items():
        if group not in ("suite", "recipe", "experiment", "tracking") and option != "null":
            body = _body(conf_dir() / group / f"{option}.yaml")
            pages.append(f"\n{group}={option}: override with {group}.key=value\n{body}")
            if group == "merge":
                pages.append(f"  more parameters, and what they take: epmq list merge={option}")
    print("\n".join(pages) + "\n" + TAIL, end="")


def _chosen(defaults: dict[str, str], arguments: list[str]) -> dict[str, str]:
    """The options that the arguments choose, by group; only shipped ones have a page."""
    pairs = (argument.split("=", 1) for argument in arguments if "=" in argument)
    return {
        group: option
        for group, option in pairs
        if group in defaults and option.isidentifier() and (conf_dir() / group / f"{option}.yaml").is_file()
    }


def _part(path: Path, start: str, end: str) -> str:
    """The text between the first `start` and the first `end` behind it."""
    return path.read_text(encoding="utf-8").partition(start)[2].partition(end)[0]


def _body(path: Path) -> str:
    """The options of a config file with their comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(f"  {line}" for line in lines if not line.startswith(("#", "_target_"))) or "  no options"
