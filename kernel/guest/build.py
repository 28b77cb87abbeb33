#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build guest images from recipes, as an ordinary user, once per content.

An image is an ext4 file made of three layers: a Debian root (or, for the smallest, only unpacked
packages), the files beside the recipe, and the guest programs of this folder (init, agent,
witness). Each layer is cached by the hash of what it is made from, so changing the agent does not
fetch Debian again, and a second run does nothing at all.

    build.py [NAME…]         build these images (default: all recipes), print one line each
    build.py --print-dir N   where image N is; exit 1 if it is not built

Ownership inside the image comes from fakeroot, the file system from `mke2fs -d`: nothing is
mounted, nobody is root.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobitopolo"
FORMAT = 1
EPOCH = "1700000000"  # every time stamp inside an image
UUID = "6d6f6269-746f-706f-6c6f-000000000001"
COMPILER_FLAGS = ["-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-static", "-pthread"]
PROGRAMS = {
    "mobi-init": (["init.c"], []),
    "mobi-agent": (
        ["agent.c", "channel.c", "message.c", "session.c", "configure.c", "probe.c"],
        ["-lmsgpackc", "-lz"],
    ),
    "mobi-witness": (["witness.c"], ["-lz"]),
    "mobi-files": (["files.c"], []),
}
PLACES = {"mobi-init": "sbin", "mobi-agent": "sbin", "mobi-witness": "usr/bin"}
STEP_TIMEOUT = 1200
KEPT_VERSIONS = 3  # of every image, beside the newest
# mke2fs and others are in the folders that Debian leaves out of an ordinary user's path.
SEARCH_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


class BuildError(Exception):
    """A sentence for the person who builds."""


@dataclass(frozen=True)
class Recipe:
    """One recipe file: packages, how the root is made, what is dropped, bytes left free."""

    name: str
    root: str  # "packages": only these, unpacked; "debian": a minimal system with them installed
    packages: tuple[str, ...]
    suite: str
    drop: tuple[str, ...]
    free: int

    @classmethod
    def load(cls, name: str) -> Recipe:
        path = HERE / "recipes" / name / "recipe.toml"
        if not path.is_file():
            known = ", ".join(all_recipes())
            raise BuildError(f"no recipe named {name!r} (there are: {known})")
        table = tomllib.loads(path.read_text())
        return cls(
            name,
            table["root"],
            tuple(table["packages"]),
            table.get("suite", "bookworm"),
            tuple(table.get("drop", ())),
            int(table.get("free_mib", 64)) << 20,
        )


def all_recipes() -> list[str]:
    return sorted(path.parent.name for path in (HERE / "recipes").glob("*/recipe.toml"))


def hash_of(*parts: bytes | str | Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for path in sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]:
                digest.update(f"{path.relative_to(HERE)}:{path.stat().st_mode & 0o111:o}:".encode())
                digest.update(path.read_bytes())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def run(command: list[str], why: str, **extra: str) -> str:
    """Run a command; its output is shown only when it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=STEP_TIMEOUT,
        env={**os.environ, "PATH": SEARCH_PATH, "SOURCE_DATE_EPOCH": EPOCH, "LC_ALL": "C.UTF-8", **extra},
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise BuildError(f"{why} failed ({command[0]}, status {done.returncode}):\n{tail}")
    return done.stdout


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    (CACHE / "tmp").mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="image-", dir=CACHE / "tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def guest_programs() -> Path:
    """Compile init, agent and witness; returns the directory that holds them."""
    sources = [HERE / name for name in sorted(os.listdir(HERE)) if name.endswith((".c", ".h"))]
    target = CACHE / "guest" / hash_of(*sources, repr((COMPILER_FLAGS, PROGRAMS)))
    if target.is_dir():
        return target
    with work_directory() as work:
        for program, (files, libraries) in PROGRAMS.items():
            paths = [str(HERE / f) for f in files]
            run(
                ["gcc", *COMPILER_FLAGS, "-s", "-o", str(work / program), *paths, *libraries],
                f"compiling {program}",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError, OSError):  # another build was faster: same content
            os.rename(work, target)
    return target


def debian_mirror() -> str:
    """The mirror the machine itself uses: first `deb` URI of its apt sources."""
    paths = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for path in paths:
        if path.is_file():
            text = path.read_text(errors="replace")
            found = re.search(r"^(?:deb\s+(?:\[[^]]*\]\s+)?|URIs:\s*)(\S+/debian/?)\s*", text, re.M)
            if found:
                return found.group(1)
    raise BuildError(
        "no Debian mirror in /etc/apt/sources.list or sources.list.d: add one line `deb URI SUITE main`"
    )


def packages_root(recipe: Recipe, target: Path) -> None:
    """Only these packages, unpacked, without their dependencies: for static programs."""
    with work_directory() as work:
        run(["sh", "-c", f"cd {work} && apt-get download {' '.join(recipe.packages)}"], "fetching packages")
        root = work / "root"
        root.mkdir()
        for package in sorted(work.glob("*.deb")):
            run(["dpkg", "-x", str(package), str(root)], f"unpacking {package.name}")
        pack = [
            "tar",
            "--sort=name",
            f"--mtime=@{EPOCH}",
            "--owner=0",
            "--group=0",
            "-C",
            str(root),
            "-cf",
            str(target),
            ".",
        ]
        run(pack, "packing the root")


def debian_root(recipe: Recipe, target: Path) -> None:
    """A minimal Debian with these packages installed."""
    mode = "root" if os.geteuid() == 0 else "unshare" if can_unshare() else "fakechroot"
    drops = [
        f"--dpkgopt=path-exclude={path}"
        for path in ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
    ]
    run(
        [
            "mmdebstrap",
            f"--mode={mode}",
            "--variant=minbase",
            *drops,
            '--aptopt=Acquire::Languages "none"',
            f"--include={','.join(recipe.packages)}",
            "--format=tar",
            recipe.suite,
            str(target),
            debian_mirror(),
        ],
        f"installing Debian {recipe.suite} for {recipe.name}",
    )


def can_unshare() -> bool:
    user = os.environ.get("USER", "")
    entries = [Path("/etc/subuid"), Path("/etc/subgid")]
    return bool(user) and all(e.is_file() and f"{user}:" in e.read_text() for e in entries) and may_map_ids()


def may_map_ids() -> bool:
    test = ["unshare", "--map-users=auto", "--map-groups=auto", "-r", "true"]
    return subprocess.run(test, capture_output=True, timeout=10, check=False).returncode == 0


def root_archive(recipe: Recipe) -> Path:
    target = CACHE / "images" / "roots" / f"{hash_of(repr((recipe.root, recipe.packages, recipe.suite)))}.tar"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.part")
        try:
            {"packages": packages_root, "debian": debian_root}[recipe.root](recipe, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target


# Runs under fakeroot: what it sees as root's files becomes root's in the image.
ASSEMBLE = r"""
set -e
root=$1 archive=$2 overlay=$3 programs=$4 name=$5 image=$6 free=$7; shift 7
tar -xf "$archive" -C "$root"
for path in var/lib/apt/lists var/cache/apt usr/share/doc usr/share/man usr/share/locale usr/share/info \
	"$@"; do
	rm -rf "$root"/$path
done
find "$root/dev" -mindepth 1 -delete 2>/dev/null || true
cd "$root"
mkdir -p proc sys dev run tmp root etc/mobi var/tmp sbin usr/bin
if [ -d "$overlay" ]; then cp -R "$overlay/." .; fi
install -m 755 "$programs/mobi-init" "$programs/mobi-agent" sbin/
install -m 755 "$programs/mobi-witness" "$programs/mobi-files" usr/bin/
printf '%s\n' "$name" >etc/mobi/image
rm -f etc/resolv.conf etc/machine-id
printf 'nameserver 127.0.0.1\n' >etc/resolv.conf
if [ -x bin/busybox ] && [ ! -e bin/sh ]; then
	for applet in $(bin/busybox --list); do [ -e "bin/$applet" ] || ln -s busybox "bin/$applet"; done
fi
chmod 1777 tmp var/tmp
find . -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
kib=$(du -sk . | cut -f1)
truncate -s $(( (kib * 1024 * 23 / 20 + free + 16777216) / 1048576 * 1048576 )) "$image"
mke2fs -q -t ext4 -b 4096 -L mobi-root -U "$UUID" -E "hash_seed=$UUID,lazy_itable_init=0" \
	-O ^metadata_csum_seed -m 0 -d . -F "$image"
"""


def assemble(recipe: Recipe, archive: Path, programs: Path, image: Path) -> None:
    with work_directory() as work:
        root = work / "root"
        root.mkdir(mode=0o755)
        overlay = HERE / "recipes" / recipe.name / "files"
        arguments = [root, archive, overlay, programs, recipe.name, image, recipe.free, *recipe.drop]
        run(
            ["fakeroot", "sh", "-c", ASSEMBLE, "assemble", *map(str, arguments)],
            f"assembling {recipe.name}",
            E2FSPROGS_FAKE_TIME=EPOCH,
            UUID=UUID,
        )


def recipe_hash(recipe: Recipe, programs: Path) -> str:
    return hash_of(repr(recipe), HERE / "recipes" / recipe.name, programs.name, ASSEMBLE, str(FORMAT))


def described(name: str) -> dict[str, object] | None:
    """The image.json of a finished image, or None."""
    path = CACHE / "images" / name / "image.json"
    if not (path.is_file() and (path.parent / "root.ext4").is_file()):
        return None
    found: dict[str, object] = json.loads(path.read_text())
    return found


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(name: str) -> None:
    """Build one image unless the very same is there already; prints one line."""
    started = time.monotonic()
    recipe = Recipe.load(name)
    programs = guest_programs()
    wanted = recipe_hash(recipe, programs)
    present = described(name)
    if present and present.get("recipe") == wanted:
        print(f"image {name}: up to date", flush=True)
        return
    directory = CACHE / "images" / name
    fresh = CACHE / "images" / f".{name}.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        assemble(recipe, root_archive(recipe), programs, fresh / "root.ext4")
        description = {
            "format": FORMAT,
            "name": name,
            "recipe": wanted,
            "root_sha256": file_sha256(fresh / "root.ext4"),
            "size": (fresh / "root.ext4").stat().st_size,
            "init": "/sbin/mobi-init",
        }
        (fresh / "image.json").write_text(json.dumps(description, indent=1) + "\n")
        os.chmod(fresh / "root.ext4", 0o444)
        replace_directory(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    size = (directory / "root.ext4").stat().st_blocks * 512 >> 20
    print(f"image {name}: built in {time.monotonic() - started:.0f} s, {size} MiB", flush=True)


def replace_directory(fresh: Path, directory: Path) -> None:
    """Put a finished image in its place; the one it replaces is kept as NAME@HASH for guests made from it."""
    present = described(directory.name)
    if present:
        kept = directory.with_name(f"{directory.name}@{str(present['root_sha256'])[:16]}")
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(directory, kept)
        os.utime(kept)
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(fresh, directory)
    older = sorted(directory.parent.glob(f"{directory.name}@*"), key=lambda path: path.stat().st_mtime)
    for path in older[:-KEPT_VERSIONS]:
        shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build guest images.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes to build (default: all)")
    parser.add_argument(
        "--print-dir", metavar="NAME", help="print where an image is; exit 1 if it is not built"
    )
    options = parser.parse_args()
    if options.print_dir:
        if described(options.print_dir) is None:
            return 1
        print(CACHE / "images" / options.print_dir)
        return 0
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            for name in options.names or all_recipes():
                build(name)
        except (BuildError, subprocess.TimeoutExpired) as error:
            print(f"build.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
