"""What the Hydra commands share: errors without traceback, libraries kept quiet."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from omegaconf import DictConfig

from epmq_cli.console import log, messages
from epmq_cli.errors import ConfigError, EpmqError

INTERRUPTED = 130


def guarded(command: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """The command such that a user's mistake prints one sentence and exits with 1, and Ctrl-C exits with 130.

    HYDRA_FULL_ERROR=1 keeps the tracebacks.
    """

    @wraps(command)
    def wrapped(cfg: DictConfig) -> None:
        quiet_libraries()
        try:
            command(cfg)
        except EpmqError as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            log.error("%s", error)
            messages.print(f"epmq: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            sys.exit(1)
        except KeyboardInterrupt:
            messages.print("epmq: interrupted; nothing of this run is complete", style="red", highlight=False)
            sys.exit(INTERRUPTED)

    return wrapped


def quiet_libraries() -> None:
    """Keeps the progress bars and advice of transformers and the hub out of our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def refuse_used(folder: Path, *results: str) -> None:
    """ConfigError where the run folder already holds one of these results of an earlier run."""
    found = [name for name in results if (folder / name).exists()]
    if found:
        raise ConfigError(f"out={folder} already holds {' and '.join(found)}; choose another out or remove them")
