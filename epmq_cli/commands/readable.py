"""Checks that Hydra can parse an override, and suggests a correction, which Hydra's own messages lack."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from epmq_cli.errors import ConfigError

LEXER = "LexerNoViableAltException"
"""Hydra's name for the error of a character that needs quotes."""
MARKS = frozenset("{}[]()=")
"""Characters with a meaning in Hydra's grammar; a comma has one too, but an unquoted list is a sweep."""
NESTED = re.compile(r"\s*(\[|\{(?!\w*\}))")
"""The start of a list or a dict; `{task}` is a placeholder."""
FUNCTION = re.compile(r"(bool|choice|float|glob|int|interval|range|shuffle|sort|str|tag)\(")
LOGGING = "hydra/job_logging"
WITHOUT_FILE = ("disabled", "none", "stdout")
"""Its options without the file handler that writes run.log."""


def parsed(texts: Sequence[str]) -> list[Override]:
    """The parsed overrides; ConfigError if one is not UTF-8, needs quotes, does not name an option, or removes
    run.log."""
    overrides = []
    for text in texts:
        if not _is_unicode(text):
            readable = text.encode(errors="backslashreplace").decode()
            raise ConfigError(f"{readable} is not UTF-8; use names in UTF-8 and rename files with others")
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except OverrideParseException as error:
            if (way_out := _way_out(text, str(error))) is not None:
                raise ConfigError(way_out) from error
            raise  # Hydra's message is clear
        if not override.key_or_group:
            raise ConfigError(f"{text} does not name an option; write key=value (epmq COMMAND --help shows the keys)")
        if override.key_or_group == LOGGING and override.value() in WITHOUT_FILE:
            raise ConfigError(f"{LOGGING} must be default, or one of yours with a file handler for run.log, got {text}")
        overrides.append(override)
    return overrides


def _way_out(text: str, message: str) -> str | None:
    """The correction of an unreadable override; None if quotes do not help."""
    key, equals, value = text.partition("=")
    if message.startswith(LEXER) and not NESTED.match(value):
        return f"{text} has characters that need quotes; write {quoted(text)}"
    if not equals or FUNCTION.match(value) or not (MARKS & set(value) or message.startswith(LEXER)):
        return None
    if NESTED.match(value):
        example = shlex.quote(f'{key}=["a text with {{}}", "another"]')
        return f"{text} cannot be read as a list or dict; put quotes around each text in it, as in {example}"
    marks = " ".join(sorted(MARKS & set(value)))
    return f"{text} has {marks} in its value, which needs quotes; write {quoted(text)}"


def quoted(text: str) -> str:
    """An override to type: its value quoted for Hydra, all of it for the shell."""
    key, _, value = text.partition("=")
    escaped = value.strip("'\"").replace('"', r"\"")
    return shlex.quote(f'{key}="{escaped}"')


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
