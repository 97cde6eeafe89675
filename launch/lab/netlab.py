"""A laboratory network on one machine: every host a network namespace, every link shaped to a rate.

    with NetLab(hosts=2, rate="1gbit") as lab:
        lab.horovod(["python", "train.py"], flags=["--compression", "scalecom"]).wait()

Each host has one interface `eth0`, a veth pair into a common bridge, with a token bucket filter on both ends, so
that sending and receiving are limited separately, as on a full-duplex Ethernet port. Needs root and iproute2;
`available()` says what is missing. Horovod starts as on a cluster: `horovodrun` runs on host 0 and reaches the
others by `ssh`, for which a stand-in of ours enters the other host's namespace instead.

Clean-up is owned by a small shell process that waits for the end of a pipe: it runs when the lab is closed and
also when this process is killed, whatever the signal.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from launch.lab.jobs import Job, tool

_POOL = IPv4Network("10.88.0.0/16")
#: Only root writes to /run: a lock of a known name in a folder of everybody could be somebody's link to another file.
_LOCK = Path("/run/compression-netlab.lock")
_BURST = "128kb"  # two of the largest segments that the kernel hands over at once; smaller and 1 Gb/s is not reached
_serial = itertools.count()


class NetLabError(RuntimeError):
    """The network could not be built; the message holds the failing command and its error."""


@dataclass(frozen=True)
class Counters:
    """What crossed a host's `eth0` since the lab was opened, in bytes including headers."""

    sent: int
    received: int


def _run(command: str, check: bool = True) -> str:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if check and done.returncode:
        raise NetLabError(f"`{command}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def available() -> str | None:
    """None where a lab can be built, else the reason why not, as one clause for a message."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for name in ("ip", "tc"):
        if not shutil.which(name):
            return f"`{name}` is not installed (Debian: apt-get install iproute2)"
    try:
        with NetLab(hosts=1, rate="1gbit"):
            return None
    except NetLabError as error:
        return f"the kernel refused: {error}"


@contextmanager
def _locked() -> Iterator[None]:
    """No other lab of this machine is built inside. The file is never written to, nor followed where it is a link."""
    try:
        lock = os.open(_LOCK, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NetLabError(f"cannot lock {_LOCK}: {error.strerror}; remove it if it is no regular file") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _free_subnet() -> IPv4Network:
    """A /24 of the pool that no route of this machine touches."""
    routes = [entry["dst"] for entry in json.loads(_run("ip -j -4 route show table all") or "[]")]
    taken = [IPv4Network(dst, strict=False) for dst in routes if dst[:1].isdigit()]
    for subnet in _POOL.subnets(new_prefix=24):
        if not any(subnet.overlaps(net) for net in taken):
            return subnet
    raise NetLabError(f"no free /24 in {_POOL}")


class NetLab:
    """`hosts` network namespaces on one bridge, each link limited to `rate` in both directions.

    Args:
        hosts: number of hosts, 1 to 200; one rank runs on each.
        rate: link rate in bits per second, as `tc` writes it: "1gbit", "100mbit"; None leaves links unshaped.
        pin: give every host CPUs of its own, or, where hosts are a multiple of the CPUs, each CPU to as many. Left
            to the scheduler, three of four are on one of two CPUs for a while, and the job waits for them.

    Raises:
        NetLabError: a command failed; whatever had been built is removed.
    """

    interface = "eth0"
    isolated = True

    def __init__(self, hosts: int, rate: str | None = "1gbit", pin: bool = True) -> None:
        if not 1 <= hosts <= 200:
            raise ValueError(f"hosts must be 1 to 200, got {hosts}")
        self.hosts, self.rate, self.pin = hosts, rate, pin
        # Interface names hold 15 characters. The process id makes two labs distinct, the serial two in one process.
        self._prefix = f"cl{os.getpid()}x{next(_serial)}"
        self.namespaces = [f"{self._prefix}h{i}" for i in range(hosts)]
        self._ports = [f"{self._prefix}v{i}" for i in range(hosts)]
        self._jobs: list[Job] = []
        self.addresses: list[str] = []
        self.description = f"{hosts} network namespaces, {rate or 'unshaped'} each way"
        self._reaper: subprocess.Popen[bytes] | None = None

    # -- building and removing ---------------------------------------------------------------------------------

    def __enter__(self) -> NetLab:
        self._shim = Path(tempfile.mkdtemp(prefix="netlab-"))
        self._start_reaper()
        try:
            with _locked():  # choosing a subnet and taking it is one action
                subnet = _free_subnet()
                _run(f"ip link add {self._prefix} type bridge")
                _run(f"ip addr add {subnet[254]}/24 dev {self._prefix}")
                _run(f"ip link set {self._prefix} up")
            self.addresses = [str(subnet[i + 1]) for i in range(self.hosts)]
            for index in range(self.hosts):
                self._add_host(index)
            self._write_ssh()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for job in self._jobs:
            job.kill()
        if self._reaper and self._reaper.stdin:
            self._reaper.stdin.close()
            self._reaper.wait()
            self._reaper = None

    def _start_reaper(self) -> None:
        lines = ["trap '' INT TERM HUP", "cat >/dev/null"]
        for name, port in zip(self.namespaces, self._ports):
            lines += [
                f"for pid in $(ip netns pids {name}); do kill -9 $pid; done",
                # By hand: a process that was entering the namespace meanwhile keeps it, and so both ends, alive.
                f"ip link del {port}",
                f"ip netns del {name}",
                f"rm -rf /etc/netns/{name}",
            ]
        lines += [f"ip link del {self._prefix}", f"rm -rf {shlex.quote(str(self._shim))}"]
        self._reaper = subprocess.Popen(
            ["sh", "-c", "\n".join(lines)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _add_host(self, index: int) -> None:
        name, port, address = self.namespaces[index], self._ports[index], self.addresses[index]
        # `ip netns exec` binds this file over /etc/hosts. Horovod's process-set context resolves the machine's own
        # name and ignores HOROVOD_GLOO_IFACE, so the name must lead to this namespace's address.
        etc = Path("/etc/netns") / name
        etc.mkdir(parents=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{address} {os.uname().nodename}\n")
        _run(f"ip netns add {name}")
        _run(f"ip link add {port} type veth peer name {self.interface} netns {name}")
        _run(f"ip link set {port} master {self._prefix} up")
        _run(f"ip -n {name} addr add {address}/24 dev {self.interface}")
        _run(f"ip -n {name} link set {self.interface} up")
        _run(f"ip -n {name} link set lo up")
        if self.rate:
            shape = f"root tbf rate {self.rate} burst {_BURST} latency 100ms"
            _run(f"tc -n {name} qdisc add dev {self.interface} {shape}")
            _run(f"tc qdisc add dev {port} {shape}")

    def _write_ssh(self) -> None:
        """`ssh [options] ADDRESS COMMAND`, as horovodrun calls it: runs COMMAND in the namespace of ADDRESS."""
        cases = "\n".join(
            f'  {address}) set -- {shlex.join(self._enter(i))} sh -c "$*" ;;'
            for i, address in enumerate(self.addresses)
        )
        script = (
            "#!/bin/sh\n"
            "host=\n"
            'while [ $# -gt 0 ]; do case "$1" in\n'
            "  -o|-p|-i) shift 2 ;;\n"
            "  -*) shift ;;\n"
            '  *) if [ -n "$host" ]; then break; fi; host=$1; shift ;;\n'
            "esac; done\n"
            f'case "$host" in\n{cases}\n  *) echo "no host $host in this lab" >&2; exit 255 ;;\nesac\n'
            'exec "$@"\n'
        )
        path = self._shim / "ssh"
        path.write_text(script)
        path.chmod(0o755)

    # -- using -------------------------------------------------------------------------------------------------

    def _enter(self, host: int) -> list[str]:
        """Command prefix that runs what follows on `host`."""
        prefix = ["ip", "netns", "exec", self.namespaces[host]]
        cpus = sorted(os.sched_getaffinity(0))
        even = self.hosts <= len(cpus) or self.hosts % len(cpus) == 0
        if self.pin and even and shutil.which("taskset"):
            share = max(1, len(cpus) // self.hosts)
            first = host * share % len(cpus)
            prefix += ["taskset", "-c", ",".join(map(str, cpus[first : first + share]))]
        return prefix

    def counters(self) -> list[Counters]:
        """What each host's `eth0` has sent and received so far."""
        result = []
        for name in self.namespaces:
            stats = json.loads(_run(f"ip -n {name} -s -j link show {self.interface}"))[0]["stats64"]
            result.append(Counters(stats["tx"]["bytes"], stats["rx"]["bytes"]))
        return result

    def on_hosts(
        self,
        commands: Sequence[Sequence[str]],
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> Job:
        """Starts `commands[i]` on host i; they are one job, the first failure ends them all."""
        self._jobs.append(Job([[*self._enter(i), *command] for i, command in enumerate(commands)], env, log))
        return self._jobs[-1]

    def horovod(
        self,
        command: Sequence[str],
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        ranks: int = 1,
    ) -> Job:
        """`horovodrun FLAGS -np N -H ... COMMAND` typed on host 0, with so many `ranks` on each host."""
        hosts = ",".join(f"{address}:{ranks}" for address in self.addresses)
        launcher = [tool("horovodrun"), *flags, "-np", str(ranks * self.hosts), "-H", hosts]
        # horovodrun remembers for an hour which hosts it could reach; ours are new each time.
        launcher += ["--network-interfaces", self.interface, "--disable-cache"]
        path = {"PATH": f"{self._shim}{os.pathsep}{os.environ['PATH']}"}
        return self.on_hosts([[*launcher, *command]], {**(env or {}), **path}, log)

    def deepspeed(
        self,
        command: Sequence[str],
        port: int = 29500,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> Job:
        """`deepspeed --no_ssh --node_rank I ... COMMAND` typed on every host, one rank a host."""
        hostfile = self._shim / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in self.addresses))
        common = [
            "--hostfile",
            str(hostfile),
            "--no_ssh",
            "--master_addr",
            self.addresses[0],
            "--master_port",
            str(port),
        ]
        commands = [[tool("deepspeed"), *common, "--node_rank", str(i), *command] for i in range(self.hosts)]
        return self.on_hosts(commands, {"GLOO_SOCKET_IFNAME": self.interface, **(env or {})}, log)
