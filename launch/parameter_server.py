"""Train with an asynchronous parameter server: all on this machine, or one role a host.

python -m launch.parameter_server --task launch.experiments.digits:softmax --config configs/parameter_server/asylpg.yaml
python -m launch.parameter_server --task MODULE:FUNCTION --role server --listen 10.0.0.1:29600
python -m launch.parameter_server --task MODULE:FUNCTION --role worker --rank 0 --connect 10.0.0.1:29600

MODULE:FUNCTION returns (model, loss_fn, loader), the same on every host. Server and workers of different hosts share a
secret in the environment variable COMPRESSION_PLUGINS_TOKEN (`openssl rand -hex 32`); it never travels.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from compression_plugins.config import parse_assignments
from compression_plugins.errors import CompressionError, ConfigError
from compression_plugins.parameter_server import AsyncTrainer
from compression_plugins.parameter_server.client import run_worker

TOKEN_VARIABLE = "COMPRESSION_PLUGINS_TOKEN"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, metavar="MODULE:FUNCTION", help="returns (model, loss_fn, loader)")
    parser.add_argument("--config", type=Path, help="YAML or JSON file of options")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options that win over the file's")
    parser.add_argument("--role", choices=["all", "server", "worker"], default="all")
    parser.add_argument("--rank", type=int, help="of this worker, from 0")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="address of the server to bind")
    parser.add_argument("--connect", metavar="HOST:PORT", help="address of the server to connect to")
    parser.add_argument("--device", default="cpu", help="where workers compute: cpu or cuda")
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch; continued from if it exists")
    parser.add_argument("--out", type=Path, help="file for the trained model's state_dict")
    return parser.parse_args()


def load_task(name: str) -> tuple[Any, Any, Any]:
    """Import MODULE:FUNCTION and call it."""
    module, _, function = name.partition(":")
    try:
        result = getattr(importlib.import_module(module), function or "task")()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--task {name}: {error}") from None
    if not isinstance(result, tuple) or len(result) != 3:
        raise ConfigError(f"--task {name} must return (model, loss_fn, loader), not {type(result).__name__}")
    return result


def token() -> bytes:
    """The secret that server and workers share."""
    value = os.environ.get(TOKEN_VARIABLE, "")
    if not value:
        raise ConfigError(
            f"set the environment variable {TOKEN_VARIABLE} to the same secret on all hosts: openssl rand -hex 32"
        )
    return value.encode()


def host_port(text: str | None, option: str) -> tuple[str, int]:
    host, _, port = (text or "").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{option} needs HOST:PORT, not {text!r}")
    return host.strip("[]"), int(port)


def run(args: argparse.Namespace) -> None:
    overrides = parse_assignments(args.set)
    if args.role == "worker" and (args.rank is None or args.connect is None):
        raise ConfigError("--role worker needs --rank and --connect")
    if args.role != "all":
        token()
    torch.set_num_threads(1 if args.role != "server" else torch.get_num_threads())
    model, loss_fn, loader = load_task(args.task)
    trainer = AsyncTrainer(
        model, loss_fn, loader, config=args.config, checkpoint=args.checkpoint, device=args.device, **overrides
    )
    if args.role == "worker":
        print(run_worker(trainer.worker(args.rank), host_port(args.connect, "--connect"), token()))
        return
    if args.role == "server":
        trainer.serve(host_port(args.listen, "--listen"), token())
    else:
        trainer.fit()
    server = trainer.server
    assert server is not None
    print(
        f"{server.step:,} updates, loss {trainer.loss():.6f}, {server.traffic.bits / 8e6:,.3f} MB as the paper counts, "
        f"{server.traffic.wire_bytes / 1e6:,.3f} MB with headers, largest delay {server.largest_delay}"
    )
    if args.out:
        torch.save(model.state_dict(), args.out)


def main() -> None:
    args = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.path.insert(0, os.getcwd())
    try:
        run(args)
    except CompressionError as error:
        print(f"parameter_server: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
