# SPDX-License-Identifier: Apache-2.0
"""Raft: how a few peers keep one log, whoever of them is alive (`machine.py`)."""
