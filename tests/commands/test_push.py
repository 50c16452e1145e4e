"""Oracle: a stub of the hub's HTTP API, which huggingface_hub itself talks to."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from epmq_cli.store.manifest import write_manifest
from tests.conftest import Run
from tests.helpers.hub_stub import TOKEN, Hub, Repository, serving

FILES = ["README.md", "config.json", "heads/heads.safetensors", "manifest.json", "model.safetensors"]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own uploads


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that has a manifest, as every checkpoint."""
    folder = tmp_path / "checkpoint"
    (folder / "heads").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags: [merge]\n---\n# Card\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1" * 2_000_000)
    (folder / "heads" / "heads.safetensors").write_bytes(b"2" * 1000)
    write_manifest(folder, {})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_a_push_makes_a_private_repository_with_all_files(hub: Hub, checkpoint: Path, epmq_inside: Run) -> None:
    done = epmq_inside("push", str(checkpoint), "me/model")
    assert (done.returncode, done.stdout) == (0, f"5 files are at {hub.address}/me/model\n"), done.stderr
    made = hub.repositories["me/model"]
    assert made.private
    assert made.files == {".gitattributes": b"", **content(checkpoint)}
    assert made.messages == ["Upload a checkpoint of epmq"]
    assert epmq_inside("push", str(checkpoint), "me/other", "--public").returncode == 0
    assert not hub.repositories["me/other"].private


def test_the_files_of_a_repository_are_replaced_if_the_user_agrees(
    hub: Hub, checkpoint: Path, epmq_inside: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["me/model"] = Repository(True, {".gitattributes": b"", "old.bin": b"x", "config.json": b"y"})
    said = "epmq: me/model has 2 files, which the push replaces; add --yes, or choose another repository\n"
    refused = epmq_inside("push", str(checkpoint), "me/model")
    assert (refused.returncode, refused.stderr) == (1, said)
    monkeypatch.setattr(sys, "stdin", answer := io.StringIO("n\ny\n"))
    monkeypatch.setattr(answer, "isatty", lambda: True)
    assert epmq_inside("push", str(checkpoint), "me/model").stderr == "epmq: nothing was pushed to me/model\n"
    assert "old.bin" in hub.repositories["me/model"].files
    assert epmq_inside("push", str(checkpoint), "me/model").returncode == 0
    assert hub.repositories["me/model"].files == {".gitattributes": b"", **content(checkpoint)}
    assert epmq_inside("push", str(checkpoint), "me/model", "--yes").returncode == 0


def test_a_public_repository_needs_the_option(hub: Hub, checkpoint: Path, epmq_inside: Run) -> None:
    hub.repositories["me/model"] = Repository(False)
    refused = epmq_inside("push", str(checkpoint), "me/model")
    assert refused.stderr == (
        "epmq: me/model is a public repository; add --public to push to it, or choose another name\n"
    )
    assert epmq_inside("push", str(checkpoint), "me/model", "--public").returncode == 0


def test_a_dry_run_lists_files_and_sizes_without_the_network(
    hub: Hub, checkpoint: Path, epmq_inside: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    listed = epmq_inside("push", str(checkpoint), "me/model", "--dry-run")
    lines = listed.stdout.splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == [*FILES[:3], "model.safetensors", "manifest.json"]
    assert {"   2.00 MB  model.safetensors", "       2 B  config.json"} <= {*lines}
    assert lines[-1].endswith("MB  in 5 files would go to me/model (private if it is new)")
    refused = epmq_inside("push", str(checkpoint), "me/model")
    assert refused.stderr == (
        "epmq: epmq push needs the network, which HF_HUB_OFFLINE=1 forbids; unset it, or use --dry-run\n"
    )
    assert not any("me/model" in request for request in hub.requests)


def test_a_damaged_checkpoint_a_wrong_name_and_a_wrong_token_are_refused(
    hub: Hub, checkpoint: Path, epmq_inside: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = epmq_inside("push", str(checkpoint), "model")
    assert wrong.stderr == "epmq: the repository must be owner/name, as on the hub, got 'model'\n"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused = epmq_inside("push", str(checkpoint), "me/model")
    assert refused.returncode == 1
    assert refused.stderr.startswith("epmq: the hub does not take the push to me/model (")
    assert "hf_wrong" not in refused.stderr
    (checkpoint / "config.json").write_text("[]")
    damaged = epmq_inside("push", str(checkpoint), "me/model")
    assert "is not what epmq wrote: config.json has another sha256" in damaged.stderr
    assert hub.repositories == {}


def test_a_hub_that_cannot_be_reached_is_one_sentence(
    checkpoint: Path, epmq_inside: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused = epmq_inside("push", str(checkpoint), "me/model")
    assert refused.returncode == 1
    assert refused.stderr.startswith("epmq: the hub does not take the push to me/model (")
    assert refused.stderr.count("\n") == 1
