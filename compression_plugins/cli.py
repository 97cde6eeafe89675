"""The command `compression-plugins`."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Sequence

import yaml

from . import __version__
from .config import Config, parse_assignments
from .core.call import Segment
from .errors import CompressionError
from .schemes import registry

#: Commands with a parser of their own, imported when called.
COMMANDS = {
    "advise": ("compression_plugins.advise.command", "which scheme pays on your network, and how much"),
    "bench": (
        "launch.bench.command",
        "measure an experiment of schemes, models, ranks and rates; needs the repository",
    ),
    "report": ("launch.bench.report", "page and pictures of what `bench` has measured; needs the repository"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. A mistake of the user prints one line and returns 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["horovodrun"]:  # everything after it belongs to horovodrun's own parser
        from .adapters.horovod.launch import main as horovodrun

        return horovodrun(arguments[1:])
    if arguments[:1] == ["torchrun"]:
        from .adapters.ddp.launch import main as torchrun

        return torchrun(arguments[1:])
    if arguments and arguments[0].startswith("--local_rank="):  # DeepSpeed's launcher puts it first
        del arguments[0]
    parser = argparse.ArgumentParser(
        prog="compression-plugins", description="Communication compression for Horovod and DeepSpeed."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    schemes = commands.add_parser("schemes", help="list the schemes")
    schemes.add_argument("--markdown", action="store_true", help="as the table of docs/schemes.md")
    show = commands.add_parser("show", help="check a configuration and print all of it")
    show.add_argument("config", help="name of a scheme, or path of a YAML or JSON file")
    show.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="replace a key")
    rates = commands.add_parser("rates", help="find a ratio for each layer of a model, for ScaleCom; prints YAML rules")
    rates.add_argument("example", metavar="MODULE:FUNCTION", help="returns (model, the batch of one worker)")
    if arguments and arguments[0] in COMMANDS:
        return _command(arguments[0], arguments[1:])
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    commands.add_parser("horovodrun", help="horovodrun with --compression, where the plain command cannot be extended")
    commands.add_parser("torchrun", help="torchrun with --compression, for scripts of torch DDP")
    options = parser.parse_args(arguments)
    try:
        if options.command == "schemes":
            print(schemes_markdown() if options.markdown else schemes_text())
        elif options.command == "rates":
            from .rates import load_example, rules_yaml, scalecom_rates

            sys.path.insert(0, os.getcwd())  # as for `python -m`
            print(rules_yaml(scalecom_rates(*load_example(options.example))))
        else:
            print(
                yaml.safe_dump(
                    Config.load(options.config, parse_assignments(options.overrides)).to_dict(), sort_keys=False
                ),
                end="",
            )
        sys.stdout.flush()
    except CompressionError as error:
        print(f"compression-plugins: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _command(name: str, arguments: Sequence[str]) -> int:
    path, _ = COMMANDS[name]
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("launch", "matplotlib", "mlxtend", "rich"):
            raise
        print(
            f"compression-plugins: {name} needs {error.name!r}: run it from a clone of the repository after "
            "`pip install -e '.[bench]'`",
            file=sys.stderr,
        )
        return 2
    description = inspect.getdoc(module)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"compression-plugins {name}", description=description, formatter_class=formatter)
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(arguments))
    except CompressionError as error:
        print(f"compression-plugins {name}: {error}", file=sys.stderr)
        return 2


def schemes_text() -> str:
    """One line a scheme: name and what it does."""
    width = max(map(len, registry.names()))
    return "\n".join(f"{name:{width}}  {_summary(name)}" for name in registry.names())


def schemes_markdown() -> str:
    """The table of docs/schemes.md."""
    lines = [
        "| scheme | what it does | paper | bits sent per value, 2 / 8 ranks | parameters (default) |",
        "|---|---|---|---|---|",
    ]
    for name in registry.names():
        cls = registry.get(name)
        scheme = cls()
        bucket = [Segment("weight", 0, 1 << 20, (1024, 1024))]
        bits = " / ".join(f"{scheme.wire_bits(bucket, n) / 2**20:.3g}" for n in (2, 8))
        parameters = ", ".join(f"`{k}` ({v})" for k, v in scheme.model_dump().items()) or "-"
        lines.append(f"| `{name}` | {_summary(name)} | {cls.paper} | {bits} | {parameters} |")
    return "\n".join(lines)


def _summary(name: str) -> str:
    module = sys.modules[registry.get(name).__module__]
    return (inspect.getdoc(module) or "").splitlines()[0]
