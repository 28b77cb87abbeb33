/* SPDX-License-Identifier: Apache-2.0 */
#include "page_scan.h"

#include <pthread.h>
#include <unistd.h>

enum {
	CHUNK_PAGES = 2048, /* what a thread takes at a time: a multiple of 64, so that no word is shared */
	TWO_THREADS_PAGES = 4 * CHUNK_PAGES,
};

struct scan {
	const struct page_regions *regions;
	const struct page_region *region;
	uint64_t *set;
	_Atomic uint64_t next;
};

static void name(struct scan *scan, uint64_t page)
{
	scan->set[page / 64] |= UINT64_C(1) << (page % 64);
}

static void compare(struct scan *scan, uint64_t page)
{
	const struct page_region *region = scan->region;
	XXH128_hash_t hash = page_hash(scan->regions, region->memory + page * PAGE_BYTES);
	XXH128_hash_t known = region->hashes[page];
	if (!page_hash_equal(hash, page_hash_none(known) ? scan->regions->zero : known))
		name(scan, page);
}

/*
 * Compares what exists of a run in which everything was zeros so far. Touching a hole would allocate it, so the data is
 * looked for; with SEEK_DATA alone, since SEEK_HOLE walks to the end of the data, which may be far.
 */
static void compare_zeros(struct scan *scan, uint64_t page, uint64_t end)
{
	for (; page < end; page++) {
		off_t data = lseek(scan->region->data, (off_t)(page * PAGE_BYTES), SEEK_DATA);
		if (data < 0 || (uint64_t)data / PAGE_BYTES >= end)
			return;
		page = (uint64_t)data / PAGE_BYTES;
		compare(scan, page);
	}
}

static void compare_chunk(struct scan *scan, uint64_t page, uint64_t end)
{
	const XXH128_hash_t *hashes = scan->region->hashes;
	while (page < end) {
		uint64_t first = page;
		while (page < end && page_hash_none(hashes[page]))
			page++;
		if (page > first)
			compare_zeros(scan, first, page);
		for (; page < end && !page_hash_none(hashes[page]); page++)
			compare(scan, page);
	}
}

static void *compare_chunks(void *context)
{
	struct scan *scan = context;
	uint64_t pages = scan->region->pages, at;
	while ((at = atomic_fetch_add(&scan->next, CHUNK_PAGES)) < pages)
		compare_chunk(scan, at, at + CHUNK_PAGES < pages ? at + CHUNK_PAGES : pages);
	return NULL;
}

void page_scan(const struct page_regions *regions, const struct page_region *region, uint64_t *set)
{
	struct scan scan = {.regions = regions, .region = region, .set = set};
	pthread_t second;
	bool two = region->pages >= TWO_THREADS_PAGES && pthread_create(&second, NULL, compare_chunks, &scan) == 0;
	compare_chunks(&scan);
	if (two)
		pthread_join(second, NULL);
}
