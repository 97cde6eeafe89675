"""`horovodrun --compression scalecom -np 4 python train.py`: the launcher's half of the Horovod adapter.

Horovod builds its command line inside one function, so `install` gives that function's module a parser that knows two
more options. They, and the section `compression:` of Horovod's own `--config-file`, become one validated configuration,
exported to the workers in one environment variable, which Gloo, MPI and elastic launches all forward. Nothing here
imports torch: the launcher may run where there is none.

The same without any hook into `horovodrun`: `compression-plugins horovodrun ...`, which calls `main`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...errors import CompressionError, ConfigError

_VARIABLE = "COMPRESSION_PLUGINS_CONFIG"
_HELP = {
    "--compression": "compress gradients: the name of a scheme (`compression-plugins schemes` lists them), or the path "
    "of a YAML or JSON file. Replaces the section `compression:` of --config-file.",
    "--compression-set": "change one key of the compression config, for example ratio=100. May be repeated.",
}


def install() -> None:
    """Teach `horovodrun` the compression options. Idempotent.

    Raises:
        RuntimeError: this Horovod builds its parser in another way.
    """
    import horovod
    from horovod.runner import launch

    if isinstance(launch.argparse, _Argparse):
        return
    if launch.argparse is not argparse:
        raise RuntimeError(
            f"horovod {horovod.__version__}: horovod.runner.launch does not use argparse as 0.28 does; "
            f"export {_VARIABLE} instead of using --compression"
        )
    launch.argparse = _Argparse()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `horovodrun` with the compression options; `argv` without the program's name. Returns the exit status."""
    try:
        from horovod.runner import launch
    except ImportError as error:
        print(
            f"compression-plugins horovodrun: Horovod cannot be imported ({error}); "
            "`python -m compression_plugins.install_horovod` builds and installs it",
            file=sys.stderr,
        )
        return 1
    install()
    if argv is not None:
        sys.argv = ["horovodrun", *argv]
    launch.run_commandline()
    return 0


def configuration(compression: str | None, settings: Sequence[str], config_file: str | None) -> dict[str, Any] | None:
    """The configuration that the command line asks for, complete and validated; None if it asks for none.

    Args:
        compression: name of a scheme or path of a file (`--compression`).
        settings: `KEY=VALUE` texts (`--compression-set`); values are YAML: `0.5`, `true`, `[a, b]`.
        config_file: Horovod's `--config-file`, whose section `compression:` holds a name, a path or a mapping.

    Raises:
        CompressionError: one sentence naming the mistake and the nearest valid choice.
    """
    source = compression if compression is not None else _section(config_file)
    if source is None and not settings:
        return None
    from ...config import Config, parse_assignments

    if source is None:
        raise ConfigError("--compression-set needs a scheme: add --compression NAME, or compression: to --config-file")
    return Config.load(source, parse_assignments(settings)).to_dict()


def _section(config_file: str | None) -> str | Mapping[str, Any] | None:
    if config_file is None:
        return None
    from ...config import read_document

    try:
        text = Path(config_file).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {config_file}: {error.strerror}") from None
    if not re.search(rb"\bcompression[\"']?\s*:", text):
        return None  # all that is in it is Horovod's own business
    section = read_document(config_file).get("compression")
    if section is None or isinstance(section, str | dict):
        return section
    raise ConfigError(
        f"--config-file {config_file}: compression must be a scheme's name, a path or a mapping, "
        f"not {type(section).__name__}"
    )


def _check_door() -> None:
    """Workers join at their `import torch`, through an entry point of the installed package."""
    entries = importlib.metadata.entry_points(group="torch.backends")
    if not any(entry.value.startswith("compression_plugins.") for entry in entries):
        raise CompressionError(
            "compression_plugins is importable but not installed, so that workers would not notice it: "
            "`pip install` it, or import compression_plugins.horovod in the script"
        )


class _Parser(argparse.ArgumentParser):
    """Horovod's parser plus the compression options, which it turns into an environment variable at once."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        group = self.add_argument_group("compression arguments")
        group.add_argument("--compression", metavar="NAME|FILE", help=_HELP["--compression"])
        group.add_argument(
            "--compression-set", metavar="KEY=VALUE", action="append", default=[], help=_HELP["--compression-set"]
        )
        parsed = super().parse_args(args, namespace)
        try:
            config = configuration(parsed.compression, parsed.compression_set, parsed.config_file)
            if config is not None:
                _check_door()
        except CompressionError as error:
            self._refuse(error)
        if config is not None:
            os.environ[_VARIABLE] = json.dumps(config)
            if config["levels"] is not None:
                os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
        return parsed

    def _refuse(self, error: CompressionError) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {error}\n")  # without the usage, which takes eighty lines


class _Argparse:
    """`argparse` as `horovod.runner.launch` sees it."""

    ArgumentParser = _Parser

    def __getattr__(self, name: str) -> Any:
        return getattr(argparse, name)


if __name__ == "__main__":  # through the package, so that this module is not loaded a second time under another name
    from compression_plugins.adapters.horovod import launch

    sys.exit(launch.main(sys.argv[1:]))
