"""Whether experts read texts with the tokens of their base: the same words must have the same numbers, or rows of the
embeddings that mean different words are merged."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import config_of, from_folder
from epmq_cli.models.processor_folder import processor_files, same_files

REMEDY = "suite.processor=base reads its task with the base's tokenizer"

log = logging.getLogger("epmq")


def check_tokens(base: ModelFolder, experts: Mapping[str, ModelFolder], processors: Mapping[str, str]) -> None:
    """ModelError where an expert's tokenizer numbers a token in another way than the base's, whatever files they are
    made of; `processors`: the option of each task, with `base` of which it is a warning. Tokens that only one of them
    has are allowed: see `vocabulary` of a suite. A warning where two experts give one number to different tokens.

    Without files of its own an expert has the base's tokenizer. transformers is asked where files differ.
    """
    bases = processor_files(base.path, "texts")
    known: dict[str, int] = {}
    first = base if bases else None
    added: dict[int, tuple[str, str]] = {}
    for task, expert in experts.items():
        files = processor_files(expert.path, "texts")
        if not files or same_files(files, bases):
            continue
        if bases and not known:
            known = vocabulary(base.path, base.path)
        try:
            found = vocabulary(expert.path, base.path)
        except ModelError as error:
            _refused(f"{expert.role}: its own tokenizer cannot be read: {error}", processors[task])
            continue
        if first is None:
            first, known = expert, found
        token = next((token for token in sorted(known, key=known.__getitem__) if _differs(token, known, found)), None)
        if token is not None:
            _refused(
                f"{expert.role} ({expert.path}) has another tokenizer than {_named(first)}: token {token!r} is "
                f"{found[token]} in its tokenizer and {known[token]} in the other, so it was trained on other rows of "
                "the embeddings",
                processors[task],
            )
            continue
        _note_added(expert, {token: number for token, number in found.items() if token not in known}, added)


def _differs(token: str, known: Mapping[str, int], found: Mapping[str, int]) -> bool:
    """Whether both number a token, in two ways."""
    return found.get(token, known[token]) != known[token]


def _named(model: ModelFolder) -> str:
    return f"the {model.role} ({model.path})"


def _refused(problem: str, processor: str) -> None:
    """The problem as an error, or as a warning where the task is read with the base's tokenizer in any case."""
    if processor != "base":
        raise ModelError(f"{problem}; {REMEDY}")
    log.warning("%s; %s", problem, REMEDY)


def _note_added(expert: ModelFolder, tokens: Mapping[str, int], added: dict[int, tuple[str, str]]) -> None:
    """Adds the tokens that an expert has beyond the base's to those of the experts before it."""
    for token, number in tokens.items():
        other, role = added.setdefault(number, (token, expert.role))
        if other != token:
            log.warning(
                "%s: token %d is %r in its tokenizer and %r in that of the %s; their rows of the embeddings are merged",
                expert.role, number, token, other, role,
            )  # fmt: skip
            return


def vocabulary(folder: Path, base: Path) -> dict[str, int]:
    """Token -> number of a folder's tokenizer, as transformers reads it. The config of the base says of which kind it
    is where there is none in the folder, such as an adapter's."""
    from transformers import AutoTokenizer

    options = {} if (folder / "config.json").is_file() else {"config": config_of(base)}
    found: dict[str, int] = from_folder(AutoTokenizer, folder, **options).get_vocab()
    return found
