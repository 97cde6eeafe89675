"""One door for unmodified scripts: install an adapter when, and only when, its host is imported.

`autoload` is called by torch's plug-in mechanism (entry-point group `torch.backends`) at the end of `import torch`, and
by a `.pth` line at interpreter start. Both happen in every Python process of the environment, so this module imports
nothing that the interpreter has not imported already, and `autoload` never raises.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as in typing, whose import alone would cost every interpreter start two milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

#: The variable in which a launcher hands the configuration to its workers (`compression_plugins.config` reads it).
_CONFIG_VARIABLE = "COMPRESSION_PLUGINS_CONFIG"

#: Host module -> (adapter whose `install()` runs right after it, does it need a configuration in the environment?).
#: DeepSpeed jobs ask in their own config, which Accelerate may read first, and `horovodrun` on its command line, so
#: those are always prepared.
_ADAPTERS = {
    "accelerate.utils.dataclasses": ("compression_plugins.adapters.deepspeed.clients", False),
    "accelerate.utils.deepspeed": ("compression_plugins.adapters.deepspeed.clients", False),
    "deepspeed.runtime.engine": ("compression_plugins.adapters.deepspeed.engine", False),
    "horovod.torch.optimizer": ("compression_plugins.adapters.horovod.optimizer", True),
    "horovod.runner.launch": ("compression_plugins.adapters.horovod.launch", False),
    "torch.nn.parallel.distributed": ("compression_plugins.adapters.ddp.notice", True),
}


def autoload() -> None:
    """Watch for the hosts; adapters of hosts that are imported already are installed now. Idempotent; never raises."""
    try:
        finder = next((finder for finder in sys.meta_path if isinstance(finder, HostFinder)), None)
        if finder is None:
            finder = HostFinder()
            sys.meta_path.insert(0, finder)
        for name in _ADAPTERS:
            module = sys.modules.get(name)
            initializing = module is not None and getattr(module.__spec__, "_initializing", False)
            if module is not None and not initializing and name not in finder.joined:
                finder.joined.add(name)
                install_adapter(name)
    except Exception as error:  # a failure here would break `import torch` for everybody
        import warnings

        warnings.warn(f"compression_plugins is inactive: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)


def install_adapter(host: str) -> None:
    """Install the adapter of the host module `host` if this job may use it.

    Raises:
        Exception: whatever the adapter raises, but only if the job was configured to compress through the environment:
            training on uncompressed would be a silent fallback. In any other job the host goes on untouched.
    """
    adapter, needs_configuration = _ADAPTERS[host]
    configured = bool(os.environ.get(_CONFIG_VARIABLE))
    if needs_configuration and not configured:
        return
    import importlib

    try:
        module = importlib.import_module(adapter)
        if not getattr(
            module.__spec__, "_initializing", False
        ):  # else it is what imports the host, and installs itself
            module.install()
    except Exception as error:
        if configured:
            raise
        import warnings

        message = f"compression_plugins cannot join {host}, which stays as it is: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class HostFinder:
    """Finds nothing itself: asks the finders behind it and adds the adapter to what they found.

    Parts of torch are no business of it: they come before torch is complete, and `autoload` is called when it is.

    Attributes:
        joined: hosts whose adapters are installed.
    """

    def __init__(self) -> None:
        self.joined: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ADAPTERS or fullname.startswith("torch."):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if isinstance(finder, HostFinder) or find is None:
                continue
            spec = find(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _InstallingLoader(spec.loader, fullname)
                    self.joined.add(fullname)
                return spec
        return None


class _InstallingLoader:
    """Executes the module as its own loader would, leaves no trace in it, then installs the adapter.

    The module is not yet an attribute of its package then: adapters write `from package import module`.
    """

    def __init__(self, loader: Any, host: str) -> None:
        self._loader, self._host = loader, host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        install_adapter(self._host)
