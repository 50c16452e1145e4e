"""Checks that values of a column are text. Python would print any value as text, such as a list with its brackets;
models are not trained on such texts, so other values raise a DataError."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np

from epmq_cli.errors import DataError

SHOWN = 40  # characters of a value in a message


def text_of(value: Any, column: str, where: str) -> str:
    """The value of a column of texts; DataError if it is not text."""
    if isinstance(value, str):
        return check_text(value, where)
    remedy = "choose the column that holds the text"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        remedy = "leave the row out, or choose the column that holds the text"
    if _is_number(value):
        remedy += f", or set data.prompt to '{{{column}}}' if these numbers are the text"
    if isinstance(value, bytes):
        remedy += ", or store it as strings"
    if isinstance(value, dict):
        remedy += ", such as one with the values of one of these keys"
    raise DataError(f"{where}: column {column} holds {kind_of(value)}, not text; {remedy}")


def prompt_value(value: Any, column: str, where: str) -> Any:
    """The value of a placeholder in a prompt: a text or a number; DataError if it is neither."""
    if isinstance(value, float) and math.isfinite(value):
        return _shortest(value)
    if isinstance(value, str) or _is_number(value):
        return value
    raise DataError(
        f"{where}: column {column} holds {kind_of(value)}, and data.prompt takes texts and numbers; store it as text "
        "or remove its placeholder from data.prompt"
    )


def _shortest(value: float) -> float:
    """The number with the digits that it was stored with: Python prints 3.8 in float32 as 3.799999952316284."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)


def kind_of(value: Any) -> str:
    """The type and value, for a sentence."""
    if value is None:
        return "no value (null)"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, float) and math.isnan(value):
        return "no value (NaN)"
    if isinstance(value, int | float | Decimal):
        return f"a number ({_short(value)})"
    if isinstance(value, list | tuple):
        return f"a list ({_short(value)})"
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(str, value)) or 'none'}"[: 4 * SHOWN]
    if isinstance(value, bytes | bytearray):
        return f"bytes ({_short(value)})"
    return f"a value of type {type(value).__name__} ({_short(value)})"


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def check_text(text: str, where: str) -> str:
    """The text; DataError if it holds NUL or a lone surrogate, such as "\\ud800" in JSON."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text holds {text[error.start : error.end]!a}, which is not a character and cannot be "
            "written in UTF-8; remove it"
        ) from error
    if "\0" in text:
        raise DataError(
            f"{where}: the text holds a NUL character, as in binary or UTF-16 files; remove it, or save the file as "
            "text in UTF-8"
        )
    return text
