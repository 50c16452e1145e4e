"""The `epmq` command: removes the subcommand from the command line and passes it the rest.

Imports neither torch nor Hydra, so help and completion answer at once. Hydra reads sys.argv when a command's
main is called, and COMP_LINE when the shell asks for completions: it removes the subcommand from both.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from epmq_cli.commands.arguments import FROM_MERGEKIT, FULL_ERROR, split, take_progress
from epmq_cli.errors import ConfigError
from epmq_cli.runtime.exit_status import exit_on_error
from epmq_cli.runtime.imports import importing
from epmq_cli.runtime.verbosity import PROGRESS, kind

COMMANDS = {
    "run": "merge, calibrate, quantize, pack and score a suite",
    "merge": "merge into a dense model",
    "eval": "score a checkpoint on the tasks of its suite",
    "verify": "check the files, tensors and scores of a checkpoint",
    "inspect": "show what models, adapters and checkpoints hold and what a run would refuse",
    "report": "compare runs in a table and on a page",
    "export": "write a checkpoint as one file for llama.cpp or ONNX Runtime",
    "push": "upload a checkpoint to the hub",
    "list": "show the options of each config group",
}

INTERRUPTED = {
    "run": "interrupted; start the same command again to continue after the last finished block",
    "merge": "interrupted; no checkpoint was written",
    "eval": "interrupted; no scores were written",
    "verify": "interrupted; not all of the checkpoint was checked",
    "export": "interrupted; no file was written",
    "push": "interrupted; nothing was committed to the repository",
}
"""The message of a command that a signal ends."""

PLAN = "--plan"
"""The option of `epmq run` that estimates a run and does not start it."""
DEBUG = "--debug"
"""The option of every command that prints tracebacks."""

USAGE = """usage: epmq COMMAND [key=value ...] [options]

epmq makes one 4-bit model of many fine-tuned experts.

commands
{commands}

examples
  epmq run                                           the built-in suite, offline
  epmq run merge=ties quant=gptq bits=4              other methods
  epmq run -m merge=ties,task_arithmetic bits=3,4    a sweep
  epmq run --plan merge=ties                         memory, disk and time of a run
  epmq eval runs/NAME/checkpoint                     score a checkpoint again
  epmq verify runs/NAME/checkpoint                   check its files and tensors
  epmq inspect EXPERT EXPERT --base BASE             compare experts before a run
  epmq report runs/NAME                              compare the runs of a sweep
  epmq export runs/NAME/checkpoint model.gguf        write it for llama.cpp, model.onnx for ONNX Runtime
  epmq push runs/NAME/checkpoint owner/name          upload it, privately
  epmq merge merge=mergekit merge.file=config.yml    a mergekit file as it is
  epmq COMMAND --help                                all options of a command
  epmq COMMAND --quiet ...                           print warnings and errors only
  epmq COMMAND progress=json ...                     progress as JSON lines, for schedulers
  epmq COMMAND --debug ...                           print tracebacks
  epmq --version
  eval "$(epmq -sc install=bash)"                    completion in bash
"""


def main() -> None:
    """Entry of the console script; exits with the status of the command, 1 for an unknown command."""
    arguments = sys.argv[1:]
    debug = DEBUG in arguments or os.environ.get(FULL_ERROR) == "1"
    interrupted = INTERRUPTED.get(arguments[0] if arguments else "", "interrupted")
    with exit_on_error(lambda error: _report(error, arguments), interrupted, debug):
        _dispatch(arguments)


def _report(error: Exception, arguments: list[str]) -> int:
    from epmq_cli.commands.error_report import report  # Hydra takes a while to import

    return report(error, arguments)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["-sc"] or arguments[:1] == ["--shell-completion"]:
        complete(arguments)
    elif not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
    elif arguments[0] in ("-V", "--version", "version"):
        from epmq_cli import __version__

        print(f"epmq {__version__}")
    elif arguments[0] in COMMANDS:
        start(arguments[0], arguments[1:])
    else:
        import difflib

        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        sys.exit(f"epmq: unknown command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}.{hint}")


def usage() -> str:
    """The page that `epmq --help` prints."""
    return USAGE.format(commands="\n".join(f"  {name:<8} {summary}" for name, summary in COMMANDS.items()))


def start(command: str, arguments: list[str]) -> None:
    """Runs a command."""
    before = os.environ.get(PROGRESS)
    try:
        _start(command, take_progress(arguments))
    finally:
        os.environ.pop(PROGRESS, None)
        if before is not None:
            os.environ[PROGRESS] = before


def _start(command: str, arguments: list[str]) -> None:
    if DEBUG in arguments:
        arguments = [argument for argument in arguments if argument != DEBUG]
        os.environ[FULL_ERROR] = "1"
    if command in ("export", "inspect", "list", "push", "report", "verify"):  # no Hydra commands
        importlib.import_module(f"epmq_cli.commands.{command}").main(arguments)
        return
    if {"-h", "--help"} & set(arguments):
        importlib.import_module("epmq_cli.commands.help").show(command, arguments)
        return
    # on busy machines, spinning threads take cores from working ones
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if command == "run" and PLAN in arguments:
        importlib.import_module("epmq_cli.commands.plan").main([text for text in arguments if text != PLAN])
        return
    if any(argument.partition("=")[0] == FROM_MERGEKIT for argument in arguments):
        importlib.import_module("epmq_cli.commands.mergekit").show(command, arguments)
        return
    overrides, flags = split(arguments)
    if command == "eval":
        overrides = _with_checkpoint(overrides)
    _announce(command)
    with importing():
        app = importlib.import_module("epmq_cli.commands.hydra_app")
    app.launch(command, [*overrides, *flags])


def _announce(command: str) -> None:
    """Prints a first line on a terminal at once."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" and kind() == "auto":
        print(f"epmq {command}: reading the config", file=sys.stderr, flush=True)


def _with_checkpoint(arguments: list[str]) -> list[str]:
    """`epmq eval FOLDER` means `epmq eval checkpoint=FOLDER`; folders of sweeps have = and commas in their names.

    ConfigError if the arguments name more than one: Hydra would use only the last.
    """
    folders = [argument for argument in arguments if _is_checkpoint(argument)]
    named = [argument for argument in arguments if argument.lstrip("+").startswith("checkpoint=")]
    if len({*folders, *named}) > 1:
        raise ConfigError(
            f"epmq eval scores one checkpoint at a time, got {' and '.join([*folders, *named])}; give one, or several "
            "as epmq eval -m checkpoint=FOLDER,FOLDER"
        )
    return [_checkpoint_override(argument) if argument in folders else argument for argument in arguments]


def _is_checkpoint(argument: str) -> bool:
    """Whether an argument is a checkpoint's path: no override, unless a folder has exactly that name."""
    override = "=" in argument or argument.startswith(("~", "+"))
    return not override or Path(argument).is_dir()


def _checkpoint_override(argument: str) -> str:
    escaped = argument.replace("\\", "\\\\").replace("'", "\\'")
    return f"checkpoint='{escaped}'"


def complete(arguments: list[str]) -> None:
    """Answers the shell: the names of commands, then Hydra's completions for the command on the line."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    named = len(words) > 2 or (len(words) == 2 and line.endswith(" "))
    if arguments[1:2] and arguments[1].startswith("query") and not named:
        begun = words[1] if len(words) == 2 else ""
        print("\n".join(name for name in COMMANDS if name.startswith(begun)))
        return
    command = words[1] if named and words[1] in ("run", "merge", "eval") else "run"
    if named:
        position = int(os.environ.get("COMP_POINT", str(len(line))))
        os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
        os.environ["COMP_POINT"] = str(max(0, position - len(words[1]) - 1))
    start(command, arguments)
