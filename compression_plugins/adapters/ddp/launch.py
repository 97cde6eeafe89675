"""`compression-plugins torchrun --compression scalecom --nproc-per-node 2 train.py`: the launcher's half of DDP.

torchrun's own parser learns two more options. They become one validated configuration, exported to the workers in the
same environment variable that any other launcher may set itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence

from ...config import Config, parse_assignments
from ...config.config import ENVIRONMENT_VARIABLE
from ...errors import CompressionError, ConfigError
from .notice import HOST_VARIABLE

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with the compression options; `argv` without the program's name. Returns the exit status.

    Raises:
        ChildFailedError: torchrun's own, when a worker has failed.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import record

    parser = run.get_args_parser()
    parser.prog = "compression-plugins torchrun"
    group = parser.add_argument_group("compression arguments")
    group.add_argument(
        "--compression",
        metavar="NAME|FILE",
        help="compress gradients: the name of a scheme (`compression-plugins schemes` lists them), or the path of a "
        "YAML or JSON file",
    )
    group.add_argument(
        "--compression-set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change one key of the compression config, for example ratio=100. May be repeated.",
    )
    parsed = parser.parse_args(argv)
    try:
        os.environ.update(variables(parsed.compression, parsed.compression_set))
    except CompressionError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    record(run.run)(parsed)
    return 0


def variables(compression: str | None, settings: Sequence[str]) -> dict[str, str]:
    """What workers find in their environment; nothing where no compression is asked for.

    Args:
        compression: name of a scheme or path of a file (`--compression`).
        settings: `KEY=VALUE` texts (`--compression-set`); values are YAML: `0.5`, `true`, `[a, b]`.

    Raises:
        CompressionError: one sentence naming the mistake and the nearest valid choice.
    """
    if compression is None:
        if settings:
            raise ConfigError("--compression-set needs a scheme: add --compression NAME")
        return {}
    config = Config.load(compression, parse_assignments(settings)).to_dict()
    _check_door()
    return {ENVIRONMENT_VARIABLE: json.dumps(config), HOST_VARIABLE: "ddp"}


def _check_door() -> None:
    """Workers join at their `import torch`, through an entry point of the installed package."""
    instead = "or call compression_plugins.ddp.compress(model, config) in the script"
    entries = importlib.metadata.entry_points(group="torch.backends")
    if not any(entry.value.startswith("compression_plugins.") for entry in entries):
        raise CompressionError(
            "compression_plugins is importable but not installed, so that workers would not notice it: "
            f"`pip install` it, {instead}"
        )
    if os.environ.get(_AUTOLOAD, "1") == "0":
        raise CompressionError(f"{_AUTOLOAD}=0 keeps workers from noticing compression_plugins: unset it, {instead}")
