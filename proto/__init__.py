# SPDX-License-Identifier: Apache-2.0
"""What peers say to one another, and how they decide: pure code, no sockets, no clock, no randomness of its
own."""
