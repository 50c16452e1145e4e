"""Oracles: the input and expectations of users; every config composes and can be instantiated, by glob."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from epmq_cli import __version__, cli, commands
from epmq_cli.commands import list as command_list
from epmq_cli.commands.describe import page as page_of
from epmq_cli.config.files import head_of
from epmq_cli.config.instantiate import build, check_complete, conf_dir
from epmq_cli.errors import ConfigError
from epmq_cli.merge.post import POSTS
from epmq_cli.pipeline.job import read_job
from epmq_cli.quantize.build import build_quantizer
from epmq_cli.quantize.hqq import Hqq
from epmq_cli.refine.distill import Distill
from epmq_cli.report.sweep_table import SweepTable
from tests.conftest import Run
from tests.helpers.tiers import first, only, slow

METHODS = Path(__file__).parents[1].joinpath("docs/merge-methods.md").read_text(encoding="utf-8")
GROUPS = sorted(path.relative_to(conf_dir()).with_suffix("") for path in conf_dir().glob("*/*.yaml"))
METHODS = ", ".join(sorted(path.stem for path in (conf_dir() / "merge").glob("*.yaml")))
EXPERIMENTS = [path for path in GROUPS if path.parent.name == "experiment"]
RECIPES = [path for path in GROUPS if path.parent.name == "recipe"]
TRACKERS = [path for path in GROUPS if path.parent.name == "tracking"]
OTHERS = [path for path in GROUPS if path not in (*EXPERIMENTS, *RECIPES, *TRACKERS)]
REPEATED = ("_b16_", "_l14_", "_tall14", "_tall20")
BUILT = [slow(path) if any(part in path.name for part in REPEATED) else path for path in OTHERS]
"""Suites of 14 or 20 tasks, or for ViT-B/16 or ViT-L/14, are slow: they equal the others but for tasks and models."""


@cache
def base() -> DictConfig:
    return compose("run", overrides=["out=x"])


@pytest.mark.parametrize("option", BUILT, ids=str)
def test_every_config_composes_and_can_be_instantiated(option: Path) -> None:
    """With the overrides of its own first line, if values are required, or with its bits.

    Of `merge`, which has the most options, the composed file replaces the default in a composed run.
    """
    group = option.parent.name
    command = shlex.split((conf_dir() / option).with_suffix(".yaml").read_text().splitlines()[0])
    bits = ("bits=", "group_size=") if group == "quant" else ()
    given = [part for part in command if part.startswith((f"{group}.", *bits))]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        if group == "merge":
            cfg = base().copy()
            cfg.merge = compose(str(option), overrides=given).merge
        else:
            cfg = compose("run", overrides=[f"{group}={option.name}", *given, "out=x"])
    built = build_quantizer(cfg.quant) if group == "quant" else build(group, cfg[group])
    assert type(built).__module__ == cfg[group]._target_.rsplit(".", 1)[0]


@pytest.mark.parametrize("option", first(1, EXPERIMENTS), ids=str)
def test_every_experiment_composes_and_can_be_overridden(option: Path) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=[f"experiment={option.name}", "out=x"])
        other = compose("run", overrides=[f"experiment={option.name}", "suite=tiny", "bits=3", "out=x"])
    for group in ("suite", "merge", "guidance"):
        build(group, cfg[group])
    build_quantizer(cfg.quant)
    assert (other.suite.name, other.bits) == ("tiny", 3)
    assert cfg.suite.name != "tiny"


@pytest.mark.parametrize("option", RECIPES, ids=str)
def test_every_recipe_only_chooses_options_that_exist_and_can_be_overridden(option: Path) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=[f"recipe={option.name}", "out=x"])
        other = compose("run", overrides=[f"recipe={option.name}", "quant=hqq", "calib.views=2", "bits=3", "out=x"])
        defaults = base()
    check_complete(cfg, "run")
    job = read_job(cfg)
    assert isinstance(job.refine, Distill) == (option.name == "best")
    assert job.quantizer.needs == (frozenset() if option.name == "fast" else {"inputs"})
    assert (option.name == "balanced") == (cfg == defaults)
    assert isinstance(build_quantizer(other.quant), Hqq)
    assert (other.calib.views, other.bits, other.guidance) == (2, 3, cfg.guidance)


@pytest.mark.parametrize("option", TRACKERS, ids=str)
def test_every_tracker_composes_into_hydras_callbacks(option: Path) -> None:
    """And is not a part of the config, on which results depend."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=[f"tracking={option.name}", "out=x"], return_hydra_config=True)
    made = {name: instantiate(node) for name, node in cfg.hydra.callbacks.items()}
    assert isinstance(made.pop("table"), SweepTable)
    assert [tracker.package for tracker in made.values()] == ([] if option.name == "none" else [option.name])
    assert "tracking" not in cfg


TASKS = sorted((conf_dir() / "suite").glob("*/*.yaml"))


@pytest.mark.parametrize("path", [*TASKS, *((conf_dir() / option).with_suffix(".yaml") for option in GROUPS)], ids=str)
def test_every_config_opens_with_its_command_and_description(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @")]
    assert lines[0].startswith(("# epmq run ", "# epmq merge "))
    assert lines[1].startswith("# ")
    assert len(lines[1]) > 15


def test_list_shows_every_option_with_one_line_under_headings(epmq: Run) -> None:
    """Oracle: the files in conf/, and the table of merge methods in the documentation."""
    result = epmq("list")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    shown = [line for line in lines if "=" in line.split("  ")[0] and not line.startswith("epmq")]
    assert sorted(line.split()[0] for line in shown) == [f"{path.parent.name}={path.name}" for path in GROUPS]
    assert all(len(line.split()) > 3 and "http" not in line for line in shown)
    assert [line.split(":")[0] for line in lines if re.match(r"\w+: ", line)] == list(command_list.GROUPS)
    gallery = epmq("list", "merge").stdout.splitlines()
    kinds: dict[str, list[str]] = {}
    for line in gallery[2 : gallery.index("parameters of most methods, as their pages show") - 1]:
        if line.startswith("  "):
            kinds[line.strip()] = []
        else:
            assert line in lines
            kinds[next(reversed(kinds))].append(line.split()[0].removeprefix("merge="))
    table = METHODS.split("## Which one?")[0]
    for row in re.findall(r"^\| ([a-z, ]+) \| (.*) \|$", table, re.M):
        own = [name for name in re.findall(r"`(\w+)`", row[1]) if (conf_dir() / f"merge/{name}.yaml").is_file()]
        with_gradients = kinds.get(f"{row[0]} and gradients", [])
        assert sorted([*kinds[row[0]], *with_gradients]) == sorted(own)
    assert [line.split()[0] for line in gallery if line.startswith("merge.")] == ["merge.post", "merge.space"]


def test_a_terminal_gets_lines_no_wider_than_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert command_list._lines({"a=b": "short", "a=c": "x" * 80}) == ["a=b  short", f"a=c  {'x' * 34}…"]


def test_the_list_imports_no_slow_library() -> None:
    """Each of them takes a tenth of a second or more."""
    code = "import sys; from epmq_cli.commands.list import main; main([]); "
    code += "sys.exit(bool({'rich', 'yaml', 'omegaconf', 'hydra', 'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


NEEDS = {
    frozenset(): "nothing but the models",
    frozenset({"batches"}): "calibration samples",
    frozenset({"batches", "gradients"}): "calibration samples and gradients",
}


@pytest.mark.parametrize("path", sorted((conf_dir() / "merge").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_merge_method_states_its_facts(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    stated = head_of(lines).facts
    assert {"kind", "formula", "needs", "memory"} <= {*stated}
    assert stated["needs"] == NEEDS[get_class(str(OmegaConf.load(path)._target_)).needs]
    assert re.search(r"\((19|20)\d\d, https://", lines[1]) or path.stem in ("given", "mergekit", "none")


def test_the_page_of_an_option_has_its_facts_its_parameters_and_its_command(epmq: Run) -> None:
    shown = epmq("list", "merge=dare_ties").stdout
    assert "\nformula   θ₀ + scale Σ of those dropped" in shown
    assert "\n  density  0.5      a number in (0, 1], per tensor and expert\n" in shown
    assert shown.endswith("\nexample   epmq run merge=dare_ties\n")
    gptq = epmq("list", "quant=gptq").stdout
    assert "\nsource    https://arxiv.org/abs/2210.17323\n" in gptq
    assert re.search(r"\n  damping +0.001 +a number in \(0, 1\]\n +added to the Hessian", gptq)
    wrong = epmq("list", "merge=dare_tise")
    assert (wrong.returncode, wrong.stderr) == (
        1,
        "epmq: merge has no option 'dare_tise'; did you mean dare_ties?\n",
    )


@pytest.mark.parametrize("path", sorted((conf_dir() / "merge").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_page_of_a_merge_shows_the_parameters_that_it_takes_beside_its_file(path: Path) -> None:
    """Oracle: what the method accepts."""
    shown = page_of("merge", path.stem, path)
    if path.stem in ("mergekit", "slices"):
        assert "\n  post " not in shown
        return
    assert re.search(r"\n  post +\[\] +a list of lines, svc\n", shown)
    node = OmegaConf.load(path)
    node.update({name: True for name in ("normalize", "task_vectors") if name in node} | {"space": "core"})
    node.update({name: value for name, value in {"path": "x", "seed": 0}.items() if name in node.keys()})  # noqa: SIM118  missing values
    try:
        build("merge", node)
    except ConfigError as error:
        assert "choose merge.space=full" in str(error)
        assert "\n  space " not in shown
    else:
        assert re.search(r"\n  space +full +one of full, core\n", shown)
    assert ("; it needs task_vectors=true" in re.sub(r"\s+", " ", shown)) == (path.stem in ("multislerp", "nuslerp"))


def test_list_shows_the_post_processors_of_merges(epmq: Run) -> None:
    """Oracle: the defaults of their classes."""
    shown = epmq("list", "merge.post").stdout
    for name, kind in POSTS.items():
        own = epmq("list", f"merge.post={name}").stdout
        assert own.startswith(f"merge.post=[{name}]\n")
        assert own.endswith(f"\nexample   epmq run merge=ties merge.post=[{name}]\n")
        assert "https://" in kind.summary
        for field in dataclasses.fields(kind):
            default = "null" if field.default is None else field.default
            assert all(re.search(rf"\n  {field.name} +{default} ", text) for text in (shown, own))
        assert not any(f"\n{other} " in own for other in POSTS if other != name)
    wrong = epmq("list", "merge.post=scv")
    assert (wrong.returncode, wrong.stderr) == (1, "epmq: merge.post has no option 'scv'; did you mean svc?\n")


def test_list_shows_the_users_own_configs_and_refuses_unknown_groups(epmq: Run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "suite").mkdir(parents=True)
    (tmp_path / "mine" / "suite" / "birds.yaml").write_text("# epmq run --config-dir mine suite=birds\n# Birds.\n")
    assert re.search(r"\nsuite=birds +Birds\n", epmq("list", "suite", "--config-dir", "mine").stdout)
    wrong = epmq("list", "nope")
    assert wrong.returncode == 1
    assert (
        "the groups are calib, eval, experiment, guidance, merge, pack, quant, recipe, refine, suite, tracking"
        in wrong.stderr
    )
    assert epmq("list", "--config-dir", "gone").returncode == 1


def test_help_of_the_command_and_its_subcommands(epmq: Run) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        assert epmq(*arguments).stdout == cli.usage()
    for command in ("run", "merge", "eval"):
        page = epmq(command, "--help")
        assert page.returncode == 0
        assert page.stdout.startswith(f"usage: epmq {command}")
    page = epmq("verify", "--help")
    assert (page.returncode, page.stdout.split(" [-h]")[0]) == (0, "usage: epmq verify")
    page = epmq("run", "--help").stdout
    for path in GROUPS:
        assert path.name in page
    assert "tiny*" in page
    assert "# weight of the anchor" in page
    assert max(map(len, page.splitlines())) <= 125
    page = epmq("run", "merge=ties", "guidance=expert", "merge.scale=1", "--help").stdout
    assert "merge=ties: override with merge.key=value\n  density: 0.2" in page
    assert "\nguidance=expert: " in page
    assert "epmq list merge=ties" in page


def test_version_and_unknown_commands(epmq: Run) -> None:
    assert epmq("--version").stdout == f"epmq {__version__}\n"
    result = epmq("rnu")
    assert result.returncode == 1
    assert (
        result.stderr
        == "epmq: unknown command 'rnu'; the commands are run, merge, eval, verify, inspect, report, export, push, "
        "list. "
        "Did you mean run?\n"
    )


WRONG = {
    "run merge=nope": f"merge=nope does not exist; the options are {METHODS} (see ",
    "run merge.nope=1": "merge has no option 'nope', the options are scale, weights\n",
    "run merge=ties merge.densty=1": "merge has no option 'densty', the options are density, scale, combine, weights, ",
    "run bit=3": "the config has no option 'bit', the options are suite, merge, guidance, refine, calib, quant, pack, ",
    "run mrege=ties": "the config has no option 'mrege'",
    "run merge": "Error parsing override 'merge'; missing EQUAL at '<EOF>'",
    "eval x samples=3": "the config has no option 'samples', the options are ",
}
FAST = ("run merge=nope", "run merge=ties merge.densty=1", "run merge", "eval x samples=3")


@pytest.mark.parametrize("arguments", only(FAST, WRONG))
def test_errors_for_unknown_names_list_the_known_ones(arguments: str, epmq_inside: Run) -> None:
    result = epmq_inside(*arguments.split())
    assert result.returncode == 1
    assert result.stderr.startswith(f"epmq: {WRONG[arguments]}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_the_error_for_an_unknown_config_suggests_config_dir(epmq_inside: Run) -> None:
    """The suggestion appears only if --config-dir is missing."""
    assert epmq_inside("run", "suite=mine").stderr.endswith(
        "(see epmq list suite); to use one of your own, add --config-dir FOLDER\n"
    )
    given = epmq_inside("run", "suite=mine", "--config-dir", ".")
    assert given.stderr.endswith("(see epmq list suite)\n")


@pytest.mark.parametrize(
    "given", ["none good", "none checkpoint=good", "a=b good", "none +checkpoint=good eval=default"]
)
def test_eval_takes_one_checkpoint(given: str, epmq_inside: Run, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "a=b").mkdir()
    first, second = given.split()[:2] if given[0] != "a" else ("a=b", "good")
    said = f"epmq: epmq eval scores one checkpoint at a time, got {first} and {second}; give one, or several as "
    assert epmq_inside("eval", *given.split()).stderr.startswith(said)


def test_overrides_that_add_or_remove_options_are_not_checkpoints() -> None:
    given = ["x", "~suite.tasks.y", "+a.b", "~merge=ties", "+c=3", "device=cpu"]
    assert cli._with_checkpoint(given) == ["checkpoint='x'", *given[1:]]


def complete(line: str, epmq: Run) -> list[str]:
    result = epmq("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("epmq ", ["run", "merge", "eval", "verify", "inspect", "report", "export", "push", "list"]),
        slow(("epmq e", ["eval", "export"])),
        slow(("epmq run mer", ["merge=", "merge."])),
        ("epmq run merge=t", ["merge=task_arithmetic", "merge=ties", "merge=tsv_m"]),
        ("epmq run merge=ties merge.d", ["merge.density="]),
        slow(("epmq eval eval.b", ["eval.batch_size="])),
    ],
)
def test_completion(line: str, expected: list[str], epmq: Run) -> None:
    assert sorted(complete(line, epmq)) == sorted(expected)


@pytest.mark.parametrize(
    "order", ["--config-dir mine {} -m", "{} --config-dir mine -m", "-m bits=3 --config-dir mine {}"]
)
def test_options_and_overrides_come_in_any_order(order: str) -> None:
    overrides, flags = cli.split(order.format("merge=ties suite=mine").split())
    assert [override for override in overrides if override != "bits=3"] == ["merge=ties", "suite=mine"]
    assert sorted(flags) == ["--config-dir", "-m", "mine"]
    assert flags[flags.index("--config-dir") + 1] == "mine"


def test_completion_can_be_installed(epmq: Run) -> None:
    assert "COMP_LINE" in epmq("-sc", "install=bash").stdout


def test_the_cli_module_imports_neither_torch_nor_hydra() -> None:
    code = "import sys, epmq_cli.cli; sys.exit(bool({'torch', 'hydra', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command_modules_do_not_import_torch() -> None:
    """Importing torch takes seconds, which would delay every completion and error message."""
    names = [path.stem for path in Path(commands.__path__[0]).glob("*.py")]
    modules = ", ".join(f"epmq_cli.commands.{name}" for name in names if name != "__init__")
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers', 'numba'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_users_configs_cannot_shadow_shipped_names(epmq: Run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "merge").mkdir(parents=True)
    (tmp_path / "mine" / "merge" / "ties.yaml").write_text("_target_: epmq_cli.merge.average.Average\n")
    shown = epmq("run", "--config-dir", "mine", "merge=ties", "--cfg", "job")
    assert "epmq_cli.merge.ties.Ties" in shown.stdout
