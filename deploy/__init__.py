# SPDX-License-Identifier: Apache-2.0
"""Making a machine ready, example labs, and the demo."""
