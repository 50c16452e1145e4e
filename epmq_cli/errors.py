"""The errors that a user can cause.

    EpmqError
    ├── ConfigError       an option or a config file with a value that is not allowed
    │   └── TokenError    it contains a token of the hub
    ├── ModelError        base or experts: files, tensor names, shapes, values
    ├── DataError         the data of a task
    ├── CheckpointError   a checkpoint that cannot be written or read
    └── RunError          the run folder or its processes: in use, cannot be written, ended

The message is one sentence that names the given value, the allowed ones and the remedy. The commands print it without a
traceback and exit with 1, also for OSError (a full disk, a folder without write permission) and MemoryError. Ctrl-C
exits with 130, SIGTERM with 143, a closed pipe with 141.

Every other exception is an internal error: the commands print one sentence and exit with 70. The traceback is in the
run folder's log. --debug or HYDRA_FULL_ERROR=1 prints tracebacks of all errors.
"""

from __future__ import annotations

NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""Texts in the out-of-memory errors of CUDA, torch, cuBLAS and cuDNN."""


class EpmqError(Exception):
    """A mistake in the input. The command prints one sentence and exits with 1."""


class ConfigError(EpmqError):
    """An option or a config file has a value that is not allowed."""


class TokenError(ConfigError):
    """A config contains a token of the hub, which must not be written to disk."""


class ModelError(EpmqError):
    """The base or an expert does not fit the suite."""


class DataError(EpmqError):
    """The data of a task does not fit the suite."""


class CheckpointError(EpmqError):
    """A checkpoint cannot be written or read."""


class RunError(EpmqError):
    """A run folder is in use or cannot be written, or a process of a run has ended."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lacks_memory(error: Exception) -> bool:
    """Whether an error is an out-of-memory error of the machine or of an accelerator."""
    matches = type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in NO_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and matches)


def placed(error: ConfigError, where: str) -> ConfigError:
    """The error of a part of the config, such as data, with the part's full path."""
    text = str(error)
    for part in (where.rpartition(".")[2], where.partition(".")[0]):
        if text.startswith(f"{part}.") and not text.startswith(f"{where}."):
            return ConfigError(f"{where}{text.removeprefix(part)}")
    return error


def literal(value: object) -> str:
    """A value as the user types it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {literal(item)}' for key, item in value.items())}}}"
    return repr(value)
