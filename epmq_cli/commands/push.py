"""`epmq push CHECKPOINT owner/name`: uploads a checkpoint to the hub, in one commit."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from epmq_cli.errors import CheckpointError, ConfigError, RunError, first_line
from epmq_cli.runtime.console import console, plain
from epmq_cli.runtime.units import size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DESCRIPTION = """Uploads a checkpoint folder to a model repository of the Hugging Face hub, in one commit. Checks its
files first as epmq verify does. A new repository is private unless --public is given. Log in with hf auth login, or set
HF_TOKEN."""
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
KEPT = ".gitattributes"
"""The file that the hub itself writes into a new repository."""


def main(arguments: list[str]) -> None:
    """Uploads the checkpoint, or with --dry-run lists its files; exits with 1 if that fails."""
    parser = argparse.ArgumentParser(prog="epmq push", description=DESCRIPTION)
    parser.add_argument("checkpoint", type=Path, help="the checkpoint folder that epmq run or merge wrote")
    parser.add_argument("repository", help="owner/name on the hub")
    parser.add_argument("--public", action="store_true", help="make a new repository public, or push to a public one")
    parser.add_argument("--yes", action="store_true", help="replace the files of a repository without a question")
    parser.add_argument("--dry-run", action="store_true", help="list the files and their sizes, and upload nothing")
    parser.add_argument("--debug", action="store_true", help="print a traceback in place of a one-sentence message")
    chosen = parser.parse_args(arguments)
    files = checked_files(chosen.checkpoint, chosen.repository)
    if chosen.dry_run:
        _list(files, chosen.repository, chosen.public)
    else:
        push(files, chosen.repository, chosen.public, chosen.yes)


def checked_files(checkpoint: Path, repository: str) -> dict[str, Path]:
    """The files to upload by their names in the repository; CheckpointError if one is not what epmq wrote."""
    from epmq_cli.commands.verify import report_problems
    from epmq_cli.store.manifest import MANIFEST, file_problems, files_within

    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"the repository must be owner/name, as on the hub, got {repository!r}")
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder; give the checkpoint folder that epmq run or merge wrote")
    report_problems(checkpoint, file_problems(checkpoint))
    return {**files_within(checkpoint), MANIFEST: checkpoint / MANIFEST}


def _list(files: dict[str, Path], repository: str, public: bool) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    for name, count in sizes.items():
        _print(f"{size(count):>10}  {name}")
    access = "public" if public else "private"
    total = size(sum(sizes.values()))
    _print(f"{total:>10}  in {len(files)} files would go to {repository} ({access} if it is new)")


def push(files: dict[str, Path], repository: str, public: bool, yes: bool) -> None:
    """Makes the repository if it does not exist, and replaces its files by these in one commit. Asks before it replaces
    any, unless `yes`. RunError if the hub refuses."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("epmq push needs the network, which HF_HUB_OFFLINE=1 forbids; unset it, or use --dry-run")
    api = HfApi(library_name="epmq")
    with _explained(repository):
        present = _present(api, repository, public)
        if present:
            _ask(repository, len(present), yes)
        if present is None:
            api.create_repo(repository, private=not public)
        additions = [CommitOperationAdd(name, path) for name, path in files.items()]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in present or () if name not in files]
        commit = api.create_commit(repository, [*additions, *deletions], commit_message="Upload a checkpoint of epmq")
    _print(f"{len(files)} files are at {commit.repo_url}")


def _present(api: HfApi, repository: str, public: bool) -> list[str] | None:
    """The files of a repository, without the one that the hub writes; None if it does not exist. ConfigError if it is
    public and should not be."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return None
    if not info.private and not public:
        raise ConfigError(f"{repository} is a public repository; add --public to push to it, or choose another name")
    return [file.rfilename for file in info.siblings or () if file.rfilename != KEPT]


def _ask(repository: str, count: int, yes: bool) -> None:
    """RunError unless the user agrees that the files of a repository are replaced."""
    what = f"{repository} has {count} files, which the push replaces"
    if yes:
        return
    if not sys.stdin.isatty():
        raise RunError(f"{what}; add --yes, or choose another repository")
    if input(f"{plain(what)}; the history keeps them. Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise RunError(f"nothing was pushed to {repository}")


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turns errors of the hub into one sentence."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    network = type(get_session()).__module__.partition(".")[0]  # the library of the hub's connections
    try:
        yield
    except (HFValidationError, LocalTokenNotFoundError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise _refusal(repository, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != network:
            raise
        raise _refusal(repository, error) from error


def _refusal(repository: str, error: Exception) -> RunError:
    return RunError(
        f"the hub does not take the push to {repository} ({first_line(error)}); check the name, the network and your "
        "token (hf auth login, or HF_TOKEN)"
    )


def _print(text: str) -> None:
    console.print(plain(text), markup=False, highlight=False, soft_wrap=True)
