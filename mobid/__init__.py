# SPDX-License-Identifier: Apache-2.0
"""The peer: a thin trio shell round the machines of `proto`, and the drivers of its child processes."""
