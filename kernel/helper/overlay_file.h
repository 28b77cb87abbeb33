/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_OVERLAY_FILE_H
#define MOBI_OVERLAY_FILE_H

#include "overlay.h"

/* The overlay's header and its two maps on disk; only overlay.c needs this. All return 0 or a negative errno. */

/* Adds blocks [first, last] to the map of now. */
int overlay_file_note(struct overlay *overlay, uint64_t first, uint64_t last);

/* Syncs the data, then writes and syncs the map of the last sync. */
int overlay_file_sync(struct overlay *overlay);

/* All of [offset, offset + length) of a file; what is behind its end is read as zeros. 0 or -errno. */
int file_read(int fd, const struct iovec *iov, unsigned count, uint64_t offset, size_t length);
int file_write(int fd, const struct iovec *iov, unsigned count, uint64_t offset, size_t length);

#endif
