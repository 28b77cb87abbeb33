# SPDX-License-Identifier: Apache-2.0
"""What the tests need that must be built first: the helper, and a real guest's kernel and image."""

from __future__ import annotations

import os
from pathlib import Path

from mobid.config import cache_directory

REPOSITORY = Path(__file__).resolve().parent.parent


def built_helper() -> Path:
    """The helper binary of `$MOBI_HELPER` or of this tree."""
    wanted = os.environ.get("MOBI_HELPER")
    return Path(wanted) if wanted else REPOSITORY / "build/helper/kernel/helper/mobi-helper"


def missing() -> str:
    """What of a real guest is not built here, or nothing."""
    kernel = os.environ.get("MOBI_KERNEL")
    needed = [cache_directory() / "images/mini/image.json", Path(kernel or cache_directory() / "kernel")]
    gone = [str(path) for path in needed if not path.exists()]
    return f"{' and '.join(gone)} not there (make setup builds it)" if gone else ""
