/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_PAGE_REGION_H
#define MOBI_PAGE_REGION_H

/*
 * A region is a run of 4096-byte pages that travels: a guest's memory (one memfd) or the copy-on-write overlay of one
 * of its disks. For every page the region remembers the hash of the content that was last sent or applied. That table
 * is three things at once: the shadow a pass compares with (one read of memory instead of two, and 0.4 % of its size
 * instead of all of it), the ledger of what the other side has, and the source of the *root*, a sum over all pages
 * that both ends keep up to date page by page and compare at the end.
 *
 * The root is a sum because a sum can be updated: when a page changes, its old term goes out and its new one comes in.
 * A term is XXH3-128 of (region, page number, XXH3-128 of the content), both with a secret derived from the stream's
 * key, so that nobody who lacks the key can look for pages that cancel out.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <xxhash.h>

enum {
	PAGE_BYTES = 4096,
	PAGE_REGIONS_MAX = 7,
	PAGE_SECRET_BYTES = 192,
	PAGE_ROOT_BYTES = 16,
	PAGE_MESSAGE_BYTES = 200,
};

/* Why something failed: one of the codes of the control protocol, and a sentence. The first failure is kept. */
struct page_failure {
	const char *code;
	char message[PAGE_MESSAGE_BYTES];
};

/* Always false, so that a function can end with `return page_fail(…)`. */
bool page_fail(struct page_failure *failure, const char *code, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* What the controller said about a region; offsets are for disks only. */
struct page_region_layout {
	uint32_t id;
	bool disk;
	uint64_t size;
	uint64_t data_offset;
	uint64_t allocated_offset;
	uint64_t dirty_offset;
};

struct page_region {
	struct page_region_layout layout;
	uint64_t pages;
	int data; /* memfd or overlay */
	int maps; /* disks: the allocated and dirty bitmaps */
	const uint8_t *memory;
	uint8_t *map_base;
	size_t map_bytes;
	_Atomic uint64_t *allocated;
	_Atomic uint64_t *dirty;
	XXH128_hash_t *hashes; /* by page; {0, 0}: a zero page of memory, or a block the overlay does not have */
};

struct page_regions {
	struct page_region region[PAGE_REGIONS_MAX];
	size_t count;
	uint8_t secret[PAGE_SECRET_BYTES];
	XXH128_hash_t zero; /* the hash of a page of zeros under this secret */
	XXH128_hash_t root;
};

/* Takes over both descriptors, also when it fails. `maps` is -1 for memory. */
bool page_region_open(struct page_region *region, const struct page_region_layout *layout, int data, int maps,
	struct page_failure *failure);
void page_regions_close(struct page_regions *regions);

/* The secret comes from the stream's key; call it before any hash is made. */
void page_regions_set_secret(struct page_regions *regions, const uint8_t secret[PAGE_SECRET_BYTES]);
struct page_region *page_regions_find(struct page_regions *regions, uint32_t id);

XXH128_hash_t page_hash(const struct page_regions *regions, const void *page);
/* Enters the hash of a page's new content into the table and the root. */
void page_region_note(struct page_regions *regions, struct page_region *region, uint64_t page, XXH128_hash_t hash);
void page_root_bytes(XXH128_hash_t root, uint8_t bytes[PAGE_ROOT_BYTES]);

/* The root of what the regions hold now, read in full; `stop` becomes readable when it is to be given up. */
bool page_regions_hash_all(struct page_regions *regions, int stop, XXH128_hash_t *root, struct page_failure *failure);

static inline bool page_hash_equal(XXH128_hash_t a, XXH128_hash_t b)
{
	return a.low64 == b.low64 && a.high64 == b.high64;
}

static inline bool page_hash_none(XXH128_hash_t hash)
{
	return hash.low64 == 0 && hash.high64 == 0;
}

#endif
