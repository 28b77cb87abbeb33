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

MARK = b"mobi"


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


def frames_out(interface: str, to: str, sender: str, protocol: str, number: str) -> None:
    ethernet = bytes.fromhex(to + sender) + b"\x08\x00"
    header = bytes(9) + bytes([int(protocol)]) + bytes(10)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((interface, 0))
        for i in range(int(number)):
            raw.send(ethernet + header + MARK + i.to_bytes(4, "big") + bytes(50))


def frames_in(interface: str) -> None:
    numbers: list[int] = []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as raw:
        raw.setsockopt(263, 23, 1)  # SOL_PACKET, PACKET_IGNORE_OUTGOING
        raw.bind((interface, 0x0003))
        say("ready")
        raw.settimeout(5)
        try:
            while frame := raw.recv(2000):
                if frame[34:38] == MARK:
                    numbers.append(int.from_bytes(frame[38:42], "big"))
                    raw.settimeout(1)
        except TimeoutError:
            say(numbers)


PROGRAMS: dict[str, Callable[..., None]] = {
    "echo-server": echo_server,
    "echo": echo,
    "sink": sink,
    "source": source,
    "count": count,
    "datagrams": datagrams,
    "frames-out": frames_out,
    "frames-in": frames_in,
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
