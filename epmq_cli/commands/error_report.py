"""How a command reports an error: one sentence and an exit status, the traceback in run.log."""

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
"""What a disk or a folder says, by no fault of epmq's."""


PERMIT = "change its permissions, or choose another"


REMEDY = "make room there, or choose another out"


LAUNCHERS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}
"""Of sweeps: the extra that each comes with."""


MISTAKES = (EpmqError, HydraException, OmegaConfBaseException, OSError)
"""The exceptions that are not internal errors."""


class Ended(BaseException):
    """What ended a job, on its way past Hydra, which would print a line of its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def report(error: Exception, arguments: Sequence[str]) -> int:
    """Prints what went wrong in one sentence; the exit status. Every process of a run finds the same mistakes in the
    config, so only the first one prints those."""
    error = _behind(error)
    if distributed.is_main() or not isinstance(error, (ConfigError, HydraException)):
        complain(format_error(error, "".join(arguments[:1]), arguments[1:]))
    return MISTAKEN if isinstance(error, MISTAKES) or lacks_memory(error) else DEFECT


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


def format_error(error: Exception, command: str = "", arguments: Sequence[str] = ()) -> str:
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


def log_errors(command: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
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
