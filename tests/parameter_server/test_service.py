"""Real processes over TCP: equality with the simulation, strangers, garbage, deaths and returns."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

from compression_plugins.errors import CompressionError
from compression_plugins.parameter_server import door, handshake, messages
from compression_plugins.parameter_server.client import run_worker
from compression_plugins.parameter_server.options import Options
from compression_plugins.parameter_server.server import Server
from compression_plugins.parameter_server.service import Service
from compression_plugins.parameter_server.worker import Worker

from .world import options, problem, simulation

TOKEN = b"a token for the tests alone"
CONTEXT = multiprocessing.get_context("fork")


def work(
    rank: int,
    chosen: Options,
    address: tuple[str, int],
    pause: float = 0.0,
    pause_in_sums: float = 0.0,
    reconnect_s: float = 30.0,
) -> None:
    torch.set_num_threads(1)
    task = problem()
    worker = Worker(rank, chosen, task)
    handle = worker.handle

    def dawdle(message: messages.Message) -> messages.Message | None:
        time.sleep(pause_in_sums if message.kind is messages.Kind.SUM else pause)
        return handle(message)

    worker.handle = dawdle  # type: ignore[method-assign]
    run_worker(worker, address, TOKEN, reconnect_s)


class Lab:
    """A service in a thread of this process, workers in processes of their own."""

    def __init__(self, chosen: Options) -> None:
        task = problem()
        self.options, self.error = chosen, None  # type: Options, BaseException | None
        self.server = Server(chosen, task.start(), task.samples)
        self.service = Service(self.server, TOKEN)
        self.processes: dict[int, BaseProcess] = {}
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.service.run()
        except BaseException as error:
            self.error = error

    def start(self, *ranks: int, **arguments: Any) -> None:
        for rank in ranks:
            process = CONTEXT.Process(target=work, args=(rank, self.options, self.service.address), kwargs=arguments)
            process.start()
            self.processes[rank] = process

    def serve(self) -> None:
        self._thread.start()

    def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._thread.is_alive(), self.error
            assert time.monotonic() < deadline, "this took too long"
            time.sleep(0.005)

    def finish(self, seconds: float = 60.0) -> Server:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the run hangs"
        if self.error:
            raise self.error
        return self.server


@pytest.fixture
def lab() -> Iterator[Callable[..., Lab]]:
    labs: list[Lab] = []

    def make(**changes: Any) -> Lab:
        labs.append(Lab(options(**{"workers": 2, "inner_steps": 20, "epochs": 2, **changes})))
        return labs[-1]

    yield make
    for each in labs:
        for process in each.processes.values():
            if process.is_alive():
                process.kill()
            process.join()
        each.server.phase = "done"  # ends a loop that a failed test left behind
        if each._thread.ident is not None:
            each._thread.join(20)


@pytest.mark.parametrize("method", ["asylpg", "sparse_asylpg"])
def test_processes_and_the_simulation_of_their_arrivals_end_with_the_same_bits(
    method: str, lab: Callable[..., Lab]
) -> None:
    run = lab(method=method, workers=3, tau=3)
    run.start(0, 1, 2)
    run.serve()
    server = run.finish()
    assert max(server.delays) <= 3 and len(server.delays) == 40
    replay = simulation(run.options, arrivals=server.arrivals).run()
    assert torch.equal(server.state.snapshot, replay.state.snapshot)
    assert (server.traffic, server.delays) == (replay.traffic, replay.delays)
    for process in run.processes.values():
        process.join(10)
        assert process.exitcode == 0


def test_the_others_go_on_when_a_worker_is_killed_and_take_its_shard(
    lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture
) -> None:
    run = lab(workers=3, epochs=3, inner_steps=40)
    run.start(0, 1, 2, pause=0.01)
    run.serve()
    run.until(lambda: run.server.step > 10)
    os.kill(run.processes[1].pid or 0, signal.SIGKILL)
    server = run.finish()
    assert server.step == 120 and len(server.history) == 3
    assert "worker 1 dropped" in caplog.text
    assert server.history[-1].loss < server.history[0].loss


def test_a_worker_that_was_killed_may_come_back(lab: Callable[..., Lab]) -> None:
    run = lab(epochs=4, inner_steps=40)
    run.start(0, 1, pause=0.01)
    run.serve()
    run.until(lambda: run.server.step > 10)
    os.kill(run.processes[1].pid or 0, signal.SIGKILL)
    run.until(lambda: run.server.active == [0])
    run.start(1)
    run.until(lambda: run.server.active == [0, 1])
    before = len(run.server.arrivals)
    server = run.finish()
    assert 1 in server.arrivals[before:] and server.parts == {0: [0], 1: [1]}
    assert server.step == 160


def test_a_worker_that_hangs_is_waited_for_up_to_its_patience_and_may_go_on_later(
    lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture
) -> None:
    run = lab(epochs=3, inner_steps=60, tau=2, patience_s=0.7)
    run.start(0, 1, pause=0.01, reconnect_s=0.5)  # counted from the loss of the connection, not from its beginning
    run.serve()
    run.until(lambda: run.server.step > 10)
    os.kill(run.processes[1].pid or 0, signal.SIGSTOP)
    run.until(lambda: run.server.active == [0])
    assert "patience_s" in caplog.text
    os.kill(run.processes[1].pid or 0, signal.SIGCONT)
    run.until(lambda: run.server.active == [0, 1])
    server = run.finish()
    assert max(server.delays) <= 2 and server.step == 180


def test_a_worker_tells_where_the_time_of_the_run_went(lab: Callable[..., Lab]) -> None:
    run = lab(inner_steps=30)
    run.serve()
    worker, handled, ended = Worker(0, run.options, problem()), [], []  # type: Worker, list[tuple[float, float]], list[float]
    handle = worker.handle

    def timed(message: messages.Message) -> messages.Message | None:
        begin = time.perf_counter()
        answer = handle(message)
        handled.append((begin, time.perf_counter()))
        return answer

    def serve() -> None:
        run_worker(worker, run.service.address, TOKEN)
        ended.append(time.perf_counter())

    worker.handle = timed  # type: ignore[method-assign]
    thread = threading.Thread(target=serve)
    thread.start()
    run.until(lambda: run.server.active == [0])
    time.sleep(1.0)  # the run has not begun, so nobody waits in it
    run.start(1, pause=0.05)
    server = run.finish()
    thread.join(20)
    seconds, busy = worker.seconds, sum(end - begin for begin, end in handled)
    idle = ended[0] - handled[0][0] - busy  # by this test's own clock: between two messages, or in sending the answer
    assert 0.8 * idle < seconds.waiting <= idle
    assert 0 < seconds.coding and 0 < seconds.computing and seconds.computing + seconds.coding <= busy
    assert server.seconds.computing > 0 < server.seconds.coding and server.seconds.waiting == 0


def test_who_sums_a_lost_workers_samples_too_is_not_taken_for_late(
    lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture
) -> None:
    run = lab(workers=3, epochs=2, inner_steps=9, patience_s=0.3)
    run.start(0, 1, 2, pause_in_sums=0.6)
    run.serve()
    run.until(lambda: run.server.phase == "snapshot" and run.server.samples_asked(1) > 0)
    time.sleep(0.3)  # in the middle of the sums
    os.kill(run.processes[2].pid or 0, signal.SIGKILL)
    server = run.finish()
    assert server.active == [0, 1] and len(server.history) == 2
    assert "patience_s" not in caplog.text


def test_a_run_whose_workers_are_all_gone_waits_for_one_and_then_says_so(lab: Callable[..., Lab]) -> None:
    run = lab(start_s=1.0, epochs=50)
    run.start(0, 1, pause=0.01)
    run.serve()
    run.until(lambda: run.server.step > 5)
    for process in run.processes.values():
        process.kill()
    with pytest.raises(CompressionError, match="none came back within start_s = 1 s"):
        run.finish()


def test_a_run_starts_without_those_who_do_not_come(lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture) -> None:
    run = lab(start_s=1.0)
    run.start(0)
    run.serve()
    assert run.finish().step == 40
    assert "starting with 1 of 2 workers" in caplog.text


def test_nobody_at_all_is_an_error(lab: Callable[..., Lab]) -> None:
    run = lab(start_s=0.3)
    run.serve()
    with pytest.raises(CompressionError, match="no worker connected"):
        run.finish()


def test_a_wrong_token_is_refused_on_both_sides(lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture) -> None:
    run = lab()
    run.serve()
    with pytest.raises(handshake.AuthenticationError, match="token"):
        run_worker(Worker(0, run.options, problem()), run.service.address, b"some other token of 16")
    run.until(lambda: "wrong token" in caplog.text)
    assert run.server.active == []
    run.start(0, 1)
    assert run.finish().step == 40, "the run itself is not disturbed"


def test_a_server_that_does_not_know_the_token_gets_nothing_from_a_worker() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def impostor() -> None:
        sock, _ = listener.accept()
        sock.sendall(handshake.challenge())
        sock.recv(1000)
        sock.sendall(bytes(handshake.PROOF) + messages.stop("come home", error=False).header())

    thread = threading.Thread(target=impostor)
    thread.start()
    with pytest.raises(handshake.AuthenticationError, match="does not know the token"):
        run_worker(Worker(0, options(), problem()), listener.getsockname(), TOKEN)
    thread.join()
    listener.close()


def test_a_recorded_handshake_cannot_be_replayed() -> None:
    challenge = handshake.challenge()
    answer, _ = handshake.hello(TOKEN, challenge, 0, bytes(32))
    assert handshake.answer(TOKEN, challenge, answer)[0].rank == 0
    with pytest.raises(handshake.AuthenticationError):
        handshake.answer(TOKEN, handshake.challenge(), answer)
    for position in (9, 20, 60):  # rank, digest, nonce
        forged = answer[:position] + bytes([answer[position] ^ 1]) + answer[position + 1 :]
        with pytest.raises(handshake.AuthenticationError):
            handshake.answer(TOKEN, challenge, forged)


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n" * 20, b"\x80\x04\x95" * 100, bytes(10_000)])
def test_strangers_are_shown_out(first: bytes, lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture) -> None:
    run = lab()
    run.serve()
    with socket.create_connection(run.service.address) as sock:
        sock.sendall(first)
        run.until(lambda: "wrong token" in caplog.text)
    run.start(0, 1)
    assert run.finish().step == 40


def test_strangers_who_say_nothing_are_shown_out_too(
    lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "STRANGER_S", 0.3)
    run = lab()
    run.serve()
    silent = [socket.create_connection(run.service.address) for _ in range(10)]
    run.until(lambda: "no proof of the token in time" in caplog.text)
    run.start(0, 1)
    assert run.finish().step == 40
    for sock in silent:
        sock.close()


def test_sixty_silent_connections_keep_no_worker_out(
    lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "STRANGER_S", 60.0)
    run = lab()
    run.serve()
    silent = [socket.create_connection(run.service.address) for _ in range(60)]
    run.start(0, 1, reconnect_s=5.0)
    assert run.finish().step == 40
    assert "it waited longest" in caplog.text and len(run.service._door.strangers) <= 2 + door.SPARE
    for sock in silent:
        sock.close()


def test_a_server_without_file_descriptors_waits_instead_of_spinning(
    lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture
) -> None:
    run = lab()
    listener, failures = run.service._door._listener, []

    class Exhausted:
        """The listener, whose accept() fails for the first second."""

        def __getattr__(self, name: str) -> Any:
            return getattr(listener, name)

        def accept(self) -> Any:
            if time.monotonic() < until:
                failures.append(1)
                raise OSError(errno.EMFILE, "Too many open files")
            return listener.accept()

    until = time.monotonic() + 1.0
    run.service._door._listener = Exhausted()  # type: ignore[assignment]
    run.start(0, 1)
    run.serve()
    assert run.finish().step == 40
    assert 1 <= len(failures) <= 4, "the kernel reports the waiting connection at once, again and again"
    assert "Too many open files" in caplog.text


def test_to_connect_again_renews_no_budget(lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture) -> None:
    run = lab(returns=3)
    run.serve()
    for _ in range(4):
        with admitted(run, 1) as sock:
            run.until(lambda: run.server.active == [1])
            sock.sendall(b"\xff" * 24)
            run.until(lambda: run.server.active == [])
    with pytest.raises(CompressionError, match=r"worker 1 has come back 3 times \(returns\).*wire version 255"):
        run_worker(Worker(1, run.options, problem()), run.service.address, TOKEN)
    run.server.finish("enough")
    run.finish()


def admitted(run: Lab, rank: int) -> socket.socket:
    """A connection that has proved itself."""
    sock = socket.create_connection(run.service.address)
    task = problem()
    received = sock.recv(handshake.CHALLENGE_BYTES, socket.MSG_WAITALL)
    answer, proof = handshake.hello(TOKEN, received, rank, run.options.digest(task.numel, task.samples))
    sock.sendall(answer)
    assert sock.recv(handshake.PROOF, socket.MSG_WAITALL) == proof
    return sock


HUGE = struct.pack("<BBBxIQfI", messages.VERSION, messages.Kind.GRADIENT, 8, 0, 0, 0.0, 2**32 - 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(HUGE, "announces 4,294,967,295 bytes"), (b"\xff" * 24, "wire version 255"),
     (messages.nothing(messages.Kind.GRADIENT, 12).header(), "not asked for")],
)  # fmt: skip
def test_a_worker_that_sends_garbage_is_dropped_and_the_run_goes_on(
    data: bytes, reason: str, lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture
) -> None:
    run = lab()
    run.serve()
    with admitted(run, 1) as sock:
        run.until(lambda: run.server.active == [1])
        sock.sendall(data)
        run.until(lambda: reason in caplog.text)
        assert run.server.active == []
    run.start(0, 1)
    assert run.finish().step == 40


def test_a_worker_with_other_options_is_told_so(lab: Callable[..., Lab]) -> None:
    run = lab()
    run.serve()
    with pytest.raises(CompressionError, match="other options"):
        run_worker(Worker(0, options(workers=2, inner_steps=20, lr=0.7), problem()), run.service.address, TOKEN)
    with pytest.raises(CompressionError, match="rank 5 where there are 2"):
        run_worker(Worker(5, run.options, problem()), run.service.address, TOKEN)


def test_the_second_worker_of_a_rank_takes_the_place_of_the_first_which_stops(lab: Callable[..., Lab]) -> None:
    run = lab()
    run.serve()
    stopped: list[str] = []

    def first() -> None:
        with pytest.raises(CompressionError, match="another worker of rank 1 has connected"):
            run_worker(Worker(1, run.options, problem()), run.service.address, TOKEN)
        stopped.append("yes")

    thread = threading.Thread(target=first)
    thread.start()
    run.until(lambda: run.server.active == [1])
    run.start(1)
    thread.join(20)
    assert stopped
    run.start(0)
    assert run.finish().step == 40


def test_workers_are_told_why_the_server_stops(lab: Callable[..., Lab]) -> None:
    run = lab(lr=1e32)
    run.start(1)
    run.serve()
    with pytest.raises(CompressionError, match="parameter server stopped: .*diverged"):
        run_worker(Worker(0, run.options, problem()), run.service.address, TOKEN)
    with pytest.raises(CompressionError, match="diverged"):
        run.finish()


def test_it_binds_loopback_unless_told_otherwise_and_refuses_short_tokens(lab: Callable[..., Lab]) -> None:
    run = lab()
    assert run.service.address[0] == "127.0.0.1"
    with pytest.raises(CompressionError, match="16 or more"):
        Service(run.server, b"short")
    with pytest.raises(CompressionError, match="cannot listen"):
        Service(run.server, TOKEN, port=run.service.address[1])


logging.getLogger("compression_plugins.parameter_server").setLevel(logging.INFO)
