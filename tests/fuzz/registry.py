# SPDX-License-Identifier: Apache-2.0
"""All Python targets, by name."""

from tests.fuzz import disk, files, gossip, guests, machines, network, people, planted
from tests.fuzz.target import TARGETS

__all__ = ["TARGETS", "disk", "files", "gossip", "guests", "machines", "network", "people", "planted"]
