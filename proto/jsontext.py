# SPDX-License-Identifier: Apache-2.0
"""JSON that somebody else may have written, or cut off, or nested deeper than the parser can follow.

The parser of the standard library says two things of text that it cannot read: `ValueError`, and
`RecursionError` for brackets in brackets in brackets. Whoever reads a file wants one.
"""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value that the text says; raises `ValueError`, whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None
