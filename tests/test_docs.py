"""What the documents tell a reader to type works: every command is run here, or names where it is run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from compression_plugins import cli
from compression_plugins.adapters.deepspeed.engine import parse
from compression_plugins.config import Config
from launch.report import README_BEGIN, README_END

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

# Commands that set a machine up. Value: the same, up to the part that would change this machine, and what it then says.
GUARDED = {
    "pip install .": (f"python -m pip install --dry-run --no-deps --no-build-isolation {ROOT}", "Would install"),
    'pip install ".[deepspeed]"': (
        f"python -m pip install --dry-run --no-deps --no-build-isolation {ROOT}[deepspeed]",
        "Would install",
    ),
    "python -m compression_plugins.install_horovod": (
        "python -m compression_plugins.install_horovod --check",
        "Horovod 0.28",
    ),
}
# Targets that run everything, this file too: their recipes are looked at, program by program.
TARGETS = ("make demo", "make test")
QUICK = (
    "compression-plugins schemes",
    "compression-plugins show",
    "compression-plugins explain",
    "compression-plugins advise",
    "compression-plugins rates",
    "compression-plugins bench launch/bench/crossover.yaml --dry-run",
)
SERVERS = ("python -m launch.parameter_server ",)
JOBS = ("horovodrun ", "deepspeed ", "compression-plugins horovodrun ")
DDP_JOBS = ("compression-plugins torchrun ", "env COMPRESSION_PLUGINS_CONFIG")
#: One of each kind; the others differ in schemes and settings, and all flags have their tests in tests/hosts.
EVERY_CHANGE = (
    "horovodrun --compression scalecom.yaml --compression-set ratio=50 -np 2 python train.py",
    "deepspeed --num_accelerators 2 train_deepspeed.py --deepspeed_config ds_config.json",
    "compression-plugins torchrun --compression scalecom --standalone --nproc-per-node 2 train_ddp.py",
)
#: Without it DeepSpeed builds an op that only inference uses, for half a minute.
SITE = ROOT / "tests/hosts/deepspeed/site"


def jobs(prefixes: tuple[str, ...]) -> list[Any]:
    """The jobs of the pages: all of them nightly, those of `EVERY_CHANGE` with `make test` as well."""
    return [
        pytest.param(command, marks=() if command in EVERY_CHANGE else pytest.mark.nightly)
        for command in only(prefixes)
    ]


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block in one of `languages`."""
    found = []
    for page in PAGES:
        for indent, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in languages:
                found.append((page.name, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)))
    return found


def commands() -> list[str]:
    """Every distinct command line of every bash block, without its comment."""
    lines = [line.split(" #")[0].strip() for _, text in blocks("bash") for line in text.splitlines()]
    return sorted({line for line in lines if line and not line.startswith("#")})


def only(prefixes: tuple[str, ...]) -> list[str]:
    return [line for line in commands() if line.startswith(prefixes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's working folder: the files that the commands name, taken from the pages, and two short scripts."""
    place = tmp_path_factory.mktemp("reader")
    short = "import sys\nsys.argv += ['--steps', '3', '--width', '64', '--record', 'record']\n"
    (place / "train.py").write_text(f"{short}from launch.train import main\nmain()\n")
    (place / "train_deepspeed.py").write_text(f"{short}from launch.train_deepspeed import main\nmain()\n")
    (place / "train_ddp.py").write_text((ROOT / "tests/hosts/ddp/scripts/plain.py").read_text())
    (place / "launch").symlink_to(ROOT / "launch")  # commands that need the repository are typed in a clone of it
    (place / "scalecom.yaml").write_text((ROOT / "configs/scalecom.yaml").read_text())
    documents = {
        "job.yaml": next(text for page, text in blocks("yaml") if page == "horovod.md" and "compression:" in text),
        "ds_config.yaml": next(text for page, text in blocks("yaml") if page == "deepspeed.md"),
        "ds_config.json": next(text for page, text in blocks("json") if page == "deepspeed.md"),
    }
    for name, text in documents.items():
        (place / name).write_text(text)
    (place / "net.py").write_text(next(text for page, text in blocks("python") if page == "scalecom.md"))
    return place


def run(command: str, folder: Path) -> str:
    """Run a command as a reader would, with this interpreter's scripts first on the path."""
    scripts = Path(sys.executable).parent
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{SITE}",
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(shlex.split(command), cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_every_command_of_the_pages_is_run_somewhere() -> None:
    assert len(commands()) > 10
    run_here = {*only(QUICK), *only(SERVERS), *only(JOBS), *only(DDP_JOBS), *GUARDED, *TARGETS}
    assert [line for line in commands() if line not in run_here] == []
    taught = commands()
    assert [line for line in (*GUARDED, *TARGETS, *EVERY_CHANGE) if line not in taught] == [], "no page teaches these"


@pytest.mark.parametrize("command", GUARDED)
def test_a_command_that_sets_a_machine_up_works_up_to_that(command: str, folder: Path) -> None:
    if "horovod" in command:
        pytest.importorskip("horovod.torch")
    guarded, says = GUARDED[command]
    text = run(guarded, folder)
    assert says in text and "does not provide the extra" not in text


@pytest.mark.parametrize("command", TARGETS)
def test_a_target_of_make_runs_programs_and_modules_that_there_are(command: str) -> None:
    recipe = subprocess.run(
        [*command.split(), "--no-print-directory", "-n"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    lines = [shlex.split(line.split(" >")[0]) for line in recipe.splitlines() if line.startswith(".venv/bin/")]
    assert lines, recipe
    for program, *arguments in lines:
        assert (Path(sys.executable).parent / Path(program).name).exists(), f"{program} is installed by no extra"
        if arguments[:1] == ["-m"]:
            assert importlib.util.find_spec(arguments[1]) is not None, arguments[1]
    assert (ROOT / recipe.split("python3 ")[-1].split()[0]).exists(), "the set-up comes first"


def test_the_audit_looks_at_what_is_installed_and_says_what_it_needs() -> None:
    recipe = subprocess.run(
        ["make", "--no-print-directory", "audit", "-n"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    *_, install, audit = recipe.splitlines()
    assert "needs the package index" in install
    assert audit.startswith(".venv/audit/bin/pip-audit --path $(.venv/bin/python -c ")


@pytest.mark.parametrize("command", [*only(QUICK), *jobs(SERVERS)])
def test_a_quick_command_works(command: str, folder: Path) -> None:
    assert run(command, folder)


@pytest.mark.hosts
@pytest.mark.parametrize("command", jobs(JOBS))
def test_a_job_of_the_pages_trains_compressed(command: str, folder: Path) -> None:
    pytest.importorskip("deepspeed" if command.startswith("deepspeed") else "horovod.torch")
    text = run(command, folder)
    assert "5 tensors" not in text and "6 tensors" in text, f"no table of a compressed job in\n{text[-3000:]}"
    records = [json.loads(line) for line in (folder / "record/rank1.jsonl").read_text().splitlines()]
    assert records[-1]["kind"] == "end"


@pytest.mark.parametrize("command", [command for command in commands() if "--compression-set" in command])
def test_the_settings_of_a_job_of_the_pages_are_valid(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (name,) = re.findall(r"--compression (\S+)", command)
    settings = re.findall(r"--compression-set (\S+)", command)
    assert settings and cli.main(["show", name, *(word for setting in settings for word in ("--set", setting))]) == 0


@pytest.mark.hosts
@pytest.mark.parametrize("command", jobs(DDP_JOBS))
def test_a_ddp_job_of_the_pages_trains_compressed(command: str, folder: Path) -> None:
    text = run(command, folder)
    assert "6 tensors" in text and '"equal": true' in text and "12 steps on 2 ranks" in text


OF_DEEPSPEED = "migrate-from-deepspeed-1bit.md"  # whole configs, run by tests/hosts/deepspeed/test_one_bit.py


@pytest.mark.parametrize(("page", "text"), [b for b in blocks("yaml", "json") if b[0] != OF_DEEPSPEED])
def test_every_config_on_the_pages_is_valid(
    page: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    document = yaml.safe_load(text)
    if "communication_compression" in document:
        assert parse(document["communication_compression"]) is not None
    else:
        Config.load(document.get("compression", document))


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_every_python_example_parses(page: str, text: str) -> None:
    ast.parse(text)


def test_the_table_of_schemes_is_up_to_date() -> None:
    page = (ROOT / "docs/schemes.md").read_text(encoding="utf-8")
    assert cli.schemes_markdown() in page, (
        "run: compression-plugins schemes --markdown, and put it into docs/schemes.md"
    )


def test_readme_shows_the_table_of_the_committed_demonstration() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.split(README_BEGIN)[1].split(README_END)[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) > 3
    demo = (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    assert [row for row in rows if row not in demo] == []
    assert (ROOT / "docs/demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
