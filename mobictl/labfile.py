# SPDX-License-Identifier: Apache-2.0
"""Lab and WAN files as people write them: YAML in, a model out, or every mistake with its place."""

from __future__ import annotations

from pathlib import Path

from mobictl.document import Document, DocumentError, parse_document, read_text
from proto.lab import Lab
from proto.labcheck import LabError, parse_lab
from proto.wan import Wan, WanError, parse_wan


def parse_lab_file(text: str, source: str) -> tuple[Lab, Document]:
    """A lab file's text → the lab and its document. Raises DocumentError with all that is wrong."""
    document = parse_document(text, source)
    try:
        return parse_lab(document.data), document
    except LabError as error:
        raise document.error(error.problems) from None


def load_lab_file(path: Path) -> tuple[Lab, Document]:
    """As `parse_lab_file`, from a file."""
    return parse_lab_file(read_text(path), str(path))


def load_wan_file(path: Path) -> Wan:
    """A WAN file. Raises DocumentError with all that is wrong."""
    document = parse_document(read_text(path), str(path))
    try:
        return parse_wan(document.data)
    except WanError as error:
        raise document.error(error.problems) from None


__all__ = ["Document", "DocumentError", "load_lab_file", "load_wan_file", "parse_lab_file"]
