/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_GUEST_MEMORY_H
#define MOBI_GUEST_MEMORY_H

#include <stddef.h>
#include <stdint.h>

/*
 * The memory that a guest shares with a device: regions of guest physical addresses, each a piece of a file that is
 * mapped here. An address from the guest is only ever used after it was found in a region with its whole length.
 */

#define GUEST_MEMORY_MAX 8 /* regions, the limit of the vhost-user protocol */

struct guest_region {
	uint64_t guest; /* guest physical address */
	uint64_t user;  /* address in the front end's process, used for ring addresses */
	uint64_t size;  /* bytes */
	uint8_t *host;  /* where it is mapped here */
	void *mapping;  /* what to unmap: begins before `host` when the region begins inside a page of its file */
	size_t mapped;
};

struct guest_memory {
	unsigned count;
	struct guest_region regions[GUEST_MEMORY_MAX];
	struct guest_memory *next;
};

/* An empty table. It must stay where it is until guest_memory_destroy(): a guard for lost pages points to it. */
void guest_memory_init(struct guest_memory *memory);
void guest_memory_destroy(struct guest_memory *memory);

/* Unmaps all regions. */
void guest_memory_clear(struct guest_memory *memory);

/* Maps `size` bytes of `fd` from `offset` on as a region; does not keep `fd`. Returns NULL or what is wrong. */
const char *guest_memory_add(
	struct guest_memory *memory, uint64_t guest, uint64_t user, uint64_t size, uint64_t offset, int fd);

/* Where [guest, guest+length) is mapped, or NULL unless all of it is inside one region. */
void *guest_memory_at(const struct guest_memory *memory, uint64_t guest, uint64_t length);

/* The same for an address of the front end's process. */
void *guest_memory_at_user(const struct guest_memory *memory, uint64_t user, uint64_t length);

/* As much of [guest, guest+*length) as one region has: shortens *length; NULL when `guest` is in no region. */
void *guest_memory_piece(const struct guest_memory *memory, uint64_t guest, uint64_t *length);

#endif
