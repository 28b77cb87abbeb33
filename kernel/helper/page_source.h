/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_PAGE_SOURCE_H
#define MOBI_PAGE_SOURCE_H

/*
 * A page source answers one question: which pages of a region may have changed since generation g - 1? It may name too
 * many, never too few; whoever asks compares each page with the hash of what was sent, so naming too many costs time
 * only. Today a memory's source names every page that is no hole, and a disk's source takes the words of the dirty map
 * that `disk` keeps. A guest that tracks its own writes gets a source of its own, and nothing else changes.
 */
#include "page_region.h"

struct page_run {
	uint64_t first, count;
	bool hole; /* nothing is there (any more) */
};

struct page_source {
	struct page_region *region;
	uint64_t generation; /* 0: everything that exists */
	uint64_t cursor;
	uint64_t data_end; /* memory: up to here the cursor is in data */
	uint64_t pending;  /* bitmaps: bits of the word before the cursor that were not named yet */
	const uint64_t *set;
	bool (*next)(struct page_source *source, struct page_run *run);
};

/* Starts a generation. Disks: words of the dirty map are exchanged with 0 one by one, before their blocks are named. */
void page_source_begin(struct page_source *source, struct page_region *region, uint64_t generation);

/* The pages of a set, which stays the caller's. */
void page_source_begin_set(struct page_source *source, struct page_region *region, const uint64_t *set);

/* The next run, ascending, at most RECORD_PAGES_MAX pages unless it is a hole; false at the end. */
static inline bool page_source_next(struct page_source *source, struct page_run *run)
{
	return source->next(source, run);
}

/* About how many bytes the generation will name: a figure for progress bars. */
uint64_t page_source_estimate(const struct page_region *region, uint64_t generation);

#endif
