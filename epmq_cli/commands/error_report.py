"""Reports an error of a command: one sentence, an exit status, and the traceback in run.log."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.config.validate import check_keys
from epmq_cli.errors import ConfigError, EpmqError, TokenError, lacks_memory
from epmq_cli.runtime import distributed
from epmq_cli.runtime.console import complain, log, plain
from epmq_cli.runtime.exit_status import MISTAKEN

DEFECT = 70

DISK = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)


PLACE = (errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS)
"""Error numbers of full or broken disks and of unusable paths, which are not bugs of epmq."""


PERMIT = "change its permissions, or choose another"


REMEDY = "free some space there, or choose another out"


LAUNCHERS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}
"""The pip extra of each launcher of sweeps."""


MISTAKES = (EpmqError, HydraException, OmegaConfBaseException, OSError)
"""The exceptions that are not internal errors."""


class Ended(BaseException):
    """Carries the error of a job past Hydra, which would otherwise print its own line."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def report(error: Exception, arguments: Sequence[str]) -> int:
    """Prints the error in one sentence. Returns the exit status. All processes of a run raise the same config errors,
    so only the first one prints those."""
    error = _behind(error)
    if distributed.is_main() or not isinstance(error, (ConfigError, HydraException)):
        complain(format_error(error, "".join(arguments[:1]), arguments[1:]))
    return MISTAKEN if isinstance(error, MISTAKES) or lacks_memory(error) else DEFECT


def _behind(error: Exception) -> Exception:
    """The system's error if a library wraps it in a ValueError, as logging does; otherwise the error itself."""
    cause = error.__cause__
    return cause if isinstance(error, ValueError) and isinstance(cause, OSError) else error


def defect(error: Exception) -> str:
    """The message for an unexpected exception."""
    reason = (str(error).splitlines() or [""])[0]
    return (
        f"this is a bug in epmq, not in your input ({type(error).__name__}{': ' * bool(reason)}{reason}); "
        "run the same command with --debug and report its output"
    )


def format_error(error: Exception, command: str = "", arguments: Sequence[str] = ()) -> str:
    """The error as one sentence. Lists the existing names if a name is unknown, and marks internal errors as bugs."""
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
        return f"{error.filename or 'a file'} cannot be used ({error.strerror})"
    if isinstance(error, MissingConfigException) and (option := re.search(r"Could not find '(.+)/(.+)'", text)):
        if option[1] == "hydra/launcher" and option[2] in LAUNCHERS:
            extra = LAUNCHERS[option[2]]
            return f"hydra/launcher={option[2]} is not installed; get it with pip install 'epmq-cli[{extra}]'"
        names = ", ".join(re.findall(r"^\t(\S+)", text.partition("Config search path")[0], re.M))
        has_dir = any(argument.startswith(("--config-dir", "-cd")) for argument in arguments)
        own = "" if has_dir else "; to use one of your own, add --config-dir FOLDER"
        return f"{option[1]}={option[2]} does not exist; the options are {names} (see epmq list {option[1]}){own}"
    if key := re.match(r"Could not override '([^']+)'", text):
        try:
            _check_key(key[1], command, arguments)
        except ConfigError as better:
            return str(better)
    text = text.partition("Config search path")[0]
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _check_key(key: str, command: str, arguments: Sequence[str]) -> None:
    """Raises ConfigError with the existing keys if a key does not exist in the config without it."""
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


def log_errors(command: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Wraps the job of a command. Logs its error to run.log: a user error as a sentence, a bug with its traceback."""

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
            raise  # to the sweep, which continues with its other jobs

    return wrapped


def _forget() -> None:
    """Removes the copies of the config that Hydra wrote."""
    hydra = HydraConfig.get()
    shutil.rmtree(Path(hydra.runtime.output_dir) / str(hydra.output_subdir), ignore_errors=True)
    if hydra.mode == RunMode.MULTIRUN:
        (Path(hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)
