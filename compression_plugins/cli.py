"""The command `compression-plugins`."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import yaml

from ._version import __version__
from .config import Config, parse_assignments, presets
from .core.call import Segment
from .errors import CompressionError
from .schemes import registry

#: Entry points of this group are commands: modules with a docstring, `add_arguments(parser)` and `run(options)`, which
#: returns the exit status.
GROUP = "compression_plugins.commands"
#: Commands with a parser of their own. The repository registers `report` and the experiments of `bench`; an install
#: without it knows their names too, and says what is missing.
COMMANDS = {
    "advise": "which scheme pays on your network, and how much",
    "explain": "the start-up table of a job, tensor by tensor, without a job",
    "watch": "a live view of a job's telemetry",
    "bench": "time kernels or schemes on this machine, or measure an experiment of real jobs (needs the repository)",
    "report": "page and pictures of what `bench` has measured; needs the repository",
    "horovodrun": "horovodrun with --compression, where the plain command cannot be extended",
    "torchrun": "torchrun with --compression, for scripts of torch DDP",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. A mistake of the user prints one line and returns 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("--local_rank="):  # DeepSpeed's launcher puts it first
        del arguments[0]
    if arguments[:1] == ["horovodrun"]:  # everything after it belongs to horovodrun's own parser
        from .adapters.horovod.launch import main as horovodrun

        return horovodrun(arguments[1:])
    if arguments[:1] == ["torchrun"]:
        from .adapters.ddp.launch import main as torchrun

        return torchrun(arguments[1:])
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
    registered = {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in commands.choices}
    name, rest = (arguments[0] if arguments else None), arguments[1:]
    if name == "advise":
        from .advise import command

        return _run(name, command, rest)
    if name == "explain":
        from .advise import explain

        return _run(name, explain, rest)
    if name == "watch":
        from .engine import watch

        return _run(name, watch, rest)
    if name == "bench" and (not rest or rest[0] in ("kernels", "schemes", "-h", "--help")):
        from .bench.__main__ import main as bench

        return bench(rest)
    if name in registered or name in COMMANDS:
        return _registered(str(name), registered.get(name), rest)
    others = {other: f"from {entry.value}" for other, entry in registered.items() if other not in COMMANDS}
    for other, text in {**COMMANDS, **others}.items():
        commands.add_parser(other, help=text)
    options = parser.parse_args(arguments)
    try:
        if options.command == "schemes":
            print(schemes_markdown() if options.markdown else schemes_text())
        elif options.command == "rates":
            from .advise.layer_ratios import load_example, rules_yaml, scalecom_ratios

            sys.path.insert(0, os.getcwd())  # as for `python -m`
            print(rules_yaml(scalecom_ratios(*load_example(options.example))))
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


def _registered(name: str, entry: EntryPoint | None, arguments: Sequence[str]) -> int:
    missing = "the repository"
    try:
        if entry is not None:
            return _run(name, entry.load(), arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __package__:
            raise
        missing = repr(error.name)
    print(
        f"compression-plugins: {name} needs {missing}: run it from a clone of the repository after "
        "`pip install -e '.[bench]'`",
        file=sys.stderr,
    )
    return 2


def _run(name: str, module: Any, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        f"compression-plugins {name}",
        description=inspect.getdoc(module),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(arguments))
    except CompressionError as error:
        print(f"compression-plugins {name}: {error}", file=sys.stderr)
        return 2


def schemes_text() -> str:
    """One line per scheme and per preset: name and what it does."""
    lines = {**{name: _summary(name) for name in registry.names()}, **presets()}
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def schemes_markdown() -> str:
    """The table of docs/schemes.md: bits are those that a plan counts, row marks of sign schemes included."""
    lines = [
        "| scheme | what it does | paper | bits sent per value, 2 / 8 ranks | parameters (default) |",
        "|---|---|---|---|---|",
    ]
    from .engine.plan import Bucket  # which needs torch

    for name in registry.names():
        cls = registry.get(name)
        scheme = cls()
        bucket = Bucket(scheme, (Segment("weight", 0, 1 << 20, (1024, 1024), 1024),))
        bits = " / ".join(f"{8 * bucket.wire_bytes(n) / bucket.numel:.3g}" for n in (2, 8))
        parameters = ", ".join(f"`{k}` ({v})" for k, v in scheme.model_dump().items()) or "-"
        lines.append(f"| `{name}` | {_summary(name)} | {cls.paper} | {bits} | {parameters} |")
    return "\n".join(lines)


def _summary(name: str) -> str:
    cls = registry.get(name)
    module = sys.modules[cls.__module__]
    own = module.__name__.rpartition(".")[2] == name  # a file of its own, whose first line says what the scheme does
    return (inspect.getdoc(module if own else cls) or "").partition("\n")[0]
