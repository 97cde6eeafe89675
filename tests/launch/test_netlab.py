"""The laboratory network: isolation, shaping, counting, and no trace left whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.lab import netlab
from launch.lab.jobs import Job, JobError
from launch.lab.netlab import NetLab

pytestmark = pytest.mark.alone

REASON = netlab.available()
needs_lab = pytest.mark.skipif(REASON is not None, reason=f"no network laboratory here: {REASON}")

RECEIVE = "import socket; s = socket.create_server(('', 5000)); c, _ = s.accept()\nwhile c.recv(1 << 16): pass"
SEND = (
    "import socket, sys, time\n"
    "for _ in range(100):\n"
    "    try: c = socket.create_connection((sys.argv[1], 5000)); break\n"
    "    except OSError: time.sleep(0.05)\n"
    "c.sendall(bytes(int(sys.argv[2])))"
)


def traces() -> str:
    """Interfaces, namespaces and host files that belong to labs."""
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    files = os.listdir("/etc/netns") if os.path.isdir("/etc/netns") else []
    return "\n".join([*links.splitlines(), *spaces.splitlines(), *files])


def test_available_names_the_missing_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert netlab.available() == "network namespaces need root"


def test_available_names_the_missing_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: None if name == "tc" else f"/sbin/{name}")
    assert "`tc` is not installed" in (netlab.available() or "")


def test_a_lab_has_at_least_one_host() -> None:
    with pytest.raises(ValueError, match="hosts must be 1 to 200, got 0"):
        NetLab(hosts=0)


@needs_lab
def test_a_link_is_no_faster_than_its_rate_and_every_byte_is_counted() -> None:
    size = 5_000_000
    with NetLab(hosts=2, rate="100mbit") as lab:
        begin = time.monotonic()
        lab.on_hosts([[sys.executable, "-c", SEND, lab.addresses[1], str(size)], [sys.executable, "-c", RECEIVE]]).wait(
            30
        )
        seconds = time.monotonic() - begin
        sender, receiver = lab.counters()
    assert seconds > 0.9 * size * 8 / 100e6
    assert size < sender.sent < 1.1 * size
    assert size < receiver.received < 1.1 * size
    assert receiver.sent < 0.1 * size


@needs_lab
def test_hosts_share_the_cpus_evenly_also_where_there_are_more_hosts(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    tell = "import os, sys; open(sys.argv[1], 'w').write(repr(sorted(os.sched_getaffinity(0))))"
    with NetLab(hosts=2 * len(cpus)) as lab:
        files = [tmp_path / str(host) for host in range(lab.hosts)]
        lab.on_hosts([[sys.executable, "-c", tell, str(file)] for file in files]).wait(30)
    assert sorted(file.read_text() for file in files) == sorted(2 * [repr([cpu]) for cpu in cpus])


@needs_lab
def test_two_labs_do_not_clash_and_neither_hears_the_other() -> None:
    with NetLab(hosts=2) as one, NetLab(hosts=2) as other:
        assert not set(one.namespaces) & set(other.namespaces)
        assert not set(one.addresses) & set(other.addresses)
        ping = f"import socket; socket.create_connection(('{other.addresses[0]}', 1), timeout=2)"
        with pytest.raises(JobError):
            one.on_hosts([[sys.executable, "-c", ping]]).wait(10)


@needs_lab
def test_the_machines_name_leads_to_the_hosts_own_address(tmp_path: Path) -> None:
    name = "import socket; print(socket.gethostbyname(socket.gethostname()))"
    with NetLab(hosts=2) as lab:
        for host in range(2):
            log = tmp_path / f"{host}.txt"
            commands = [["true"]] * host + [[sys.executable, "-c", name]]
            lab.on_hosts(commands, log=log).wait(10)
            assert log.read_text().strip() == lab.addresses[host]


@needs_lab
def test_ssh_of_the_lab_runs_the_command_on_the_named_host(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with NetLab(hosts=2) as lab:
        ssh = [str(lab._shim / "ssh"), "-o", "PasswordAuthentication=no", lab.addresses[1], "-p", "22"]
        lab.on_hosts([[*ssh, "cd /tmp ; hostname -i 2>/dev/null ; ip -4 -br addr show eth0"]], log=log).wait(10)
        assert lab.addresses[1] in log.read_text()
        unknown = [str(lab._shim / "ssh"), "10.1.2.3", "true"]
        with pytest.raises(JobError, match="no host 10.1.2.3 in this lab"):
            lab.on_hosts([unknown], log=log).wait(10)


@needs_lab
def test_an_exception_leaves_no_trace() -> None:
    with pytest.raises(KeyboardInterrupt), NetLab(hosts=2) as lab:
        lab.on_hosts([["sleep", "60"]])
        raise KeyboardInterrupt
    assert lab._prefix not in traces()


@needs_lab
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_owner_leaves_no_trace_and_no_process(sig: signal.Signals) -> None:
    program = (
        "import time; from launch.lab.netlab import NetLab\n"
        "with NetLab(hosts=2) as lab:\n"
        "    job = lab.on_hosts([['sleep', '600']]); print(lab._prefix, job._processes[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    prefix, pid = owner.stdout.readline().split()
    assert prefix in traces()
    owner.send_signal(sig)
    owner.wait()
    limit = time.monotonic() + 10
    while time.monotonic() < limit and (prefix in traces() or os.path.exists(f"/proc/{pid}")):
        time.sleep(0.1)
    assert prefix not in traces()
    assert not os.path.exists(f"/proc/{pid}")


@needs_lab
def test_a_bad_rate_is_one_error_and_leaves_no_trace() -> None:
    lab = NetLab(hosts=1, rate="fast")
    with pytest.raises(netlab.NetLabError, match="tbf rate fast.*failed"), lab:
        pass
    assert lab._prefix not in traces()


def test_the_first_failure_ends_the_whole_job(tmp_path: Path) -> None:
    job = Job([["sleep", "60"], ["sh", "-c", "echo out of memory; exit 3"]], log=tmp_path / "log.txt")
    begin = time.monotonic()
    with pytest.raises(JobError, match="status 3\nout of memory"):
        job.wait(30)
    assert time.monotonic() - begin < 10
    assert all(process.poll() is not None for process in job._processes)


def test_a_job_past_its_limit_is_ended() -> None:
    job = Job([["sleep", "60"]])
    with pytest.raises(JobError, match="ran past its limit of 0.2 s"):
        job.wait(0.2)
    assert job._processes[0].poll() is not None


def test_the_lock_follows_no_link_and_changes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert netlab._LOCK.parent == Path("/run"), "a folder that root alone writes to"
    precious, lock = tmp_path / "precious", tmp_path / "lock"
    precious.write_text("as it was")
    lock.symlink_to(precious)
    monkeypatch.setattr(netlab, "_LOCK", lock)
    with pytest.raises(netlab.NetLabError, match="cannot lock"), netlab._locked():
        pass
    monkeypatch.setattr(netlab, "_LOCK", precious)
    with netlab._locked():
        assert precious.read_text() == "as it was"
