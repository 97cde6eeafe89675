"""What an install puts where: wheel, editable wheel and source archive are built for real, the wheel is imported."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PTH = "compression_plugins_autoload.pth"


def hook(code: str, cwd: Path) -> str:
    """Call a build hook of hatchling in `cwd`, as pip does; returns the file name it answers."""
    command = [sys.executable, "-c", f"from hatchling import build; print(build.{code})"]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=True).stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return folder / hook(f"build_wheel({str(folder)!r})", ROOT)


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A site-packages folder into which the wheel was unpacked."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_kernels_and_configs_inside_the_package(wheel):
    for folder, pattern in (("triton_kernels", "*.py"), ("configs", "*.yaml")):
        sources = {f"compression_plugins/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob(pattern)}
        assert sources and sources <= names(wheel)


def test_the_wheel_occupies_no_other_name_in_site_packages(wheel):
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"compression_plugins", PTH}


def test_the_links_of_the_clone_point_at_the_top_level_folders():
    for name in ("triton_kernels", "configs"):
        link = ROOT / "compression_plugins" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


def test_the_source_archive_builds_the_same_wheel(wheel, tmp_path):
    archive = tmp_path / hook(f"build_sdist({str(tmp_path)!r})", ROOT)
    with tarfile.open(archive) as source:
        source.extractall(tmp_path, filter="data")
    tree = tmp_path / archive.name.removesuffix(".tar.gz")
    assert names(tmp_path / hook(f"build_wheel({str(tmp_path)!r})", tree)) == names(wheel)


def test_an_editable_install_places_the_start_up_line_too(tmp_path):
    editable = tmp_path / hook(f"build_editable({str(tmp_path)!r})", ROOT)
    assert PTH in names(editable)
    (path_file,) = {name for name in names(editable) if name.endswith(".pth")} - {PTH}
    assert zipfile.ZipFile(editable).read(path_file).decode().strip() == str(ROOT)
    assert path_file < PTH, "site reads .pth files in sorted order: the path must be there before it is imported from"


def test_the_entry_points_lead_to_the_functions_that_exist(wheel):
    name = next(name for name in names(wheel) if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(name).decode()
    assert "[torch.backends]\ncompression_plugins = compression_plugins.adapters.autoload:autoload" in text
    assert "[console_scripts]\ncompression-plugins = compression_plugins.cli:main" in text
    assert "[compression_plugins.commands]\nbench = launch.bench.command\nreport = launch.bench.report" in text


def test_the_commands_of_the_clone_are_modules_with_arguments_and_run():
    for module in ("launch.bench.command", "launch.bench.report"):
        command = importlib.import_module(module)
        assert command.__doc__ and callable(command.add_arguments) and callable(command.run)


def test_an_installed_wheel_says_that_an_experiment_needs_the_clone(site, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.modules['launch'] = None\n"
        "from compression_plugins.cli import main; sys.exit(main(['bench', 'experiment.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("compression-plugins: bench needs 'launch"), done.stderr
    assert "run it from a clone of the repository" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_package_names_nothing_that_the_wheel_does_not_hold():
    """Neither an import of `launch` nor its dotted name in a string."""
    for path in (ROOT / "compression_plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found = [node.module or ""] if not node.level else []
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            else:
                found = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            for name in found:
                assert not re.match(r"launch(\.\w+)*$", name), f"{path.relative_to(ROOT)}:{node.lineno} names {name!r}"


# --- the start-up line ----------------------------------------------------------------------------------------------


def start(site: Path, code: str) -> str:
    """Run `code` in an interpreter that has only the standard library and `site`, whose .pth files it has read."""
    command = [sys.executable, "-S", "-E", "-c", f"import site; site.addsitedir({str(site)!r})\n{code}"]
    done = subprocess.run(command, text=True, capture_output=True, cwd="/")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


def test_the_start_up_line_watches_for_hosts_and_imports_nothing_else(site):
    """Whatever else it imported would be paid by every interpreter start in the environment."""
    line = (site / PTH).read_text()
    code = f"import site, sys; sys.path.append({str(site)!r}); before = set(sys.modules); exec({line!r})"
    code += "; print(type(sys.meta_path[0]).__name__, *sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], text=True, capture_output=True, check=True)
    own = ["compression_plugins", "compression_plugins._version"]
    own += ["compression_plugins.adapters", "compression_plugins.adapters.autoload"]
    assert done.stdout.split() == ["HostFinder", "__future__", *own]


def test_the_start_up_line_is_harmless_without_the_package(tmp_path):
    (tmp_path / PTH).write_text((ROOT / PTH).read_text())
    assert start(tmp_path, "print('alive')") == "alive"


def test_the_start_up_line_survives_a_broken_package(tmp_path):
    (tmp_path / PTH).write_text((ROOT / PTH).read_text())
    (tmp_path / "compression_plugins").mkdir()
    (tmp_path / "compression_plugins" / "__init__.py").write_text("raise RuntimeError('broken')")
    assert start(tmp_path, "print('alive')") == "alive"


def test_the_start_up_line_costs_next_to_nothing(site):
    """Processor time, the best of several interpreter starts; the budget is 2 ms, doubled for a busy machine."""
    line = (site / PTH).read_text()
    code = f"import site, sys, time; sys.path.append({str(site)!r}); begin = time.process_time(); exec({line!r})"
    command = [sys.executable, "-I", "-S", "-c", f"{code}; print(time.process_time() - begin)"]
    costs = [float(subprocess.run(command, text=True, capture_output=True, check=True).stdout) for _ in range(8)]
    assert min(costs) < 4e-3


# --- consistency of the files that describe the install -------------------------------------------------------------


def test_every_pinned_version_is_the_one_these_tests_run_with():
    from importlib import metadata

    for line in (ROOT / "constraints.txt").read_text().splitlines():
        match = re.match(r"([\w.-]+)==([\w.]+)", line)
        if match and not ("python_version" in line and sys.version_info < (3, 11)):
            assert metadata.version(match[1]).split("+")[0] == match[2], line


def test_importing_the_package_and_the_kernels_needs_no_host(tmp_path):
    blocker = "import sys\nfor name in ('horovod', 'deepspeed', 'triton'): sys.modules[name] = None\n"
    code = (
        blocker
        + "import compression_plugins\nfrom compression_plugins import triton_kernels\nprint(triton_kernels.__name__)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=tmp_path, env=env)
    assert done.stdout.strip() == "compression_plugins.triton_kernels", done.stderr
