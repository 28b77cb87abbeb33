# SPDX-License-Identifier: Apache-2.0
"""`kernel/uml/build.py`: what it says when it cannot build, and the parts that need no compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

UML = Path(__file__).resolve().parents[2] / "kernel" / "uml"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_build", UML / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_script(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(UML / "build.py"), *arguments],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "MOBI_KERNEL_TARBALL": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def make_tarball(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            file = path.with_name("member")
            file.write_text(text)
            archive.add(file, arcname=f"linux-7.9/{name}")


def test_print_path_before_the_first_build(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--print-path")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "not built yet; run build.py" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_kernel_in_the_cache_is_found_at_once(tmp_path: Path, build: ModuleType) -> None:
    to = tmp_path / "mobitopolo" / "kernel" / build.recipe_hash(build.VERSION, build.SHA256)
    to.mkdir(parents=True)
    (to / "linux").write_text("")
    for arguments in ([], ["--print-path"]):
        result = run_script(tmp_path, *arguments)
        assert result.returncode == 0
        assert result.stdout == f"{to}/linux\n"


def test_a_tarball_that_is_not_there(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--tarball", "/nonexistent/linux.tar")
    assert result.returncode == 1
    assert "error: /nonexistent/linux.tar is not a file." in result.stderr
    assert "Traceback" not in result.stderr


def test_a_tarball_that_is_no_kernel(tmp_path: Path) -> None:
    make_tarball(tmp_path / "other.tar", {"README": "hello"})
    result = run_script(tmp_path, "--tarball", str(tmp_path / "other.tar"))
    assert result.returncode == 1
    assert "does not hold a kernel's source" in result.stderr


@pytest.mark.parametrize("content", [None, "changed\n"])
def test_a_source_the_patch_does_not_fit(tmp_path: Path, build: ModuleType, content: str | None) -> None:
    files = {"Makefile": "", "arch/um/README": ""}
    if content is not None:
        files |= dict.fromkeys(build.patched_paths(), content)
    make_tarball(tmp_path / "linux.tar", files)
    result = run_script(tmp_path, "--tarball", str(tmp_path / "linux.tar"))
    assert result.returncode == 1
    assert "--tarball FILE" in result.stderr
    assert "MOBI_KERNEL_TARBALL" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_damaged_package_is_refused(tmp_path: Path, build: ModuleType) -> None:
    sources = tmp_path / "mobitopolo" / "sources"
    sources.mkdir(parents=True)
    (sources / build.deb_name(build.SERIES, build.VERSION)).write_bytes(b"damaged")
    result = run_script(tmp_path)
    assert result.returncode == 1
    assert "another SHA-256" in result.stderr


def test_every_input_changes_the_hash(
    tmp_path: Path, build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "linux" / "arch").mkdir(parents=True)
    (tmp_path / "include").mkdir()
    inputs = ["hooks.patch", "fragment.config", "linux/arch/new.c", "include/freeze_protocol.h"]
    for name in inputs:
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(build, "HERE", tmp_path)
    seen = {build.recipe_hash("1", "a"), build.recipe_hash("2", "a"), build.recipe_hash("1", "b")}
    for name in inputs:
        (tmp_path / name).write_text("after")
        seen.add(build.recipe_hash("1", "a"))
    (tmp_path / "linux/arch/new.c").rename(tmp_path / "linux/arch/other.c")
    seen.add(build.recipe_hash("1", "a"))
    assert len(seen) == 3 + len(inputs) + 1


def test_only_what_differs_is_written(tmp_path: Path, build: ModuleType) -> None:
    tree, staging, pristine = tmp_path / "tree", tmp_path / "staging", tmp_path / "pristine"
    for directory in (tree, staging, pristine):
        directory.mkdir()
    (tree / "patched").write_text("original")
    (pristine / "patched").write_text("original")
    for name, text in {"patched": "hooked", "new": "1", "same": "2"}.items():
        (staging / name).write_text(text)
    build.update_tree(tree, staging, pristine)
    before = (tree / "same").stat().st_mtime_ns
    (staging / "patched").unlink()
    (staging / "new").unlink()
    build.update_tree(tree, staging, pristine)
    assert (tree / "patched").read_text() == "original"
    assert not (tree / "new").exists()
    assert (tree / "same").stat().st_mtime_ns == before


def test_install_is_all_or_nothing(tmp_path: Path, build: ModuleType) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"kernel")
    to = tmp_path / "kernel"
    build.install(program, to, {"build": "x"})
    assert os.access(to / "linux", os.X_OK)
    facts = json.loads((to / "kernel.json").read_text())
    assert facts["build"] == "x"
    assert facts["sha256"] == build.file_sha256(program)
    with pytest.raises(OSError, match="not empty"):
        build.install(program, to, {"build": "y"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel", "program"]


def test_all_files_name_their_licence(build: ModuleType) -> None:
    for path in [UML / "hooks.patch", UML / "fragment.config", *build.new_files().values()]:
        assert "SPDX-License-Identifier: GPL-2.0-only" in path.read_text().split("\n", 1)[0], path
