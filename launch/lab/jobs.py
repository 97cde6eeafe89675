"""Start a training command on every host of a lab through the host framework's own launcher.

A lab is a `NetLab` (one network namespace a host) or a `Loopback` (all ranks on this machine). Both start
Horovod jobs with the stock `horovodrun` and DeepSpeed jobs with the stock `deepspeed`, so that what a lab
measures is what a user's command line does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
_GRACE_S = 5.0


def environment() -> dict[str, str]:
    """Variables of every rank that runs a script of this repository: one thread each, on the CPU."""
    return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class JobError(RuntimeError):
    """A launcher ended with a non-zero status or ran past its time limit; the message holds the end of its output."""


class Job:
    """Processes that live and die together: the first failure ends them all.

    Args:
        commands: one argument list a process.
        env: variables added to this process's environment.
        log: file that receives stdout and stderr of all of them.
        cwd: working directory, by default the current one.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.log = log
        self._processes: list[subprocess.Popen[bytes]] = []
        out: IO[bytes] | int = open(log, "ab") if log else subprocess.DEVNULL
        try:
            for command in commands:
                self._processes.append(
                    subprocess.Popen(
                        list(command),
                        env={**os.environ, **(env or {})},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        cwd=cwd,
                        # A session of its own: Ctrl-C reaches the demo only, which then ends the whole group in order.
                        start_new_session=True,
                    )
                )
        except BaseException:
            self.kill()
            raise
        finally:
            if not isinstance(out, int):  # the children hold it open
                out.close()

    def poll(self) -> bool:
        """True while every process runs or has ended well and at least one runs; raises `JobError` on a failure."""
        states = [process.poll() for process in self._processes]
        if any(states):
            self.kill()
            raise JobError(f"the job ended with status {[s for s in states if s][0]}\n{self.tail()}")
        return None in states

    def wait(self, timeout: float | None = None) -> None:
        """Blocks until all have ended; raises `JobError` on a failure or after `timeout` seconds (and ends them)."""
        limit = None if timeout is None else time.monotonic() + timeout
        while self.poll():
            if limit is not None and time.monotonic() > limit:
                self.kill()
                raise JobError(f"the job ran past its limit of {timeout:g} s\n{self.tail()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Ends every process group: SIGTERM, and SIGKILL after five seconds. Does nothing to a job that ended well."""
        if all(process.poll() == 0 for process in self._processes):
            return
        for sig in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes:
                try:
                    os.killpg(process.pid, sig)
                except ProcessLookupError:
                    continue
            limit = time.monotonic() + _GRACE_S
            while time.monotonic() < limit and any(p.poll() is None for p in self._processes):
                time.sleep(0.05)

    def tail(self, lines: int = 30) -> str:
        """The last lines of the job's output."""
        if not self.log or not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def tool(name: str) -> str:
    """Path of a console script installed beside this interpreter, such as `horovodrun`."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is not installed beside {sys.executable}; run `make demo` for the full set-up")
    return str(path)


class Loopback:
    """Lab without isolation: `hosts` ranks on this machine over `lo`, unshaped.

    Every byte crosses `lo` once as sent and once as received, and all ranks share the counter, so the bytes one
    rank sends are the counter's difference divided by the number of ranks.
    """

    interface = "lo"
    isolated = False

    def __init__(self, hosts: int) -> None:
        self.hosts = hosts
        self.description = f"{hosts} ranks on loopback, unshaped"

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def horovod(
        self,
        command: Sequence[str],
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> Job:
        """`horovodrun FLAGS -np N COMMAND`."""
        launcher = [tool("horovodrun"), *flags, "-np", str(self.hosts), "-H", f"localhost:{self.hosts}"]
        return Job([[*launcher, *command]], env, log)

    def deepspeed(
        self,
        command: Sequence[str],
        port: int = 29500,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> Job:
        """`deepspeed --num_accelerators N COMMAND`."""
        launcher = [tool("deepspeed"), "--num_accelerators", str(self.hosts), "--master_port", str(port)]
        return Job([[*launcher, *command]], env, log)
