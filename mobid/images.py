# SPDX-License-Identifier: Apache-2.0
"""Images and kernels: what guests are made from, found by name, trusted by hash, fetched from peers.

An image is a directory in the cache with a read-only file system and a page about it (`kernel/README.md`
§10); a kernel is one executable. Both are only ever added. A *name* is for people and says what they mean
today; the catalog keeps the *hash*, so every peer starts a guest from the same bytes. A peer that lacks those
bytes asks another peer for them, and believes nothing but the hash: the file gets its name only after it has
been read back and found right, so a broken transfer leaves nothing that looks like an image. Zeros are not
sent and not stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Annotated, Any

import trio
from pydantic import Field, StringConstraints

from mobid.catalog import Catalog
from mobid.links import Links, Stream
from mobid.operations import Request, operation
from proto.api import NAME_PATTERN, Arguments, OperationError
from proto.jsontext import parse_json

FORMAT = 1
CHUNK = 1 << 20
MAX_IMAGE = 64 << 30
MAX_KERNEL = 256 << 20
SHORT_HASH = 16
"""Hex digits of the hash in the name of a directory of a fetched image."""
ASK_TIMEOUT = 10.0
FETCH_STALL = 60.0
"""Seconds without a piece after which a transfer is given up."""

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
_HASH = re.compile(r"[0-9a-f]{8,64}")

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ImageFetch(Arguments):
    """`image.fetch`: items `{offset, data, packed}` of the root, without its zeros; result `{size, init}`."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    sha256: Sha256


class KernelFetch(Arguments):
    """`kernel.fetch`: as `image.fetch`, for the kernel with this hash; result `{size}`."""

    sha256: Sha256


class Piece(Arguments):
    """One piece of a file on its way; `packed` says that `data` is zlib-compressed."""

    offset: Annotated[int, Field(ge=0, lt=MAX_IMAGE)]
    data: Annotated[bytes, Field(max_length=CHUNK + 4096)]
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """An image in the cache. `sha256` is that of `root`, `size` is its length in bytes."""

    name: str
    sha256: str
    size: int
    init: str
    directory: Path

    @property
    def root(self) -> Path:
        return self.directory / "root.ext4"

    def as_dict(self) -> dict[str, Any]:
        """A row of `image.ls`."""
        return {"image": self.name, "hash": self.sha256, "size": self.size}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A guest kernel; `sha256` of the executable is its build id."""

    path: Path
    sha256: str


Send = Callable[[dict[str, Any]], Awaitable[None]]


class Images:
    """The images and kernels of this machine's cache, and of the other peers'. `me` is this peer's id."""

    def __init__(self, cache: Path, catalog: Catalog, links: Links, me: str) -> None:
        self.cache = cache
        self._catalog = catalog
        self._links = links
        self._me = me
        self._locks: dict[str, trio.Lock] = {}

    def ls(self) -> list[Image]:
        """All usable images, by name; a fetched older version of one comes after it."""
        found = [
            image for path in self._directory("images").glob("*/image.json") if (image := _load(path.parent))
        ]
        return sorted(found, key=lambda image: (image.name, image.directory.name))

    def find(self, reference: str) -> Image:
        """The image `NAME` or `NAME@HASH` (at least 8 digits). Raises `OperationError`, with the nearest
        name.
        """
        name, at, digest = reference.partition("@")
        if not _NAME.fullmatch(name) or (at and not _HASH.fullmatch(digest)):
            raise OperationError(
                "bad-argument",
                f"{reference!r} is no image",
                "an image is NAME or NAME@HASH, HASH in hex digits",
            )
        versions = [image for image in self.ls() if image.name == name]
        for image in versions:
            if image.sha256.startswith(digest) if at else image.directory.name == name:
                return image
        if versions and at:
            there = ", ".join(image.sha256[:SHORT_HASH] for image in versions)
            raise OperationError(
                "not-found",
                f"the image {name!r} is not here with the hash {digest[:SHORT_HASH]} (here: {there})",
                "build it from the same recipe, or let a peer that has it join the mesh",
            )
        raise self._unknown(name)

    async def verify(self, image: Image) -> None:
        """Read the root once and compare its hash; remembered until the file changes. Raises
        `OperationError`.
        """
        async with self._lock(f"verify {image.directory}"):
            if await trio.to_thread.run_sync(_hash_once, image.root, abandon_on_cancel=True) != image.sha256:
                raise OperationError(
                    "failed",
                    f"the image {image.name!r} is damaged: {image.root} does not have the hash in image.json",
                    f"remove {image.directory} and build the image again",
                )

    async def resolve(self, reference: str) -> tuple[str, str]:
        """(name, hash) of an image that this or another peer has. Raises `OperationError` as `find`."""
        try:
            image = self.find(reference)
        except OperationError as error:
            for peer in self._others():
                with contextlib.suppress(OperationError):
                    rows = await self._links.call(peer, "image.ls", timeout=ASK_TIMEOUT)
                    name, _, digest = reference.partition("@")
                    for row in rows:
                        if row["image"] == name and row["hash"].startswith(digest):
                            return str(row["image"]), str(row["hash"])
            raise error
        return image.name, image.sha256

    async def ensure(self, name: str, sha256: str) -> Image:
        """The image with exactly this hash, verified; fetched from a peer that has it if it is not here."""
        async with self._lock(f"image {sha256}"):
            with contextlib.suppress(OperationError):
                image = self.find(f"{name}@{sha256}")
                await self.verify(image)
                return image
            what = f"the image {name!r} with the hash {sha256[:SHORT_HASH]}"
            async with self._workplace() as work:
                arguments = ImageFetch(name=name, sha256=sha256)
                result = await self._fetch("image.fetch", arguments, work / "root.ext4", MAX_IMAGE, what)
                page = _checked_page(name, sha256, (work / "root.ext4").stat().st_size, result)
                (work / "image.json").write_text(json.dumps(page, indent=1) + "\n")
                target = self._directory("images") / name
                if target.exists():
                    target = target.with_name(f"{name}@{sha256[:SHORT_HASH]}")
                _adopt(work, target)
            return self.find(f"{name}@{sha256}")

    async def kernel(self) -> Kernel:
        """The kernel that new guests get: `$MOBI_KERNEL`, else the one built last."""
        named = os.environ.get("MOBI_KERNEL")
        candidates = [Path(named)] if named else self._kernels()
        if not candidates or not os.access(candidates[0], os.X_OK):
            missing = f"none in {self._directory('kernel')}"
            where = f"{named} (MOBI_KERNEL) is no executable" if named else missing
            raise OperationError("not-found", f"there is no guest kernel: {where}", "make setup builds it")
        return Kernel(candidates[0], await trio.to_thread.run_sync(_hash_once, candidates[0]))

    async def current_kernel(self) -> Kernel:
        """The kernel that new guests get; if there is none here, that of another peer."""
        try:
            return await self.kernel()
        except OperationError:
            for peer in self._others():
                with contextlib.suppress(OperationError):
                    answer = await self._links.call(peer, "kernel.current", timeout=ASK_TIMEOUT)
                    return await self.ensure_kernel(KernelFetch.model_validate(answer).sha256)
            raise

    async def find_kernel(self, sha256: str) -> Kernel:
        """The kernel with this hash. Raises `OperationError(not-found)`."""
        named = os.environ.get("MOBI_KERNEL")
        for path in ([Path(named)] if named else []) + self._kernels():
            if path.is_file() and await trio.to_thread.run_sync(_hash_once, path) == sha256:
                return Kernel(path, sha256)
        raise OperationError("not-found", f"the guest kernel {sha256[:SHORT_HASH]} is not here")

    async def ensure_kernel(self, sha256: str) -> Kernel:
        """The kernel with exactly this hash, fetched from a peer that has it if it is not here."""
        async with self._lock(f"kernel {sha256}"):
            with contextlib.suppress(OperationError):
                return await self.find_kernel(sha256)
            what = f"the guest kernel {sha256[:SHORT_HASH]}"
            async with self._workplace() as work:
                await self._fetch(
                    "kernel.fetch", KernelFetch(sha256=sha256), work / "linux", MAX_KERNEL, what
                )
                (work / "linux").chmod(0o755)
                (work / "kernel.json").write_text(json.dumps({"format": FORMAT, "sha256": sha256}) + "\n")
                _adopt(work, self._directory("kernel") / f"fetched-{sha256[:SHORT_HASH]}")
            return await self.find_kernel(sha256)

    @operation("image.ls", role="viewer")
    async def op_ls(self, _request: Request, _args: Arguments) -> list[dict[str, Any]]:
        return [image.as_dict() for image in self.ls()]

    @operation("image.fetch", role="peer", args=ImageFetch, timeout=None)
    async def op_fetch(self, request: Request, args: ImageFetch) -> dict[str, Any]:
        image = self.find(f"{args.name}@{args.sha256}")
        await self.verify(image)
        await _send(image.root, request.item)
        return {"size": image.size, "init": image.init}

    @operation("kernel.current", role="peer")
    async def op_current_kernel(self, _request: Request, _args: Arguments) -> dict[str, Any]:
        return {"sha256": (await self.kernel()).sha256}

    @operation("kernel.fetch", role="peer", args=KernelFetch, timeout=None)
    async def op_fetch_kernel(self, request: Request, args: KernelFetch) -> dict[str, Any]:
        kernel = await self.find_kernel(args.sha256)
        await _send(kernel.path, request.item)
        return {"size": kernel.path.stat().st_size}

    def _others(self) -> list[str]:
        """The other members that may answer, by id."""
        members = self._catalog.state.members.values()
        there = [m.id for m in members if m.status == "member" and m.id != self._me]
        return [peer for peer in there if self._links.liveness(peer).state != "dead"]

    async def _fetch(self, op: str, args: ImageFetch | KernelFetch, path: Path, limit: int, what: str) -> Any:
        """Get a file from the first peer that has it; the result of the request."""
        reasons: list[str] = []
        for peer in self._others():
            path.unlink(missing_ok=True)
            try:
                async with self._links.stream(peer, op, args) as stream:
                    return await _receive(path, stream, args.sha256, limit, what)
            except OperationError as error:
                reasons.append(f"{self._catalog.state.peer_name(peer)}: {error.message}")
        why = "; ".join(reasons) if reasons else "and there is no other peer to get it from"
        raise OperationError("not-found", f"{what} is not here ({why})", "build it on one of the peers")

    def _directory(self, name: str) -> Path:
        return self.cache / name

    def _kernels(self) -> list[Path]:
        """Kernels of the cache, the newest built here first, fetched ones last."""
        pages = self._directory("kernel").glob("*/kernel.json")
        found = [path for page in pages if (path := page.with_name("linux")).is_file()]
        return sorted(found, key=lambda p: (p.parent.name.startswith("fetched-"), -p.stat().st_mtime_ns))

    def _unknown(self, name: str) -> OperationError:
        known = sorted({image.name for image in self.ls()})
        for near in get_close_matches(name, known, n=1):
            return OperationError("not-found", f"there is no image {name!r}", f"did you mean {near!r}?")
        there = f"there are: {', '.join(known)}; " if known else ""
        return OperationError(
            "not-found",
            f"there is no image {name!r} in {self._directory('images')}",
            f"{there}kernel/guest/build.py {name} builds it if there is a recipe of that name",
        )

    @contextlib.asynccontextmanager
    async def _lock(self, what: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(what, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._locks.pop(what, None)

    @contextlib.asynccontextmanager
    async def _workplace(self) -> AsyncIterator[Path]:
        """A directory on the cache's file system that is gone at the end unless it was adopted."""
        parent = self.cache / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="fetch-", dir=parent))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _load(directory: Path) -> Image | None:
    """The image in a directory, or None if it is not one this version can use."""
    try:
        page = parse_json((directory / "image.json").read_text())
        image = Image(page["name"], page["root_sha256"], page["size"], page["init"], directory)
        if page["format"] != FORMAT or not image.root.is_file() or image.root.stat().st_size != image.size:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return image


def _adopt(work: Path, target: Path) -> None:
    """Give a finished directory its name; if another process was faster, its content is the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        try:
            work.rename(target)
        except OSError as error:
            if not target.is_dir():
                raise OperationError("failed", f"cannot make {target}: {error.strerror}") from error


def _hash_once(path: Path) -> str:
    """SHA-256 of a file, kept beside it together with what would change if the file did."""
    stat = path.stat()
    mark = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    stamp = path.with_name(path.name + ".sha256")
    with contextlib.suppress(OSError, ValueError):
        known, digest = stamp.read_text().strip().rsplit(" ", 1)
        if known == mark:
            return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a cache that cannot be written is only read again
        temporary = stamp.with_name(f"{stamp.name}.{os.getpid()}")
        temporary.write_text(f"{mark} {digest}\n")
        temporary.replace(stamp)
    return digest


def _pieces(path: Path) -> Iterator[dict[str, Any]]:
    """The pieces of a file that are not zero, compressed where that helps."""
    with path.open("rb") as file:
        offset = 0
        while data := file.read(CHUNK):
            if data.count(0) != len(data):
                packed = zlib.compress(data, 1)
                smaller = len(packed) < len(data)
                yield {"offset": offset, "data": packed if smaller else data, "packed": smaller}
            offset += len(data)


async def _send(path: Path, send: Send) -> None:
    pieces = _pieces(path)
    while (piece := await trio.to_thread.run_sync(next, pieces, None)) is not None:
        await send(piece)


async def _receive(path: Path, stream: Stream, sha256: str, limit: int, what: str) -> Mapping[str, Any]:
    """Write the pieces of a transfer to a file as long as its result says; the hash must be right."""
    try:
        with path.open("xb") as file:
            items = aiter(stream)
            while (item := await _next_piece(items, what)) is not None:
                await trio.to_thread.run_sync(_write_piece, file, Piece.model_validate(item), limit)
            result = await stream.result()
            size = result["size"]
            if not isinstance(size, int) or not file.tell() <= size <= limit:
                raise ValueError("wrong size")
            file.truncate(size)
            file.flush()
            await trio.to_thread.run_sync(os.fsync, file.fileno())
    except (ValueError, zlib.error, KeyError, TypeError) as error:
        raise OperationError("failed", f"{what} arrived malformed ({type(error).__name__})") from error
    except OSError as error:
        raise OperationError(
            "failed", f"{what} cannot be stored in {path.parent}: {error.strerror}"
        ) from error
    if await trio.to_thread.run_sync(_hash_once, path) != sha256:
        raise OperationError("failed", f"{what} arrived with another hash; it was thrown away")
    return dict(result)


async def _next_piece(items: AsyncIterator[dict[str, Any]], what: str) -> dict[str, Any] | None:
    try:
        with trio.fail_after(FETCH_STALL):
            return await anext(items)
    except StopAsyncIteration:
        return None
    except trio.TooSlowError:
        raise OperationError(
            "timeout", f"{what} did not arrive: nothing came for {FETCH_STALL:g} s"
        ) from None


def _write_piece(file: IO[bytes], piece: Piece, limit: int) -> None:
    data = piece.data
    if piece.packed:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(piece.data, CHUNK)
        if not unpacker.eof:
            raise ValueError("a piece is longer than it may be")
    if piece.offset < file.tell() or piece.offset + len(data) > limit:
        raise ValueError("a piece is out of order or too far behind")
    file.seek(piece.offset)
    file.write(data)


def _checked_page(name: str, sha256: str, size: int, result: Mapping[str, Any]) -> dict[str, Any]:
    init = result.get("init")
    if not isinstance(init, str) or not init.startswith("/"):
        raise OperationError("failed", f"the image {name!r} arrived without the path of its init")
    return {"format": FORMAT, "name": name, "root_sha256": sha256, "size": size, "init": init}
