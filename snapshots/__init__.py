# SPDX-License-Identifier: Apache-2.0
"""The content-addressed store. Not filled yet: images live in the cache directory (`mobid.images`)."""
