"""Starts the Hydra commands: prints errors in one sentence without traceback, and silences libraries."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import shutil
import sys
import tempfile
import warnings

from yaml import YAMLError

from epmq_cli.commands import folder_names
from epmq_cli.commands.arguments import FULL_ERROR, split
from epmq_cli.commands.error_report import Ended
from epmq_cli.commands.mergekit import replaced
from epmq_cli.commands.overrides import addable, check_overrides, unreadable
from epmq_cli.config.instantiate import refuse_tokens
from epmq_cli.errors import ConfigError
from epmq_cli.pipeline import unfinished
from epmq_cli.runtime import distributed, signals
from epmq_cli.runtime.console import complain, messages
from epmq_cli.runtime.exit_status import MISTAKEN
from epmq_cli.runtime.imports import import_lazily
from epmq_cli.runtime.verbosity import kind

folder_names.register()  # here, because every process of a sweep's jobs imports this module


def launch(command: str, arguments: list[str]) -> None:
    """Runs a Hydra command with these arguments."""
    import_lazily("torch")
    try:
        distributed.check_environment(command)
    except ConfigError as error:
        complain(str(error))
        sys.exit(MISTAKEN)
    signals.raise_received()  # a library may have swallowed a signal while it was imported
    logging.raiseExceptions = False  # a full disk under run.log must not end the run
    before = os.environ.get(FULL_ERROR, "0")
    os.environ[FULL_ERROR] = "1"  # makes Hydra raise errors instead of printing them
    try:
        refuse_tokens(arguments)  # here, because Hydra stores overrides before it calls the command
        overrides, flags = split(arguments)
        overrides = replaced(command, overrides)
        arguments = [*overrides, *flags]
        check_overrides(command, overrides)
        try:
            _start(command, addable(arguments))
        except Ended as ended:
            raise ended.error from None
        except (YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"a config file cannot be read: {unreadable(error, flags)}") from error
    finally:
        os.environ.pop(unfinished.VARIABLE, None)
        os.environ[FULL_ERROR] = before


def _start(command: str, arguments: list[str]) -> None:
    """Runs the command. Only the main process of a run writes logs and Hydra files into the run folder."""
    if command == "run" and distributed.is_main():
        arguments = unfinished.continued(arguments)
    if not distributed.is_main():
        arguments = [
            *_temporary_folder(),
            *(a for a in arguments if not a.startswith("out=")),
        ]  # before Hydra's options
    sys.argv = [f"epmq {command}", *arguments]
    importlib.import_module(f"epmq_cli.commands.{command}").main()
    unfinished.end(arguments)


def _temporary_folder() -> list[str]:
    """Overrides that send the logs of a process to a temporary folder; the run folder belongs to the main process."""
    folder = tempfile.mkdtemp(prefix="epmq-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [f"out={folder}"]


def tell_loading() -> None:
    """Prints on a terminal that torch and transformers are imported, which takes seconds."""
    if messages.is_terminal and kind() == "auto":
        messages.print("loading torch and transformers", highlight=False)


def quiet_libraries() -> None:
    """Keeps the progress bars and advice of transformers and the hub out of our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # compressed-tensors has no other switch
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
