# SPDX-License-Identifier: Apache-2.0
"""`python -m mobictl`."""

from __future__ import annotations

from mobictl.main import main

if __name__ == "__main__":
    main()
