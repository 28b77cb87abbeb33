/* SPDX-License-Identifier: Apache-2.0 */
/* Blocks of a disk that is a base and an overlay; overlay.h has the idea, overlay_file.c the file's format. */
#include "overlay.h"

#include "overlay_file.h"
#include "virtqueue.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ZEROS_SIZE (64 * 1024)

static uint8_t zeros[ZEROS_SIZE]; /* never written */

static bool has_bit(const uint64_t *map, uint64_t block)
{
	return __atomic_load_n(&map[block / 64], __ATOMIC_ACQUIRE) >> (block % 64) & 1;
}

/* The part of a word's bits that is inside [first, last]. */
static uint64_t word_mask(uint64_t word, uint64_t first, uint64_t last)
{
	uint64_t mask = ~UINT64_C(0);

	if (word == first / 64)
		mask &= ~UINT64_C(0) << (first % 64);
	if (word == last / 64)
		mask &= ~UINT64_C(0) >> (63 - last % 64);
	return mask;
}

static void set_bits(uint64_t *map, uint64_t first, uint64_t last)
{
	for (uint64_t w = first / 64; w <= last / 64; w++)
		__atomic_fetch_or(&map[w], word_mask(w, first, last), __ATOMIC_SEQ_CST);
}

static bool all_bits(const uint64_t *map, uint64_t first, uint64_t last)
{
	for (uint64_t w = first / 64; w <= last / 64; w++)
		if (~__atomic_load_n(&map[w], __ATOMIC_ACQUIRE) & word_mask(w, first, last))
			return false;
	return true;
}

uint64_t overlay_count(const struct overlay *overlay, const uint64_t *map)
{
	uint64_t count = 0;

	for (uint64_t w = 0; map && w < overlay->words; w++)
		count += (uint64_t)__builtin_popcountll(__atomic_load_n(&map[w], __ATOMIC_RELAXED));
	return count;
}

/* Data written, now the maps: the file's (not synced), then memory's. */
static int mark_written(struct overlay *overlay, uint64_t first, uint64_t last)
{
	if (!all_bits(overlay->allocated, first, last)) {
		int failure = overlay_file_note(overlay, first, last);

		if (failure)
			return failure;
		set_bits(overlay->allocated, first, last);
	}
	if (overlay->tracking)
		set_bits(overlay->dirty, first, last);
	return 0;
}

static int read_base(struct overlay *overlay, const struct iovec *iov, unsigned count, uint64_t offset, size_t length)
{
	if (overlay->base < 0 || offset >= overlay->base_size) {
		iov_fill(iov, count, 0, length);
		return 0;
	}
	return file_read(overlay->base, iov, count, offset, length);
}

int overlay_read(struct overlay *overlay, const struct iovec *iov, unsigned count, uint64_t offset, uint64_t length)
{
	struct iovec run[VIRTQUEUE_MAX_IOV];

	for (uint64_t done = 0; done < length;) {
		const uint64_t at = offset + done;
		const bool ours = overlay->file >= 0 && has_bit(overlay->allocated, at / BLOCK_SIZE);
		uint64_t end = (at / BLOCK_SIZE + 1) * BLOCK_SIZE;
		unsigned pieces;
		int failure;

		while (end < offset + length &&
			(overlay->file >= 0 && has_bit(overlay->allocated, end / BLOCK_SIZE)) == ours)
			end += BLOCK_SIZE;
		if (end > offset + length)
			end = offset + length;
		pieces = iov_slice(iov, count, done, end - at, run);
		failure = ours ? file_read(overlay->file, run, pieces, overlay->data_offset + at, end - at)
			       : read_base(overlay, run, pieces, at, end - at);
		if (failure)
			return failure;
		done = end - offset;
	}
	return 0;
}

/* A block that will be written in part and is not ours yet: its old content goes into the overlay first. */
static int copy_up(struct overlay *overlay, uint64_t block)
{
	uint8_t buffer[BLOCK_SIZE];
	struct iovec iov = {buffer, sizeof(buffer)};
	int failure;

	if (has_bit(overlay->allocated, block))
		return 0;
	failure = read_base(overlay, &iov, 1, block * BLOCK_SIZE, BLOCK_SIZE);
	if (failure)
		return failure;
	return file_write(overlay->file, &iov, 1, overlay->data_offset + block * BLOCK_SIZE, BLOCK_SIZE);
}

int overlay_write(struct overlay *overlay, const struct iovec *iov, unsigned count, uint64_t offset, uint64_t length)
{
	const uint64_t end = offset + length, first = offset / BLOCK_SIZE, last = (end - 1) / BLOCK_SIZE;
	int failure = 0;

	if (overlay->read_only)
		return -EROFS;
	if (length == 0)
		return 0;
	if (offset % BLOCK_SIZE || (first == last && end % BLOCK_SIZE))
		failure = copy_up(overlay, first);
	if (!failure && first != last && end % BLOCK_SIZE)
		failure = copy_up(overlay, last);
	if (!failure)
		failure = file_write(overlay->file, iov, count, overlay->data_offset + offset, length);
	return failure ? failure : mark_written(overlay, first, last);
}

static int write_zeros(struct overlay *overlay, uint64_t offset, uint64_t length)
{
	for (uint64_t done = 0; done < length;) {
		struct iovec iov = {zeros, length - done < ZEROS_SIZE ? length - done : ZEROS_SIZE};
		int failure = overlay_write(overlay, &iov, 1, offset + done, iov.iov_len);

		if (failure)
			return failure;
		done += iov.iov_len;
	}
	return 0;
}

int overlay_zero(struct overlay *overlay, uint64_t offset, uint64_t length, bool unmap)
{
	const uint64_t end = offset + length;
	const uint64_t first = (offset + BLOCK_SIZE - 1) / BLOCK_SIZE, behind = end / BLOCK_SIZE;
	int failure;

	if (overlay->read_only)
		return -EROFS;
	if (!unmap || first >= behind)
		return write_zeros(overlay, offset, length);
	failure = write_zeros(overlay, offset, first * BLOCK_SIZE - offset);
	if (!failure)
		failure = write_zeros(overlay, behind * BLOCK_SIZE, end - behind * BLOCK_SIZE);
	if (failure)
		return failure;
	if (fallocate(overlay->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		    (off_t)(overlay->data_offset + first * BLOCK_SIZE), (off_t)((behind - first) * BLOCK_SIZE)) < 0)
		return write_zeros(overlay, first * BLOCK_SIZE, (behind - first) * BLOCK_SIZE);
	return mark_written(overlay, first, behind - 1);
}

int overlay_sync(struct overlay *overlay)
{
	int failure;

	if (overlay->file < 0 || overlay->read_only)
		return 0;
	if (overlay->failed)
		return -overlay->failed;
	failure = overlay_file_sync(overlay);
	if (failure)
		overlay->failed = -failure;
	return failure;
}

void overlay_track(struct overlay *overlay, bool on)
{
	overlay->tracking = on;
	for (uint64_t w = 0; on && w < overlay->words; w++)
		__atomic_fetch_or(&overlay->dirty[w], __atomic_load_n(&overlay->allocated[w], __ATOMIC_SEQ_CST),
			__ATOMIC_SEQ_CST);
}

int overlay_share(const struct overlay *overlay)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", overlay->file);
	return open(path, O_RDWR | O_CLOEXEC);
}
