# SPDX-License-Identifier: Apache-2.0
"""`mobid.helpers` with real helper processes: the role `guest` and a stand-in for its kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgpack
import pytest
import trio
import trio.testing

from mobid.helpers import EVENTS_MAX, Helper, HelperError, Helpers


@pytest.fixture
async def helpers(helper_binary: Path) -> AsyncIterator[Helpers]:
    async with trio.open_nursery() as nursery:
        yield Helpers(nursery, helper_binary)
        nursery.cancel_scope.cancel()


class Starter:
    """Starts guests in one directory and kills what a test leaves behind."""

    def __init__(self, helpers: Helpers, kernel: Path, directory: Path) -> None:
        self.helpers = helpers
        self.kernel = kernel
        self.directory = directory
        self.started: list[Helper] = []

    async def __call__(self, mistake: str = "none") -> Helper:
        arguments: list[str | Path] = [
            "--kernel",
            self.kernel,
            "--memory",
            "64M",
            "--append",
            f"standin={mistake}",
        ]
        control = self.directory / f"c{len(self.started)}"
        helper = await self.helpers.start(
            "guest", arguments, control=control, log=self.directory / "guest.log"
        )
        self.started.append(helper)
        with trio.fail_after(10):
            while (await helper.call("status"))[0]["state"] == "starting":
                await helper.events.receive()
        return helper


@pytest.fixture
async def start(helpers: Helpers, standin_kernel: Path, socket_dir: Path) -> AsyncIterator[Starter]:
    starter = Starter(helpers, standin_kernel, socket_dir)
    yield starter
    for helper in starter.started:
        helper.kill()
        with trio.fail_after(10):
            await helper.exited.wait()


async def next_event(helper: Helper, name: str) -> dict[str, object]:
    with trio.fail_after(10):
        while (event := await helper.events.receive())["event"] != name:
            pass
    return event


async def test_calls_events_and_descriptors(start: Starter) -> None:
    helper = await start()
    reply, fds = await helper.call("memory")
    assert os.fstat(fds[0]).st_size == reply["size"] == 64 << 20
    os.close(fds[0])
    await helper.call("freeze", timeout_ms=1000)
    event = await next_event(helper, "state")
    assert event["state"] in ("running", "frozen")


async def test_refusals_have_a_code(start: Starter) -> None:
    helper = await start()
    with pytest.raises(HelperError, match="guest: the guest is running, thaw is not possible") as refusal:
        await helper.call("thaw")
    assert refusal.value.code == "bad-state"
    with pytest.raises(HelperError) as refusal:
        await helper.call("status", fds=[0] * 9)
    assert refusal.value.code == "bad-request"


async def test_replies_out_of_order(start: Starter) -> None:
    helper = await start("late")
    order = []

    async def freeze() -> None:
        await helper.call("freeze", timeout_ms=5000)
        order.append("freeze")

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(freeze)
            await trio.testing.wait_all_tasks_blocked()
            await helper.call("hello")
            order.append("hello")
    assert order == ["hello", "freeze"]


@pytest.mark.parametrize("message", [{"id": [1]}, {"id": {}, "ok": True}, {"id": "1"}, [1], {"event": 5}])
async def test_a_message_of_no_use_is_none(start: Starter, message: object) -> None:
    helper = await start()
    helper._dispatch(msgpack.packb(message), [])
    assert (await helper.call("status"))[0]["ok"] is True


async def test_a_late_reply_is_forgotten_with_its_descriptors(start: Starter) -> None:
    helper = await start()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with trio.CancelScope() as scope:
            scope.cancel()
            await helper.call("memory")
    with pytest.raises(HelperError) as refusal:
        await helper.call("memory", timeout=0)
    assert refusal.value.code == "timeout"
    await helper.call("hello")
    assert len(os.listdir("/proc/self/fd")) == before


async def test_the_end_of_a_helper_is_noticed(start: Starter) -> None:
    helper = await start("mute")
    async with trio.open_nursery() as nursery:

        async def freeze() -> None:
            with pytest.raises(HelperError) as refusal:
                await helper.call("freeze", timeout_ms=50000)
            assert refusal.value.code == "gone"

        nursery.start_soon(freeze)
        await trio.testing.wait_all_tasks_blocked()
        helper.kill()
        with trio.fail_after(10):
            await helper.exited.wait()
    assert helper.returncode == -signal.SIGKILL
    assert not helper.alive
    with trio.fail_after(10):
        async for _ in helper.events:
            pass
    with pytest.raises(HelperError) as refusal:
        await helper.call("status")
    assert refusal.value.code == "gone"
    helper.kill()


async def test_quit_ends_in_order(start: Starter) -> None:
    helper = await start()
    await helper.quit()
    assert helper.returncode == 0
    assert not helper.control.exists()


async def test_events_nobody_reads_are_bounded(start: Starter) -> None:
    helper = await start()
    for _ in range(EVENTS_MAX):
        await helper.call("freeze", timeout_ms=1000)
        await helper.call("thaw")
    assert helper.lost_events >= EVENTS_MAX
    last = None
    with contextlib.suppress(trio.WouldBlock):
        while True:
            last = helper.events.receive_nowait()
    assert last == {"event": "state", "state": "running", "exit": None}


async def test_a_wrong_start_says_why(helpers: Helpers, standin_kernel: Path, socket_dir: Path) -> None:
    log = socket_dir / "log"
    for arguments, words in (
        (["--memory", "64M"], "--kernel is required"),
        (["--memory", "64M", "--kernel", "/nowhere"], "kernel /nowhere: No such file or directory"),
    ):
        with pytest.raises(HelperError, match=words) as refusal:
            await helpers.start("guest", arguments, control=socket_dir / "c", log=log)
        assert refusal.value.code == "failed"
    with pytest.raises(HelperError, match="no role named 'nothing'"):
        await helpers.start("nothing", [], control=socket_dir / "c", log=log)


async def test_adopting(start: Starter, helpers: Helpers, socket_dir: Path) -> None:
    helper = await start()
    adopted = await helpers.adopt(helper.control, role="guest")
    assert adopted.pid == helper.pid
    assert (await adopted.call("status"))[0]["state"] == "running"
    with pytest.raises(HelperError) as refusal:
        await helper.call("status")
    assert refusal.value.code == "gone"
    assert not helper.exited.is_set()
    with pytest.raises(HelperError) as refusal:
        await helpers.adopt(socket_dir / "nobody", role="guest")
    assert refusal.value.code == "not-found"
    with pytest.raises(HelperError) as refusal:
        await helpers.adopt(helper.control, role="disk")
    assert refusal.value.code == "mismatch"
    again = await helpers.adopt(helper.control, role="guest")
    again.kill()
    with trio.fail_after(10):
        await again.exited.wait()
        await helper.exited.wait()
    assert again.returncode is None


STARTER = """
import sys, trio
from pathlib import Path
from mobid.helpers import Helpers
async def main(binary, kernel, directory):
    async with trio.open_nursery() as nursery:
        helper = await Helpers(nursery, Path(binary)).start(
            "guest", ["--kernel", kernel, "--memory", "64M"],
            control=Path(directory, "c"), log=Path(directory, "log"))
        print(helper.pid, flush=True)
        await trio.sleep_forever()
trio.run(main, *sys.argv[1:])
"""


async def test_a_helper_outlives_who_started_it(
    helpers: Helpers, helper_binary: Path, standin_kernel: Path, socket_dir: Path
) -> None:
    command = [sys.executable, "-c", STARTER, str(helper_binary), str(standin_kernel), str(socket_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        assert starter.stdout
        pid = int(await trio.to_thread.run_sync(starter.stdout.readline))
        starter.kill()
    adopted = await helpers.adopt(socket_dir / "c", role="guest")
    assert adopted.pid == pid
    assert (await adopted.call("status"))[0]["state"] == "running"
    await adopted.quit()
