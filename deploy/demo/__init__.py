# SPDX-License-Identifier: Apache-2.0
"""The main job as a program: three peers, the Unified File Server, three live moves, and a report of
what was seen."""
