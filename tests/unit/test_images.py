# SPDX-License-Identifier: Apache-2.0
"""The cache of images: names, hashes, and transfers that go wrong on the way."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mobid.catalog import Catalog
from mobid.gossip import Liveness
from mobid.images import CHUNK, ImageFetch, Images, KernelFetch
from mobid.links import Links
from mobid.operations import Caller, Request
from proto import entries
from proto.api import OperationError, Role
from proto.state import State

ROOT = random.Random(7).randbytes(CHUNK + 5000) + bytes(3 * CHUNK) + b"end" + bytes(100)
HASH = hashlib.sha256(ROOT).hexdigest()
ME, OTHER = "a" * 16, "b" * 16


def add_image(cache: Path, name: str, root: bytes = ROOT, sha256: str | None = None) -> Path:
    directory = cache / "images" / name
    directory.mkdir(parents=True)
    (directory / "root.ext4").write_bytes(root)
    page = {
        "format": 1,
        "name": name.partition("@")[0],
        "root_sha256": sha256 or hashlib.sha256(root).hexdigest(),
        "size": len(root),
        "init": "/sbin/mobi-init",
    }
    (directory / "image.json").write_text(json.dumps(page))
    return directory


class TwoPeers(Catalog, Links):
    """The catalog and links of a peer that has one other: `other`, in this process, through `spoil`."""

    def __init__(self) -> None:
        self.other: Images | None = None
        self.spoil = lambda item: item

    @property
    def state(self) -> State:
        member = entries.Member(id=OTHER, name="virginia", address="127.0.0.1:1", certificate=b"")
        return State(members={OTHER: member} if self.other else {})

    def liveness(self, peer: str) -> Liveness:
        return Liveness("alive", None)

    async def call(self, peer: str, op: str, args: Any = None, timeout: float = 10.0) -> Any:
        assert (op, self.other is not None) == ("image.ls", True)
        return [image.as_dict() for image in self.other.ls()] if self.other else []

    @asynccontextmanager
    async def stream(
        self, peer: str, op: str, args: Any = None, timeout: float = 10.0
    ) -> AsyncGenerator[Answer, None]:
        assert self.other is not None
        answer = Answer()
        handler = {"image.fetch": self.other.op_fetch, "kernel.fetch": self.other.op_fetch_kernel}[op]
        answer.value = await handler(answer, args)
        answer.items = [changed for item in answer.items if (changed := self.spoil(item)) is not None]
        yield answer


class Answer(Request):
    """Takes the items of a handler and is then read like a stream."""

    op = "image.fetch"
    caller = Caller(Role.PEER)
    hops = 0

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.value: Mapping[str, Any] = {}

    @property
    def role(self) -> Role:
        return Role.PEER

    async def item(self, item: dict[str, Any]) -> None:
        self.items.append(item)

    async def input(self) -> dict[str, Any]:
        raise NotImplementedError

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        for item in self.items:
            yield item

    async def result(self) -> Mapping[str, Any]:
        return self.value


@pytest.fixture
def mesh() -> TwoPeers:
    return TwoPeers()


@pytest.fixture
def images(tmp_path: Path, mesh: TwoPeers) -> Images:
    return Images(tmp_path / "mine", mesh, mesh, ME)


@pytest.fixture
def others(tmp_path: Path, mesh: TwoPeers) -> Images:
    mesh.other = Images(tmp_path / "other", mesh, mesh, OTHER)
    return mesh.other


def test_an_image_is_found_by_name_and_by_hash(images: Images) -> None:
    add_image(images.cache, "mini")
    add_image(images.cache, f"mini@{'0' * 16}", b"old", "0" * 64)
    assert images.find("mini").sha256 == HASH
    assert images.find(f"mini@{HASH[:8]}").sha256 == HASH
    assert images.find("mini@00000000").sha256 == "0" * 64
    with pytest.raises(OperationError, match="ffffffff"):
        images.find("mini@ffffffff")


@pytest.mark.parametrize("name", ["", "../mini", "a/b", "mini@", "mini@xyz", "mini@../../x", "-x", "mini\n"])
def test_names_that_are_no_names_are_refused(images: Images, name: str) -> None:
    with pytest.raises(OperationError) as caught:
        images.find(name)
    assert caught.value.code == "bad-argument"


def test_a_missing_image_names_the_nearest_one(images: Images) -> None:
    with pytest.raises(OperationError) as caught:
        images.find("ufs-client")
    assert "build.py ufs-client" in caught.value.hint
    add_image(images.cache, "ufs-content")
    with pytest.raises(OperationError) as caught:
        images.find("ufs-contend")
    assert "'ufs-content'" in caught.value.hint


def test_directories_that_are_no_images_are_left_out(images: Images) -> None:
    add_image(images.cache, "good")
    (add_image(images.cache, "short") / "root.ext4").write_bytes(b"x")
    (add_image(images.cache, "future") / "image.json").write_text('{"format": 2}')
    (add_image(images.cache, "broken") / "image.json").write_text("{")
    (images.cache / "images/roots").mkdir()
    assert [image.name for image in images.ls()] == ["good"]


async def test_a_damaged_image_is_noticed_once_it_changed(images: Images) -> None:
    directory = add_image(images.cache, "mini")
    image = images.find("mini")
    await images.verify(image)
    (directory / "root.ext4").write_bytes(b"X" + ROOT[1:])
    with pytest.raises(OperationError, match="damaged"):
        await images.verify(image)


async def test_an_image_comes_from_another_peer(images: Images, others: Images) -> None:
    add_image(others.cache, "mini")
    assert await images.resolve("mini") == ("mini", HASH)
    image = await images.ensure("mini", HASH)
    assert image.root.read_bytes() == ROOT
    assert image.root.stat().st_blocks * 512 < len(ROOT)
    assert images.find("mini") == image
    assert list((images.cache / "tmp").iterdir()) == []


async def test_an_image_of_the_same_name_is_kept_beside(images: Images, others: Images) -> None:
    add_image(images.cache, "mini", b"mine")
    add_image(others.cache, "mini")
    image = await images.ensure("mini", HASH)
    assert image.directory.name == f"mini@{HASH[:16]}"
    assert images.find("mini").sha256 != HASH


@pytest.mark.parametrize(
    "spoil",
    [
        lambda item: {**item, "data": item["data"][:-1]},
        lambda item: {**item, "offset": item["offset"] + 1},
        lambda item: {**item, "offset": 1 << 50},
        lambda item: {**item, "packed": not item["packed"]},
        lambda item: {"data": b""},
        lambda item: None,
    ],
)
async def test_a_transfer_that_goes_wrong_leaves_nothing(
    images: Images, others: Images, mesh: TwoPeers, spoil: Any
) -> None:
    add_image(others.cache, "mini")
    mesh.spoil = spoil
    with pytest.raises(OperationError, match="virginia"):
        await images.ensure("mini", HASH)
    assert images.ls() == []
    assert list((images.cache / "tmp").iterdir()) == []


async def test_a_peer_without_the_image_says_so(images: Images, others: Images) -> None:
    with pytest.raises(OperationError, match="no image 'mini'"):
        await images.ensure("mini", HASH)


async def test_a_kernel_comes_from_another_peer(images: Images, others: Images) -> None:
    directory = others.cache / "kernel/0123"
    directory.mkdir(parents=True)
    (directory / "linux").write_bytes(ROOT)
    (directory / "linux").chmod(0o755)
    (directory / "kernel.json").write_text("{}")
    assert (await others.kernel()).sha256 == HASH
    with pytest.raises(OperationError, match="no guest kernel"):
        await images.kernel()
    kernel = await images.ensure_kernel(HASH)
    assert kernel.path.read_bytes() == ROOT
    assert kernel.path.stat().st_mode & 0o111
    assert (await images.kernel()) == kernel


def test_arguments_of_a_fetch_are_checked() -> None:
    for wrong in ({"sha256": "x"}, {"sha256": "../" + "0" * 61}):
        with pytest.raises(ValueError, match="sha256"):
            KernelFetch.model_validate(wrong)
    with pytest.raises(ValueError, match="name"):
        ImageFetch.model_validate({"name": "../x", "sha256": HASH})
