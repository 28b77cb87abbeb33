# SPDX-License-Identifier: Apache-2.0
"""`python -m mobid`."""

from mobid.main import main

main()
