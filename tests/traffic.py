# SPDX-License-Identifier: Apache-2.0
"""Programs that tests run in network namespaces: what they measured is the last line they write, as JSON.

python -m tests.traffic echo-server ADDRESS            answers every line on TCP port 7007
python -m tests.traffic echo ADDRESS                   5 round trips in seconds
python -m tests.traffic sink ADDRESS                   takes one stream on port 7008: [bytes, seconds]
python -m tests.traffic source ADDRESS BYTES           sends it
python -m tests.traffic count ADDRESS                  datagrams that come to port 7009 until 2 s of silence
python -m tests.traffic datagrams ADDRESS COUNT        sends them
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable


def say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def echo_server(address: str) -> None:
    listener = socket.create_server((address, 7007))
    say("ready")
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                connection.sendall(line)


def echo(address: str) -> None:
    times = []
    with (
        socket.create_connection((address, 7007), timeout=30) as connection,
        connection.makefile("rb") as lines,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(5):
            began = time.monotonic()
            connection.sendall(b"hello\n")
            if lines.readline() != b"hello\n":
                raise EOFError("the server closed the connection")
            times.append(time.monotonic() - began)
    say(times)


def sink(address: str) -> None:
    listener = socket.create_server((address, 7008))
    say("ready")
    connection, _ = listener.accept()
    connection.settimeout(30)
    total, began = 0, 0.0
    while data := connection.recv(1 << 20):
        began = began or time.monotonic()
        total += len(data)
    say([total, time.monotonic() - began])


def source(address: str, size: str) -> None:
    with socket.create_connection((address, 7008), timeout=30) as connection:
        connection.sendall(bytes(int(size)))


def count(address: str) -> None:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((address, 7009))
    say("ready")
    got = 0
    try:
        while receiver.recv(1000):
            got += 1
            receiver.settimeout(2)
    except TimeoutError:
        say(got)


def datagrams(address: str, number: str) -> None:
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(int(number)):
        sender.sendto(b"x" * 100, (address, 7009))


PROGRAMS: dict[str, Callable[..., None]] = {
    "echo-server": echo_server,
    "echo": echo,
    "sink": sink,
    "source": source,
    "count": count,
    "datagrams": datagrams,
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
