/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_FUZZ_GUEST_H
#define MOBI_FUZZ_GUEST_H

/*
 * A guest's memory, made of an input, and one queue in it. Two regions lie one behind the other, so a buffer can reach
 * from one into the next, and a third lies apart:
 *
 *	0 … 0x7fff, 0x8000 … 0xbfff, 0x100000 … 0x100fff     descriptors at 0, available at 0x100, used at 0x200
 */
#include "../virtqueue.h"
#include "fuzz.h"

enum { QUEUE_SIZE = 16, MEMORY_BYTES = 0xd000 };

struct guest {
	struct guest_memory memory;
	struct virtqueue queue;
};

/* `flags`: bit 0 event index, bit 1 indirect descriptors. False: the queue does not start. */
static inline bool guest_make(struct guest *guest, unsigned flags, const uint8_t *data, size_t size)
{
	int fd = memory_file(data, size, MEMORY_BYTES);

	guest_memory_init(&guest->memory);
	check(!guest_memory_add(&guest->memory, 0, 0, 0x8000, 0, fd));
	check(!guest_memory_add(&guest->memory, 0x8000, 0x8000, 0x4000, 0x8000, fd));
	check(!guest_memory_add(&guest->memory, 0x100000, 0x100000, 0x1000, 0xc000, fd));
	close(fd);
	guest->queue = (struct virtqueue){.memory = &guest->memory,
		.size = QUEUE_SIZE,
		.event_idx = flags & 1,
		.indirect = flags & 2,
		.kick_fd = -1,
		.call_fd = -1,
		.err_fd = -1};
	return virtqueue_start(&guest->queue, 0, 0x100, 0x200, 0);
}

/* All pieces of a chain are inside of one region each, and their lengths are the chain's. */
static inline void guest_check_chain(const struct guest *guest, const struct virtqueue_chain *chain)
{
	size_t bytes = 0;

	for (unsigned i = 0; i < chain->readable + chain->writable; i++) {
		bool inside = false;

		for (unsigned r = 0; r < guest->memory.count; r++) {
			const struct guest_region *region = &guest->memory.regions[r];
			uint64_t offset = (uint64_t)((uint8_t *)chain->iov[i].iov_base - region->host);

			inside |= (uint8_t *)chain->iov[i].iov_base >= region->host && offset < region->size &&
				  chain->iov[i].iov_len <= region->size - offset;
		}
		check(inside);
		bytes += chain->iov[i].iov_len;
	}
	check(bytes == chain->readable_bytes + chain->writable_bytes);
}

#endif
