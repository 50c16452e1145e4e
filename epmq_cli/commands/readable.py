"""Whether Hydra can read what was typed; what it says of it itself has no remedy."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from epmq_cli.errors import ConfigError

LEXER = "LexerNoViableAltException"
"""What Hydra says of characters that its grammar does not have outside of quotes."""
LOGGING = "hydra/job_logging"
WITHOUT_FILE = ("disabled", "none", "stdout")
"""Hydra's options of it that do not have what epmq's configs write run.log by."""


def parsed(texts: Sequence[str]) -> list[Override]:
    """The overrides; ConfigError where one is no text, needs quotes, names no option, or does away with run.log."""
    found = []
    for text in texts:
        if not _is_unicode(text):
            readable = text.encode(errors="backslashreplace").decode()
            raise ConfigError(f"{readable} is no text in UTF-8; give names that are, and rename files that have others")
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except OverrideParseException as error:
            if str(error).startswith(LEXER):
                raise ConfigError(f"{text} has characters that must be in quotes; write {quoted(text)}") from error
            raise  # Hydra says what it lacks
        if not override.key_or_group:
            raise ConfigError(f"{text} names no option; write key=value (epmq COMMAND --help shows the keys)")
        if override.key_or_group == LOGGING and override.value() in WITHOUT_FILE:
            raise ConfigError(f"{LOGGING} must be default, or one of yours with a file handler for run.log, got {text}")
        found.append(override)
    return found


def quoted(text: str) -> str:
    """An override as it is to be typed: its value quoted for Hydra, the whole for the shell."""
    key, _, value = text.partition("=")
    escaped = value.strip("'\"").replace('"', r"\"")
    return shlex.quote(f'{key}="{escaped}"')


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
