"""What the Hydra commands share: errors in one sentence and without traceback, libraries kept quiet."""

from __future__ import annotations

import atexit
import errno
import importlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import wraps

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from epmq_cli import interruption, ranks
from epmq_cli.config import conf_dir, refuse_tokens
from epmq_cli.console import complain, log, plain
from epmq_cli.errors import ConfigError, EpmqError, check_keys
from epmq_cli.interruption import GRACE
from epmq_cli.resume import unfinished

NOTHING = "interrupted; nothing of this run is complete"
INTERRUPTED = {
    "run": "interrupted; start the same command again to go on from the last finished block",
    "merge": NOTHING,
    "eval": NOTHING,
}
DISK = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)
PLACE = (errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS)
"""What a disk or a folder says, by no fault of epmq's."""
REMEDY = "make room there, or choose another out"
LAUNCHERS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm"}
"""Of sweeps: the extra that each comes with."""
FULL_ERROR = "HYDRA_FULL_ERROR"


def launch(command: str, arguments: list[str]) -> None:
    """Runs a command with these arguments; a mistake in them prints one sentence and exits with 1, Ctrl-C with 130.

    Everything else that is raised is a defect and keeps its traceback. HYDRA_FULL_ERROR=1 keeps all tracebacks.
    """
    full = os.environ.get(FULL_ERROR) == "1"
    logging.raiseExceptions = False  # a line that run.log has no room for ends nothing
    if ranks.count() > 1 and command != "run":
        complain(f"epmq {command} is done by one process; start it without torchrun")
        sys.exit(1)
    os.environ[FULL_ERROR] = "1"  # Hydra then raises what it would otherwise print
    try:
        with interruption.listening(lambda: complain(INTERRUPTED[command]), GRACE if ranks.count() == 1 else 1):
            refuse_tokens(arguments)  # here, since Hydra writes them down before anything of ours runs
            _start(command, arguments)
    except (EpmqError, HydraException, OmegaConfBaseException) as error:
        if full:
            raise
        if ranks.first() or not isinstance(error, (ConfigError, HydraException)):  # those come up in all processes
            complain(explain(error, command, arguments))
        sys.exit(1)
    except OSError as error:
        if full or error.errno not in (*DISK, *PLACE):
            raise
        complain(f"{error.filename or 'the disk'} cannot be written or read ({error.strerror}); {REMEDY}")
        sys.exit(1)
    except KeyboardInterrupt as signalled:
        complain(INTERRUPTED[command])
        sys.exit(interruption.STATUS[getattr(signalled, "number", signal.SIGINT)])
    finally:
        os.environ.pop(unfinished.VARIABLE, None)
        os.environ[FULL_ERROR] = "1" if full else "0"


def _start(command: str, arguments: list[str]) -> None:
    """The command itself; of the processes of a run the first has its traces."""
    if command == "run" and ranks.first():
        arguments = unfinished.continued(arguments)
    if not ranks.first():
        arguments = [*_without_traces(), *(a for a in arguments if not a.startswith("out="))]  # before Hydra's options
    sys.argv = [f"epmq {command}", *arguments]
    importlib.import_module(f"epmq_cli.commands.{command}").main()
    unfinished.end(arguments)


def _without_traces() -> list[str]:
    """Overrides that send what a process writes beside the results elsewhere: the run folder is that of the first."""
    folder = tempfile.mkdtemp(prefix="epmq-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [f"out={folder}"]


def explain(error: Exception, command: str, arguments: list[str]) -> str:
    """The error as one sentence that says what exists where the user named something that does not."""
    text = str(error)
    if isinstance(error, MissingConfigException) and (option := re.search(r"Could not find '(.+)/(.+)'", text)):
        if option[1] == "hydra/launcher" and option[2] in LAUNCHERS:
            extra = LAUNCHERS[option[2]]
            return f"hydra/launcher={option[2]} is not installed; get it with pip install 'epmq-cli[{extra}]'"
        known = ", ".join(re.findall(r"^\t(\S+)", text.partition("Config search path")[0], re.M))
        return f"{option[1]}={option[2]} is not there, the options are {known} (see epmq list {option[1]})"
    if key := re.match(r"Could not override '([^']+)'", text):
        try:
            _check_key(key[1], command, arguments)
        except ConfigError as better:
            return str(better)
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _check_key(key: str, command: str, arguments: list[str]) -> None:
    """ConfigError with what exists beside a key that does not, in the config as it is without it."""
    parent, _, name = key.rpartition(".")
    others = [a for a in arguments if "=" in a and not a.startswith(("-", key))]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose(command, overrides=others)
    except HydraException:
        return
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig):
        check_keys(parent or "the config", [name], [str(option) for option in node if option != "_target_"])


def guarded(command: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """The job of a command with the user's mistakes in run.log."""

    @wraps(command)
    def wrapped(cfg: DictConfig) -> None:
        try:
            command(cfg)
        except EpmqError as error:
            log.error("%s", plain(str(error)))
            raise

    return wrapped


def quiet_libraries() -> None:
    """Keeps the progress bars and advice of transformers and the hub out of our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # compressed-tensors has no other switch
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
