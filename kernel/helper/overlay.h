/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_OVERLAY_H
#define MOBI_OVERLAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/*
 * A disk made of a read-only *base* and a copy-on-write *overlay*. The overlay holds every block that was ever written,
 * at the block's own place in a sparse file, and a map that says which blocks these are; all others are the base's, and
 * zeros where the base ends.
 *
 * The file: a header of 4096 bytes, the map as of the last sync, the map as of now, the data. A block counts after
 * power loss only if it is in the first map, which is written only after the data was synced: so a crash never shows a
 * block whose content did not reach the disk. The second map is written, but not synced, with every write. It is right
 * as long as the kernel that holds it in its cache lives, which is noted by the boot's identity in the header: a disk
 * process that was killed loses nothing, and neither does a guest that goes on with the next one.
 *
 * The maps in memory are in a memfd, because the process that copies a disk to another host reads them there:
 * *allocated* and *dirty* (written since the reader cleared the bit). Bits only change by atomic operations, in the
 * order data, allocated, dirty.
 */

#define BLOCK_SIZE 4096

struct overlay {
	int base; /* -1 = zeros */
	uint64_t base_size;
	int file; /* -1 = there is only the base */
	bool read_only;
	uint64_t size; /* bytes, a multiple of BLOCK_SIZE */
	uint64_t blocks;
	uint64_t data_offset; /* in the file */

	int maps; /* the memfd; 64-bit words, little-endian, bit b of word w = block 64 w + b */
	uint64_t words;
	uint64_t allocated_offset, dirty_offset; /* in the memfd */
	uint64_t *allocated, *dirty;
	uint64_t *synced; /* the file's first map */
	bool tracking;    /* mark the dirty map */
	int failed;       /* errno of a sync that failed: what it lost is unknown, so no later one may succeed */
};

struct overlay_options {
	const char *base;    /* path or NULL */
	const char *overlay; /* path or NULL; made if it is not there */
	uint64_t size;       /* bytes; 0 = that of the base or of an existing overlay */
	bool read_only;
};

/* False after having written one sentence into `error`. Locks the overlay against other processes. */
bool overlay_open(struct overlay *overlay, const struct overlay_options *options, char *error, size_t error_size);
void overlay_close(struct overlay *overlay);

/* [offset, offset + length) must be inside the disk and `iov` as long. All return 0 or a negative errno. */
int overlay_read(struct overlay *overlay, const struct iovec *iov, unsigned count, uint64_t offset, uint64_t length);
/* After ENOSPC nothing of the old content is lost; the write can be repeated. */
int overlay_write(struct overlay *overlay, const struct iovec *iov, unsigned count, uint64_t offset, uint64_t length);
/* Makes the range zeros; `unmap` gives its space back to the host where whole blocks can be. */
int overlay_zero(struct overlay *overlay, uint64_t offset, uint64_t length, bool unmap);
/* Everything written so far survives power loss. */
int overlay_sync(struct overlay *overlay);

/* Writes the second map out in full: another process may have set bits of the allocated map. */
int overlay_adopt(struct overlay *overlay);

/* Starts (dirty := allocated) or stops marking the dirty map. */
void overlay_track(struct overlay *overlay, bool on);
uint64_t overlay_count(const struct overlay *overlay, const uint64_t *map);

/* The file once more, under a lock of its own that nobody holds, to be given to another process; -1 and errno. */
int overlay_share(const struct overlay *overlay);

#endif
