"""Every error that a user can cause, in one small tree.

    EpmqError
    ├── ConfigError       an option or a config file: what was typed is not allowed
    │   └── TokenError    it holds a token of the hub
    ├── ModelError        base or experts: files, tensor names, shapes, values
    ├── DataError         the data of a task
    ├── CheckpointError   a checkpoint that cannot be written, or was not written by epmq
    └── RunError          the run folder or its processes: in use, cannot be written, ended

The message is one sentence that names what was given, what is allowed and what to do. The commands print it without a
traceback and exit with 1, as they do for what the system refuses (OSError: a full disk, a folder that may not be
written; MemoryError). Ctrl-C exits with 130 and SIGTERM with 143, whatever is raised behind it; a closed pipe with 141.

Anything else that is raised is a defect of epmq: the commands say so in one sentence and exit with 70. Its traceback is
in the run folder's log, and on the screen with --debug or HYDRA_FULL_ERROR=1, which show those of mistakes as well.
"""

from __future__ import annotations

NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""What CUDA, torch, cuBLAS and cuDNN say where there is none."""


class EpmqError(Exception):
    """A mistake in the input; the command prints it without a traceback and exits with status 1."""


class ConfigError(EpmqError):
    """An option or a config file holds something that is not allowed."""


class TokenError(ConfigError):
    """A config holds a token of the hub, which must not be written down."""


class ModelError(EpmqError):
    """The base or an expert cannot be used as the suite says."""


class DataError(EpmqError):
    """The data of a task cannot be used as the suite says."""


class CheckpointError(EpmqError):
    """A checkpoint cannot be written or read."""


class RunError(EpmqError):
    """A run folder is in use or cannot be written, or a process of a run has ended."""


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lacks_memory(error: Exception) -> bool:
    """Whether memory was wanting, of the machine or of an accelerator; torch has ways of its own to say so."""
    said = type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in NO_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said)


def placed(error: ConfigError, where: str) -> ConfigError:
    """The error of a part such as data, which knows its own name alone, with where in the config it is."""
    part = where.rpartition(".")[2]
    text = str(error)
    return ConfigError(f"{where}{text.removeprefix(part)}") if text.startswith(f"{part}.") else error


def shown(value: object) -> str:
    """A value as the user would have typed it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    return repr(value)
