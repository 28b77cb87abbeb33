# SPDX-License-Identifier: Apache-2.0
"""The command line and the public Python client: arguments in, API calls out, tables and pictures back."""
