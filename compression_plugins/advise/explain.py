"""Print the start-up table of a job, tensor by tensor, without a job.

compression-plugins explain --config scalecom --model package.module:example --ranks 8

The function returns a `torch.nn.Module`, or a tuple that begins with one, as that of `rates` does. Buckets are those of
Horovod, of DDP, and of DeepSpeed at ZeRO stage 0; with ZeRO DeepSpeed's own buffers cut them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from torch import nn

from ..config import Config, parse_assignments
from ..engine.table import explain
from ..errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    parser.add_argument("--config", required=True, help="name of a scheme or preset, or path of a YAML or JSON file")
    parser.add_argument("--model", required=True, metavar="MODULE:FUNCTION", help="returns the model, or (model, ...)")
    parser.add_argument("--ranks", type=int, default=8, help="ranks of the job (8)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="replace a key"
    )


def run(options: argparse.Namespace) -> int:
    """The command itself; returns the exit status."""
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: at least 1")
    config = Config.load(options.config, parse_assignments(options.overrides))
    sys.path.insert(0, os.getcwd())  # as for `python -m`
    print(f"{config.scheme.name} on {options.ranks} ranks, {explain(config, load_model(options.model), options.ranks)}")
    return 0


def load_model(name: str) -> nn.Module:
    """Import `module:function` and call it.

    Raises:
        ConfigError: it is not there, or returns something else than a model.
    """
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise ValueError("the colon is missing")
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"--model {name}: write MODULE:FUNCTION, a function without arguments ({error})") from None
    model = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {name} must return a torch.nn.Module or (model, ...), not {type(made).__name__}")
    return model
