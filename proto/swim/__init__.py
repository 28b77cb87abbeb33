# SPDX-License-Identifier: Apache-2.0
"""SWIM: who seems alive, as a hint (`machine.py`)."""
