#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Build the guest's kernel once per machine, into a cache.

The kernel is Debian's own source package plus the files below `linux/` and the hooks of `hooks.patch`,
configured with `fragment.config`. Everything that decides what comes out is hashed, and the hash names
the directory of the result: `${XDG_CACHE_HOME:-~/.cache}/mobitopolo/kernel/HASH/linux`. So a second run
finds its result without network and at once, a change builds anew, and two versions live side by side.

No root is needed: the package is fetched by apt from the machine's own Debian mirror, with lists of our
own, signed by the archive's key that every Debian has. Only the standard library is used, since this runs
before the project's environment exists. The last line on stdout is the path; progress goes to stderr.
"""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERIES = "linux-source-7.3"
VERSION = "7.3.4-1~bpo13+1"
SHA256 = "703e369ddd4cce971452f5a593ee55df3a5c10c83caf0fa0df039633ed181ee3"
SUITE = "trixie-backports"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TARBALL_VARIABLE = "MOBI_KERNEL_TARBALL"
WAY_OUT = (
    f"Give a kernel source with --tarball FILE ({SERIES} {VERSION} as a .deb, or a tarball of Linux 7.x), "
    f"or with the environment variable {TARBALL_VARIABLE}."
)
TOOLS = {
    "bc": "bc",
    "bison": "bison",
    "flex": "flex",
    "gcc": "gcc",
    "ld": "binutils",
    "make": "make",
    "patch": "patch",
    "tar": "tar",
    "xz": "xz-utils",
}
# The same input gives the same binary, whoever builds it and whenever.
BUILD_ENVIRONMENT = {
    "ARCH": "um",
    "KBUILD_BUILD_USER": "mobitopolo",
    "KBUILD_BUILD_HOST": "mobitopolo",
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
}


class BuildError(Exception):
    """What went wrong and how to mend it, in one or two sentences."""


@dataclass(frozen=True)
class Source:
    """A source archive on disk: a Debian source package (.deb) or a kernel tarball."""

    path: Path
    version: str
    sha256: str


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mobitopolo"


def say(text: str) -> None:
    sys.stderr.write(f"kernel: {text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """One line of progress: what begins now, and how long it took."""
    sys.stderr.write(f"kernel: {text} ... ")
    sys.stderr.flush()
    begun = time.monotonic()
    try:
        yield
    except BaseException:
        sys.stderr.write("failed\n")
        raise
    sys.stderr.write(f"{time.monotonic() - begun:.1f} s\n")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_files() -> dict[str, Path]:
    """Files that are added to the kernel's tree: path there -> file here."""
    root = HERE / "linux"
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    files["arch/um/include/shared/freeze_protocol.h"] = HERE / "include" / "freeze_protocol.h"
    return files


def recipe_hash(version: str, sha256: str) -> str:
    """16 hex digits over all that decides the result but the compiler."""
    digest = hashlib.sha256(json.dumps([SERIES, version, sha256, BUILD_ENVIRONMENT]).encode())
    inputs = {"hooks.patch": HERE / "hooks.patch", "fragment.config": HERE / "fragment.config", **new_files()}
    for name, path in sorted(inputs.items()):
        digest.update(f"{name}\0{file_sha256(path)}\0".encode())
    return digest.hexdigest()[:16]


def run(command: list[str], where: Path, log: Path | None = None, **variables: str) -> str:
    """Run a command to its end; its output goes to `log`, or is returned. Raises BuildError."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("a")) if log else subprocess.PIPE
        done = subprocess.run(
            command,
            cwd=where,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        text = log.read_text(errors="replace") if log else done.stdout + done.stderr
        last = "\n".join(text.splitlines()[-20:])
        hint = f"\nThe whole output is in {log}." if log else ""
        raise BuildError(f"`{' '.join(command)}` failed:\n{last}{hint}")
    return done.stdout or ""


# Source


def debian_mirror() -> str:
    """The address of the machine's own Debian mirror, from its apt sources. Raises BuildError."""
    base = Path("/etc/apt")
    candidates: list[str] = []
    lists = [base / "sources.list", *sorted(base.glob("sources.list.d/*.list"))]
    for path in [path for path in lists if path.is_file()]:
        for match in re.finditer(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+\S+\s+.*\bmain\b", path.read_text(), re.M):
            candidates.append(match.group(1))
    for path in sorted(base.glob("sources.list.d/*.sources")):
        for match in re.finditer(r"^URIs:\s*(.+)$", path.read_text(), re.M):
            candidates.extend(match.group(1).split())
    for candidate in candidates:
        if re.search(r"debian", candidate) and "security" not in candidate:
            return candidate.rstrip("/")
    raise BuildError(f"no Debian mirror found in /etc/apt. {WAY_OUT}")


class Apt:
    """apt with lists and cache of our own, for one suite."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("lists/partial", "cache/archives/partial"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "list").write_text(f"deb [signed-by={KEYRING}] {debian_mirror()} {SUITE} main\n")
        self.options = [
            f"-oDir::Etc::SourceList={directory}/list",
            "-oDir::Etc::SourceParts=/dev/null",
            f"-oDir::State::Lists={directory}/lists",
            f"-oDir::Cache={directory}/cache",
            f"-oAPT::Sandbox::User={'root' if os.geteuid() == 0 else ''}",
        ]

    def update(self) -> None:
        run(["apt-get", *self.options, "-q", "update"], self.directory)

    def versions(self, package: str) -> list[str]:
        table = run(["apt-cache", *self.options, "madison", package], self.directory)
        return [line.split("|")[1].strip() for line in table.splitlines() if line.count("|") >= 2]

    def newest_package(self) -> str | None:
        names = run(["apt-cache", *self.options, "pkgnames", "linux-source-7."], self.directory).split()
        plain = [name for name in names if re.fullmatch(r"linux-source-7\.\d+", name)]
        return max(plain, key=lambda name: int(name.rsplit(".", 1)[1]), default=None)

    def download(self, package: str, version: str, to: Path) -> Path:
        with tempfile.TemporaryDirectory(dir=to) as scratch:
            run(["apt-get", *self.options, "-q", "download", f"{package}={version}"], Path(scratch))
            (file,) = Path(scratch).glob("*.deb")
            return file.rename(to / deb_name(package, version))


def deb_name(package: str, version: str) -> str:
    return f"{package}_{version.replace(':', '%3a')}_all.deb"


def pinned(path: Path) -> Source | None:
    if not path.is_file():
        return None
    digest = file_sha256(path)
    if digest != SHA256:
        raise BuildError(f"{path} has another SHA-256 than the pinned package. Remove it and try again.")
    return Source(path, VERSION, digest)


def fetch_source(cache: Path) -> Source:
    """The pinned package from the cache or the mirror; if that is gone there, the newest 7.x."""
    sources = cache / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    found = pinned(sources / deb_name(SERIES, VERSION))
    if found:
        return found
    try:
        return fetch_from_mirror(Apt(cache / "apt"), sources)
    except BuildError as error:
        raise BuildError(f"{error}\n{WAY_OUT}") from None


def fetch_from_mirror(apt: Apt, sources: Path) -> Source:
    with step("reading the mirror's package list"):
        apt.update()
    if VERSION in apt.versions(SERIES):
        with step(f"fetching {SERIES} {VERSION} (170 MB)"):
            found = pinned(apt.download(SERIES, VERSION, sources))
        if found:
            return found
    package = apt.newest_package()
    if package is None:
        raise BuildError(f"{SUITE} offers neither {SERIES} {VERSION} nor any other linux-source-7.x.")
    version = apt.versions(package)[0]
    say(f"{SERIES} {VERSION} is no longer offered, trying {package} {version}")
    path = sources / deb_name(package, version)
    if not path.is_file():
        with step(f"fetching {package} {version}"):
            path = apt.download(package, version, sources)
    return Source(path, version, file_sha256(path))


def given_source(tarball: str) -> Source:
    path = Path(tarball).expanduser().resolve()
    if not path.is_file():
        raise BuildError(f"{tarball} is not a file.")
    digest = file_sha256(path)
    return Source(path, VERSION if digest == SHA256 else path.name, digest)


def extract(source: Source, to: Path) -> None:
    """Unpack a source package or tarball so that `to` is the kernel's top directory."""
    with tempfile.TemporaryDirectory(dir=to.parent) as scratch:
        here = Path(scratch)
        tarball = source.path
        if tarball.suffix == ".deb":
            run(["dpkg-deb", "--extract", str(tarball), "package"], here)
            (tarball,) = here.glob("package/usr/src/linux-source-7.*.tar.xz")
        run(["tar", "--extract", "--file", str(tarball)], here)
        makefiles = [path for path in here.glob("*/Makefile") if (path.parent / "arch/um").is_dir()]
        if len(makefiles) != 1:
            raise BuildError(f"{source.path} does not hold a kernel's source.")
        makefiles[0].parent.rename(to)


# Tree


def patched_paths() -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)", (HERE / "hooks.patch").read_text(), re.M)


def stage(tree: Path, pristine: Path, staging: Path, version: str) -> None:
    """Patched and new files, made from untouched copies of the originals. Raises BuildError."""
    for name in patched_paths():
        original = pristine / name
        if not original.exists():
            original.parent.mkdir(parents=True, exist_ok=True)
            if not (tree / name).exists():
                raise BuildError(f"the kernel source {version} has no {name}. {WAY_OUT}")
            shutil.copy2(tree / name, original)
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(original, staging / name)
    try:
        command = ["patch", "--strip=1", "--fuzz=0", "--forward", f"--input={HERE / 'hooks.patch'}"]
        run(command, staging)
    except BuildError as error:
        raise BuildError(
            f"{error}\nhooks.patch does not apply to the kernel source {version}. {WAY_OUT}"
        ) from None
    for name, path in new_files().items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staging / name)


def update_tree(tree: Path, staging: Path, pristine: Path) -> None:
    """Write only what differs, so that make rebuilds only what is needed."""
    record = tree / ".mobitopolo-files"
    earlier = set(record.read_text().split()) if record.exists() else set()
    staged = {str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()}
    record.write_text("\n".join(sorted(earlier | staged)))
    for name in sorted(staged):
        to = tree / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.exists() or to.read_bytes() != (staging / name).read_bytes():
            shutil.copyfile(staging / name, to)
    for name in sorted(earlier - staged):
        if (pristine / name).exists():
            shutil.copyfile(pristine / name, tree / name)
        else:
            (tree / name).unlink(missing_ok=True)
    record.write_text("\n".join(sorted(staged)))


def configure(tree: Path, log: Path) -> str:
    """Make .config; returns its SHA-256. Raises BuildError for an option that cannot be had."""
    fragment = HERE / "fragment.config"
    run(["make", "x86_64_defconfig"], tree, log, **BUILD_ENVIRONMENT)
    run(
        ["scripts/kconfig/merge_config.sh", "-m", "-O", ".", ".config", str(fragment)],
        tree,
        log,
        **BUILD_ENVIRONMENT,
    )
    run(["make", "olddefconfig"], tree, log, **BUILD_ENVIRONMENT)
    text = (tree / ".config").read_text()
    have = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.M))
    wanted = re.findall(r"^(CONFIG_\w+)=(.*)$", fragment.read_text(), re.M)
    missed = [f"{name}={value}" for name, value in wanted if have.get(name, "n") != value]
    if missed:
        raise BuildError(f"this kernel source does not allow: {', '.join(missed)} (fragment.config).")
    return hashlib.sha256(text.encode()).hexdigest()


def compile_kernel(source: Source, work: Path, build: str) -> tuple[Path, str]:
    """Returns the built program and the hash of its configuration."""
    tree, pristine, log = work / "tree", work / "pristine", work / "build.log"
    log.unlink(missing_ok=True)
    if not tree.exists():
        shutil.rmtree(pristine, ignore_errors=True)
        with step("unpacking the source"):
            extract(source, tree)
    with step("applying the patch"), tempfile.TemporaryDirectory(dir=work) as staging:
        stage(tree, pristine, Path(staging), source.version)
        update_tree(tree, Path(staging), pristine)
    with step("configuring"):
        config = configure(tree, log)
    jobs = len(os.sched_getaffinity(0))
    with step(f"compiling on {jobs} processors (3 to 10 minutes; see {log})"):
        command = ["make", f"-j{jobs}", f"LOCALVERSION=-mobi-{build[:8]}", "linux"]
        run(command, tree, log, **BUILD_ENVIRONMENT)
    return tree / "linux", config


def install(program: Path, to: Path, facts: dict[str, object]) -> None:
    """Atomic: the directory appears with all its files or not at all."""
    scratch = Path(tempfile.mkdtemp(dir=to.parent, prefix=".install-"))
    scratch.chmod(0o755)
    shutil.copyfile(program, scratch / "linux")
    (scratch / "linux").chmod(0o755)
    facts["sha256"] = file_sha256(scratch / "linux")
    (scratch / "kernel.json").write_text(json.dumps(facts, indent=1) + "\n")
    try:
        scratch.rename(to)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def check_tools() -> None:
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise BuildError(f"programs are missing. As root: apt-get install {' '.join(missing)}")


def build_kernel(cache: Path, to: Path, tarball: str | None, keep_tree: bool) -> None:
    check_tools()
    source = given_source(tarball) if tarball else fetch_source(cache)
    build = recipe_hash(source.version, source.sha256)
    work = to.parent / "build" / source.sha256[:16]
    work.mkdir(parents=True, exist_ok=True)
    program, config = compile_kernel(source, work, build)
    facts: dict[str, object] = {
        "format": 1,
        "build": build,
        "source": source.version,
        "source_sha256": source.sha256,
        "config_sha256": config,
    }
    with step(f"installing into {to}"):
        install(program, to, facts)
    if not keep_tree:
        with step("removing the build's tree"):
            shutil.rmtree(work)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is running, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the guest's kernel, once; print where it is.")
    parser.add_argument("--print-path", action="store_true", help="only say where it is; exit 1 if not built")
    parser.add_argument(
        "--tarball",
        default=os.environ.get(TARBALL_VARIABLE),
        help=f"kernel source to use (a linux-source .deb or a linux-7.x tarball; also {TARBALL_VARIABLE})",
    )
    parser.add_argument("--keep-tree", action="store_true", help="keep the tree: the next build is faster")
    arguments = parser.parse_args()
    cache = cache_directory()
    to = cache / "kernel" / recipe_hash(VERSION, SHA256)
    if arguments.print_path and not (to / "linux").is_file():
        say(f"not built yet; run {Path(__file__).name}")
        return 1
    try:
        if not (to / "linux").is_file():
            with locked(cache / "kernel" / "lock"):
                if not (to / "linux").is_file():
                    build_kernel(cache, to, arguments.tarball, arguments.keep_tree)
    except BuildError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {error.strerror}: {error.filename or cache}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next run begins where it can")
        return 130
    sys.stdout.write(f"{to / 'linux'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
