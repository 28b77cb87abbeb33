# SPDX-License-Identifier: Apache-2.0
"""The entry point of `mobictl`: light, so that Ctrl-C is understood while the rest is still being loaded."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; ends with 0 done, 1 failed, 2 usage, 130 interrupted."""
    try:
        from mobictl.app import app
        from mobictl.command import execute

        code = execute(app, sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Whoever read our output has enough; the interpreter's own flush at its end must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    sys.exit(code)
