"""Oracle: the allowed input on the command line and in the user's YAML files; everything else is refused in one
sentence and leaves no files."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from epmq_cli.commands.overrides import addable
from epmq_cli.commands.readable import parsed, quoted
from epmq_cli.config.instantiate import conf_dir
from epmq_cli.errors import ConfigError
from tests.conftest import Run
from tests.helpers.tiers import only

METHODS = ", ".join(sorted(path.stem for path in (conf_dir() / "merge").glob("*.yaml")))
MERGES = f"{METHODS} (see epmq list merge)"
TYPED = {
    "run merge=null": f"merge must be one of {MERGES}, got null",
    "run merge=": f"merge must be one of {MERGES}, got ''",
    "run merge=3": f"merge must be one of {MERGES}, got 3",
    "run merge=[ties,average]": f"merge must be one of {MERGES}, got ['ties', 'average']",
    "run -m merge=ties,null": f"merge must be one of {MERGES}, got null",
    "merge suite=null": "suite must be one of causal_lm, clip_vit_b16_ta8, ",
    "eval x eval=null": "eval must be one of default, lm_eval (see epmq list eval), got null",
    "run ~merge": "merge cannot be deleted from the config, got ~merge",
    "run ~seed": "seed cannot be deleted from the config, got ~seed",
    "run out=null": "out must be a folder, got null",
    "run out=": "out must be a folder, got ''",
    "run out=[a,b]": "out must be a folder, got ['a', 'b']",
    "run out={a:1}": "out must be a folder, got {a: 1}",
    "run out=a=b": """out=a=b has = in its value, which needs quotes; write 'out="a=b"'""",
    "merge suite.experts=/x/{task}": """{ } in its value, which needs quotes; write 'suite.experts="/x/{task}"'""",
    "run out=/proc/none/x": "/proc/none cannot be used (No such file or directory)",
    "run --config-dir nowhere": "nowhere' not found",
    "run out=rün✓": """out=rün✓ has characters that need quotes; write 'out="rün✓"'""",
    "run out=a'b": """out=a'b has characters that need quotes; write 'out="a'"'"'b"'""",
    "run out=\udcff": "out=?udcff is not UTF-8; use names in UTF-8 and rename files with others",
    "run suite.name='\udcff'": "suite.name='?udcff' is not UTF-8; use names",
    "eval \udcff": "checkpoint='?udcff' is not UTF-8; use names",
    "run =1": "=1 does not name an option; write key=value",
    "run ~=1": "~=1 does not name an option; write key=value",
    "run hydra/job_logging=none": "hydra/job_logging must be default, or one of yours with a file handler for run.log",
    "run hydra/job_logging=stdout": "hydra/job_logging must be default, or one of yours",
    "run hydra.run.dir=[1]": "Error merging override hydra.run.dir=[1]",
}
WRITTEN = {
    "a key twice": (b"name: a\nname: b\n", "mine.yaml, line 2: found duplicate key name"),
    "a list that does not end": (b"name: [a\n", "mine.yaml, line 2: expected ',' or ']', but got '<stream end>'"),
    "a tab": (b"name:\n\t- a\n", "mine.yaml, line 2: found character '?t' that cannot start any token"),
    "no UTF-8": (b"name: \xff\xfe\n", "mine.yaml is not UTF-8 text"),
    "a zero byte": (b"\0", "unacceptable character #x0000"),
    "an endless list": (b"a: &x [*x]\n", "maximum recursion depth exceeded"),
    "Python": (b"a: !!python/object/apply:os.system [ls]\n", "mine.yaml, line 1: could not determine a constructor"),
    "a list as a key": (b"? [1, 2]\n: y\n", "mine.yaml, line 1: found unhashable key"),
}
MADE = {
    "nothing": ("", "suite has no _target_; copy the first lines of one of the shipped suite files"),
    "a list": ("- a\n- b\n", "suite must be one of its options (see epmq list suite), got ['a', 'b']"),
    "a word": ("hello\n", "suite has no _target_"),
    "a default that is not there": ("defaults: [nope]\n", "In 'suite/mine': Could not load 'suite/nope'."),
    "a reference to nothing": ("name: ${nowhere}\n", "Interpolation key 'nowhere' not found"),
    "a variable that is not set": ("name: ${oc.env:EPMQ_NOT_SET}\n", "Environment variable 'EPMQ_NOT_SET' not found"),
    "no class": ("_target_: 3\n", "suite._target_ must name one of epmq's classes, got 3"),
    "a class without keys": (
        "_target_: epmq_cli.data.suite.Suite\n",
        "suite needs name, family, base, tasks, but nothing is",
    ),
    "a number as a key": (
        "_target_: epmq_cli.data.suite.Suite\n1: x\n",
        "suite has no option '1', the options are name",
    ),
}


@pytest.mark.parametrize("value", ["rün✓", "a'b", "a b(", 'say "x(', "a=b"])
def test_hydra_accepts_the_suggested_quoting(value: str) -> None:
    (word,) = shlex.split(quoted(f"out={value}"))
    parsed([word])
    (override,) = OverridesParser.create().parse_overrides([word])
    assert override.value() == value


QUOTED = {
    "suite.experts=/path/{task}": """write 'suite.experts="/path/{task}"'""",
    "suite.experts={task}/best": """write 'suite.experts="{task}/best"'""",
    "suite.base=/models/llama(old)": """has ( ) in its value, which needs quotes""",
    "suite.base=/models/[1]": """write 'suite.base="/models/[1]"'""",
    "suite.experts={a: /x (1), b: /y}": """cannot be read as a list or dict; put quotes around each text in it""",
    "suite.each.templates=[a photo of a {}.]": "as in 'suite.each.templates=[",
}


@pytest.mark.parametrize("typed", QUOTED)
def test_the_error_for_an_unquoted_override_shows_the_quoting(typed: str) -> None:
    """Hydra's parser rejects the override as typed; with the quoting of the message, its value is the intended text."""
    with pytest.raises(OverrideParseException):
        OverridesParser.create().parse_overrides([typed])
    with pytest.raises(ConfigError) as found:
        parsed([typed])
    assert QUOTED[typed] in str(found.value)
    _, written, way_out = str(found.value).partition("; write ")
    if written:
        assert parsed(shlex.split(way_out))[0].value() == typed.partition("=")[2]


def test_other_syntax_errors_are_those_of_hydra() -> None:
    for typed in ("merge=ties,", "bits=choice(3,4", "suite.experts"):
        with pytest.raises(OverrideParseException):
            parsed([typed])


def one_sentence(text: str, message: str) -> None:
    lines = text.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("epmq: ")
    assert message in lines[0].replace("\\", "?")


@pytest.mark.parametrize("typed", TYPED)
def test_invalid_overrides_are_refused_in_one_sentence(typed: str, epmq_inside: Run, tmp_path: Path) -> None:
    result = epmq_inside(*typed.split())
    assert result.returncode == 1
    one_sentence(result.stderr, TYPED[typed])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("case", WRITTEN)
def test_a_config_file_that_cannot_be_read_is_named(case: str, epmq_inside: Run, tmp_path: Path) -> None:
    content, message = WRITTEN[case]
    (tmp_path / "configs" / "suite").mkdir(parents=True)
    (tmp_path / "configs" / "suite" / "mine.yaml").write_bytes(content)
    result = epmq_inside("run", "--config-dir", "configs", "suite=mine", "out=x")
    assert result.returncode == 1
    one_sentence(result.stderr, "a config file cannot be read: ")
    one_sentence(result.stderr, message)
    assert not (tmp_path / "x").exists()


FAST = ("a list", "a default that is not there", "a reference to nothing", "no class")


@pytest.mark.parametrize("case", only(FAST, MADE))
def test_a_config_file_without_a_valid_suite_is_refused(case: str, epmq_inside: Run, tmp_path: Path) -> None:
    content, message = MADE[case]
    (tmp_path / "configs" / "suite").mkdir(parents=True)
    (tmp_path / "configs" / "suite" / "mine.yaml").write_text(content)
    result = epmq_inside("run", "--config-dir", "configs", "suite=mine", "out=x")
    assert result.returncode == 1
    one_sentence(result.stderr, message)


def test_out_may_be_a_number(epmq_inside: Run, tmp_path: Path) -> None:
    assert epmq_inside("merge", "out=7").returncode == 0
    assert (tmp_path / "7" / "checkpoint").is_dir()


def test_optional_fields_of_a_suite_can_be_set_without_a_plus() -> None:
    given = ["suite.processor=base", "suite.each.heads=expert", "suite.tasks.a.b.processor=same"]
    assert addable(given) == [f"++{text}" for text in given]
    others = ["suite.name=x", "+suite.processor=base", "guidance.heads=own", "suite.tasks.a.data.processor.x=1", "-m"]
    assert addable(others) == others


def test_a_sweep_over_a_group_takes_options_of_its_members() -> None:
    sweep = ["-m", "merge=soft_merging,adamerging", "lr=0.1,0.2", "guidance=feature", "guidance.lam=0.1"]
    assert addable([*sweep, "merge.steps=100"]) == [*sweep, "++merge.steps=100"]
