"""Checks that experts use the token ids of their base.

If a token has different ids, the merge combines embedding rows of different tokens.
"""

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
    """Raises ModelError if an expert's tokenizer gives a token another id than the base's tokenizer does.

    `processors`: the `suite.processor` option of each task; with `base`, the error becomes a warning. Tokens that only
    one of the tokenizers has are allowed: see `suite.vocabulary`. If two experts give one id to different tokens, epmq
    warns. An expert without tokenizer files uses the base's tokenizer. Only different files are loaded with
    transformers.
    """
    bases = processor_files(base.path, "texts")
    reference: dict[str, int] = {}
    first = base if bases else None
    added: dict[int, tuple[str, str]] = {}
    for task, expert in experts.items():
        files = processor_files(expert.path, "texts")
        if not files or same_files(files, bases):
            continue
        if bases and not reference:
            reference = vocabulary(base.path, base.path)
        try:
            ids = vocabulary(expert.path, base.path)
        except ModelError as error:
            _refused(f"{expert.role}: its own tokenizer cannot be read: {error}", processors[task])
            continue
        if first is None:
            first, reference = expert, ids
        token = next(
            (token for token in sorted(reference, key=reference.__getitem__) if _differs(token, reference, ids)), None
        )
        if token is not None:
            _refused(
                f"{expert.role} ({expert.path}) has a different tokenizer than {_named(first)}: token {token!r} has id "
                f"{ids[token]} in its tokenizer and id {reference[token]} in the other, so the embedding rows do not "
                "match",
                processors[task],
            )
            continue
        _note_added(expert, {token: number for token, number in ids.items() if token not in reference}, added)


def _differs(token: str, reference: Mapping[str, int], ids: Mapping[str, int]) -> bool:
    """Whether both vocabularies have a token, with different ids."""
    return ids.get(token, reference[token]) != reference[token]


def _named(model: ModelFolder) -> str:
    return f"the {model.role} ({model.path})"


def _refused(problem: str, processor: str) -> None:
    """Raises the problem as an error, or logs a warning if the task uses the base's tokenizer anyway."""
    if processor != "base":
        raise ModelError(f"{problem}; {REMEDY}")
    log.warning("%s; %s", problem, REMEDY)


def _note_added(expert: ModelFolder, tokens: Mapping[str, int], added: dict[int, tuple[str, str]]) -> None:
    """Records the tokens that an expert adds to the base's. Warns if an earlier expert uses an id for another token."""
    for token, number in tokens.items():
        other, role = added.setdefault(number, (token, expert.role))
        if other != token:
            log.warning(
                "%s: token id %d is %r in its tokenizer and %r in that of the %s, but their embedding rows are merged",
                expert.role, number, token, other, role,
            )  # fmt: skip
            return


def vocabulary(folder: Path, base: Path) -> dict[str, int]:
    """Token -> id of a folder's tokenizer, as transformers reads it.

    If the folder has no config, as with an adapter, the base's config determines the type of the tokenizer.
    """
    from transformers import AutoTokenizer

    options = {} if (folder / "config.json").is_file() else {"config": config_of(base)}
    ids: dict[str, int] = from_folder(AutoTokenizer, folder, **options).get_vocab()
    return ids
