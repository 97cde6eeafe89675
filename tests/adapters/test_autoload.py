"""The one door: adapters are installed after their hosts, and nobody is hurt who did not ask."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compression_plugins.adapters import autoload

ADAPTER = """
from fake_host import engine
calls = []
def install():
    calls.append(engine.VALUE)
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bool], None]]:
    """`host(adapter_source, needs_configuration)` makes the package `fake_host` and the adapter `fake_adapter`."""
    before = list(sys.meta_path)
    sys.meta_path[:] = [finder for finder in before if not isinstance(finder, autoload.HostFinder)]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("COMPRESSION_PLUGINS_CONFIG", raising=False)
    (tmp_path / "fake_host").mkdir()
    (tmp_path / "fake_host" / "__init__.py").touch()
    (tmp_path / "fake_host" / "engine.py").write_text("VALUE = 42\n")

    def make(adapter: str = ADAPTER, needs_configuration: bool = False) -> None:
        (tmp_path / "fake_adapter.py").write_text(adapter)
        monkeypatch.setattr(autoload, "_ADAPTERS", {"fake_host.engine": ("fake_adapter", needs_configuration)})

    yield make
    sys.meta_path[:] = before
    for name in ("fake_host", "fake_host.engine", "fake_adapter"):
        sys.modules.pop(name, None)


def calls() -> list[int]:
    adapter = sys.modules.get("fake_adapter")
    return [] if adapter is None else adapter.calls


def test_an_adapter_is_installed_right_after_its_host(host: Callable[..., None]) -> None:
    host()
    autoload.autoload()
    importlib.import_module("fake_host")
    assert calls() == []
    importlib.import_module("fake_host.engine")
    assert calls() == [42]


def test_a_host_that_is_imported_already_is_joined_at_once(host: Callable[..., None]) -> None:
    host()
    importlib.import_module("fake_host.engine")
    autoload.autoload()
    assert calls() == [42]


def test_calling_twice_changes_nothing(host: Callable[..., None]) -> None:
    host()
    autoload.autoload()
    autoload.autoload()
    assert sum(isinstance(finder, autoload.HostFinder) for finder in sys.meta_path) == 1
    importlib.import_module("fake_host.engine")
    autoload.autoload()
    assert calls() == [42]


def test_the_host_module_looks_as_if_nobody_had_been_there(host: Callable[..., None]) -> None:
    host()
    autoload.autoload()
    module = importlib.import_module("fake_host.engine")
    assert type(module.__loader__).__module__ != autoload.__name__ and module.__spec__.loader is module.__loader__
    assert inspect.getsource(module) == "VALUE = 42\n"
    importlib.reload(module)
    assert module.VALUE == 42


def test_other_finders_are_asked_in_their_order(host: Callable[..., None], tmp_path: Path) -> None:
    host()
    (tmp_path / "elsewhere.py").write_text("VALUE = 43\n")

    class Editable(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: object, target: object = None) -> object:
            if fullname == "fake_host.engine":
                return importlib.util.spec_from_file_location(fullname, tmp_path / "elsewhere.py")
            return None

    sys.meta_path.insert(0, Editable())
    autoload.autoload()
    importlib.import_module("fake_host.engine")
    assert calls() == [43]


def test_a_job_without_configuration_is_left_alone(host: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    host(needs_configuration=True)
    autoload.autoload()
    module = importlib.import_module("fake_host.engine")
    assert "fake_adapter" not in sys.modules
    monkeypatch.setenv("COMPRESSION_PLUGINS_CONFIG", "{}")
    importlib.reload(module)
    assert calls() == [42]


def test_a_failing_adapter_stops_only_a_job_that_wants_compression(
    host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    host("def install():\n    raise RuntimeError('the host has changed')\n")
    autoload.autoload()
    with pytest.warns(
        RuntimeWarning, match="fake_host.engine, which stays as it is: RuntimeError: the host has changed"
    ):
        importlib.import_module("fake_host.engine")
    del sys.modules["fake_host.engine"]
    monkeypatch.setenv("COMPRESSION_PLUGINS_CONFIG", "{}")
    with pytest.raises(RuntimeError, match="the host has changed"):
        importlib.import_module("fake_host.engine")


def test_an_adapter_that_imports_its_host_first_installs_itself(host: Callable[..., None]) -> None:
    host(ADAPTER + "install()\n")
    autoload.autoload()
    importlib.import_module("fake_adapter")
    assert calls() == [42]


def test_a_missing_host_is_a_plain_import_error(host: Callable[..., None]) -> None:
    host()
    autoload.autoload()
    autoload._ADAPTERS["fake_host.absent"] = ("fake_adapter", False)
    with pytest.raises(ModuleNotFoundError, match="fake_host.absent"):
        importlib.import_module("fake_host.absent")


def test_autoload_never_raises(host: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    host("import nothing_of_that_name\n")
    monkeypatch.setenv("COMPRESSION_PLUGINS_CONFIG", "{}")
    importlib.import_module("fake_host.engine")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        autoload.autoload()
    assert any("compression_plugins is inactive" in str(warning.message) for warning in caught)


def test_the_door_costs_no_heavy_import() -> None:
    program = (
        "import sys; before = set(sys.modules)\n"
        "from compression_plugins.adapters import autoload; autoload.autoload()\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'horovod', 'deepspeed', 'triton', 'numba'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_torch_finds_the_door() -> None:
    (entry,) = [e for e in importlib.metadata.entry_points(group="torch.backends") if e.name == "compression_plugins"]
    assert entry.load() is autoload.autoload
    program = (
        "import sys, torch\n"
        "print(torch.__version__, [type(f).__name__ for f in sys.meta_path].count('HostFinder'))\n"
        "assert not {'horovod', 'deepspeed'} & set(sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stdout.split()[1] == "1", (
        f"torch loads no backends: {done.stdout}{done.stderr}"
    )


def test_joining_horovod_imports_no_compiler() -> None:
    """`horovodrun` imports Horovod twice before it starts a job, to ask what it was built with."""
    pytest.importorskip("horovod.torch")
    program = "import sys, horovod.torch\n"
    program += "print('compression_plugins.adapters.horovod.optimizer' in sys.modules, 'torch._dynamo' in sys.modules)"
    environment = {**os.environ, "COMPRESSION_PLUGINS_CONFIG": '{"scheme": "scalecom"}'}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split() == ["True", "False"], done.stdout + done.stderr
