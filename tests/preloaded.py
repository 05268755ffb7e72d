"""A Python that has imported torch, transformers and ptq already: what it is asked to run is forked from the tests' own process.

    python -IS tests/preloaded.py SOCKET (SCRIPT | -m MODULE) [arguments]

is a client of `preloaded`: it gives its arguments, folder, environment, stdin, stdout and stderr to a fork, hands on SIGINT and
SIGTERM, ends as the fork ended, and where it is killed the fork is too.  Forks share what tests share: one thread for tensors, the
seed of hashes, pytest's way with warnings.
"""

import json
import multiprocessing
import os
import runpy
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory

FORK = multiprocessing.get_context("fork")


@contextmanager
def preloaded() -> Iterator[str]:
    """The path of an executable that is to be called as `python` is."""
    with TemporaryDirectory() as folder:
        python, address = Path(folder, "python"), f"{folder}/socket"
        client = shlex.join([sys.executable, "-IS", __file__, address])
        python.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
        python.chmod(0o755)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen()
            ours, servers = FORK.Pipe()
            server = FORK.Process(target=serve, args=(listener, servers, ours))
            server.start()
        servers.close()
        yield str(python)
        ours.close()
        server.join()


def serve(listener: socket.socket, alive: Connection, tests_end: Connection) -> None:
    """Until the tests' end of the pipe is closed, as it also is where they are killed."""
    tests_end.close()
    while alive not in wait([listener, alive]):
        FORK.Process(target=attend, args=(listener.accept()[0],)).start()


def attend(client: socket.socket) -> None:
    asked, descriptors, *_ = socket.recv_fds(client, 1 << 20, 3)
    program = FORK.Process(target=run, args=(*json.loads(asked), descriptors))
    program.start()
    for descriptor in descriptors:
        os.close(descriptor)
    client.send(str(program.pid).encode())
    if client in wait([client, program.sentinel]):
        program.kill()
    else:
        program.join()
        client.send(str(program.exitcode).encode())


def run(arguments: list[str], folder: str, environment: dict[str, str], descriptors: list[int]) -> None:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def ask(address: str, arguments: list[str]) -> int:
    """The exit code, negative for a signal."""
    signals = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there is a program that they can be handed on to
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        asked = json.dumps([arguments, os.getcwd(), dict(os.environ)])
        socket.send_fds(server, [asked.encode()], [0, 1, 2])
        program = int(server.recv(20))
        for number in signals:
            signal.signal(number, lambda number, _: os.kill(program, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return int(server.recv(20))


if __name__ == "__main__":
    code = ask(sys.argv[1], sys.argv[2:])
    if code < 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
