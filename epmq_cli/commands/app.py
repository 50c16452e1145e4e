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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from epmq_cli import interruption, ranks
from epmq_cli.cli import FULL_ERROR, split
from epmq_cli.commands.overrides import addable, check_overrides, unreadable
from epmq_cli.config import conf_dir, refuse_tokens
from epmq_cli.console import complain, log, plain
from epmq_cli.errors import ConfigError, EpmqError, TokenError, check_keys, lacks_memory
from epmq_cli.interruption import GRACE
from epmq_cli.resume import folder_names, unfinished

MISTAKEN, DEFECT = 1, 70
NOTHING = "interrupted; nothing of this run is complete"
INTERRUPTED = {
    "run": "interrupted; start the same command again to go on from the last finished block",
    "merge": NOTHING,
    "eval": NOTHING,
}
DISK = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)
PLACE = (errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS)
"""What a disk or a folder says, by no fault of epmq's."""
PERMIT = "change its permissions, or choose another"
REMEDY = "make room there, or choose another out"
LAUNCHERS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}
"""Of sweeps: the extra that each comes with."""
MISTAKES = (EpmqError, HydraException, OmegaConfBaseException, OSError)
"""What is raised that is no defect of epmq."""

folder_names.register()  # here: the processes of a sweep's jobs import this, too


def launch(command: str, arguments: list[str]) -> None:
    """Runs a command with these arguments; whatever is raised ends it as `told` says."""
    try:
        ranks.check(command)
    except ConfigError as error:
        complain(str(error))
        sys.exit(MISTAKEN)
    logging.raiseExceptions = False  # a line that run.log has no room for ends nothing
    with told(lambda error: explain(error, command, arguments), INTERRUPTED[command]):
        os.environ[FULL_ERROR] = "1"  # Hydra then raises what it would otherwise print
        refuse_tokens(arguments)  # here, since Hydra writes them down before anything of ours runs
        overrides, flags = split(arguments)
        check_overrides(command, overrides)
        try:
            with interruption.listening(lambda: complain(INTERRUPTED[command]), GRACE if ranks.count() == 1 else 1):
                _start(command, addable(arguments))
        except (YAMLError, UnicodeDecodeError, RecursionError) as error:  # what jobs raise comes as Ended
            raise ConfigError(f"a config file cannot be read: {unreadable(error, flags)}") from error


class Ended(BaseException):
    """What ended a job, on its way past Hydra, which would print a line of its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def told(explained: Callable[[Exception], str], interrupted: str = NOTHING) -> Iterator[None]:
    """Ends the process with a sentence and a status, see errors.py, where something is raised inside; with --debug or
    HYDRA_FULL_ERROR=1 it is raised on. `interrupted`: what is said of a signal."""
    before = os.environ.get(FULL_ERROR, "0")
    try:
        yield
    except (Exception, Ended) as raised:
        error = _behind(raised.error if isinstance(raised, Ended) else raised)
        if (number := interruption.seen()) is not None:  # what a library raises that was interrupted says nothing
            complain(interrupted)
            sys.exit(interruption.STATUS[number])
        if isinstance(error, BrokenPipeError) and sys.stdout is not None:
            sys.stdout.flush()  # raises it again where it is of what is printed, see ending.py
        if before == "1":
            raise error from None
        if ranks.first() or not isinstance(error, (ConfigError, HydraException)):  # those come up in all processes
            complain(explained(error))
        sys.exit(MISTAKEN if isinstance(error, MISTAKES) or lacks_memory(error) else DEFECT)
    except KeyboardInterrupt as signalled:
        complain(interrupted)
        sys.exit(interruption.STATUS[getattr(signalled, "number", signal.SIGINT)])
    finally:
        os.environ.pop(unfinished.VARIABLE, None)
        os.environ[FULL_ERROR] = before


def _behind(error: Exception) -> Exception:
    """What the system said, where a library says in its own words that a file could not be opened, as logging does."""
    cause = error.__cause__
    return cause if isinstance(error, ValueError) and isinstance(cause, OSError) else error


def defect(error: Exception) -> str:
    """What is said of an exception that nobody foresaw."""
    reason = (str(error).splitlines() or [""])[0]
    return (
        f"this is a defect of epmq, not of your input ({type(error).__name__}{': ' * bool(reason)}{reason}); "
        "run the same again with --debug and report what it prints"
    )


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


def explain(error: Exception, command: str = "", arguments: Sequence[str] = ()) -> str:
    """The error as one sentence that says what exists where the user named something that does not, and of a defect
    that it is one."""
    text = str(error)
    if lacks_memory(error):
        return "there is not enough memory; lower calib.memory, calib.batch_size or eval.batch_size"
    if not isinstance(error, MISTAKES):
        return defect(error)
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename} may not be read or written ({error.strerror}); {PERMIT}"
    if isinstance(error, OSError) and error.errno in (*DISK, *PLACE):
        return f"{error.filename or 'the disk'} cannot be written or read ({error.strerror}); {REMEDY}"
    if isinstance(error, OSError) and error.strerror:
        return f"the system says of {error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, MissingConfigException) and (option := re.search(r"Could not find '(.+)/(.+)'", text)):
        if option[1] == "hydra/launcher" and option[2] in LAUNCHERS:
            extra = LAUNCHERS[option[2]]
            return f"hydra/launcher={option[2]} is not installed; get it with pip install 'epmq-cli[{extra}]'"
        known = ", ".join(re.findall(r"^\t(\S+)", text.partition("Config search path")[0], re.M))
        given = any(argument.startswith(("--config-dir", "-cd")) for argument in arguments)
        own = "" if given else "; to use one of your own, add --config-dir FOLDER"
        return f"{option[1]}={option[2]} does not exist; the options are {known} (see epmq list {option[1]}){own}"
    if key := re.match(r"Could not override '([^']+)'", text):
        try:
            _check_key(key[1], command, arguments)
        except ConfigError as better:
            return str(better)
    text = text.partition("Config search path")[0]
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _check_key(key: str, command: str, arguments: Sequence[str]) -> None:
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
    """The job of a command with what ends it in run.log: a mistake as its sentence, a defect with its traceback."""

    @wraps(command)
    def wrapped(cfg: DictConfig) -> None:
        try:
            command(cfg)
        except Exception as error:
            if isinstance(error, TokenError):
                _forget()
            if isinstance(error, EpmqError):
                log.error("%s", plain(str(error)))
            else:
                log.exception("the job ends here")
            if HydraConfig.get().mode == RunMode.RUN:
                raise Ended(error) from error
            raise  # to the sweep, which goes on with its other jobs

    return wrapped


def _forget() -> None:
    """Removes what Hydra has written down of the config."""
    hydra = HydraConfig.get()
    shutil.rmtree(Path(hydra.runtime.output_dir) / str(hydra.output_subdir), ignore_errors=True)
    if hydra.mode == RunMode.MULTIRUN:
        (Path(hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)


def quiet_libraries() -> None:
    """Keeps the progress bars and advice of transformers and the hub out of our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # compressed-tensors has no other switch
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
