/* SPDX-License-Identifier: Apache-2.0 */
#include "page_source.h"

#include "page_record.h"

#include <sys/stat.h>
#include <unistd.h>

/* Where the next data begins and ends, in pages; false when there is none. */
static bool find_data(const struct page_region *region, uint64_t from, uint64_t *first, uint64_t *end)
{
	off_t limit = (off_t)region->layout.size;
	off_t data = lseek(region->data, (off_t)(from * PAGE_BYTES), SEEK_DATA);
	if (data < 0 || data >= limit)
		return false;
	off_t hole = lseek(region->data, data, SEEK_HOLE);
	if (hole < 0 || hole > limit)
		hole = limit;
	*first = (uint64_t)data / PAGE_BYTES;
	*end = ((uint64_t)hole + PAGE_BYTES - 1) / PAGE_BYTES;
	return true;
}

/* Memory has no list of changes: name all data, and the holes too, since pages may have been given back. */
static bool memory_next(struct page_source *source, struct page_run *run)
{
	const struct page_region *region = source->region;
	if (source->cursor >= region->pages)
		return false;
	uint64_t first = source->cursor;
	if (source->cursor >= source->data_end) {
		if (!find_data(region, source->cursor, &first, &source->data_end))
			first = source->data_end = region->pages;
		if (first > source->cursor) {
			*run = (struct page_run){source->cursor, first - source->cursor, true};
			source->cursor = first;
			return true;
		}
	}
	uint64_t count = source->data_end - first;
	*run = (struct page_run){first, count < RECORD_PAGES_MAX ? count : RECORD_PAGES_MAX, false};
	source->cursor = first + run->count;
	return true;
}

/* A word of the set, or of the dirty map: a write still under way sets its bit after this and is named next time. */
static uint64_t take_word(const struct page_source *source, uint64_t word)
{
	const struct page_region *region = source->region;
	uint64_t bits = 0;
	if (source->set)
		return source->set[word];
	if (atomic_load_explicit(&region->dirty[word], memory_order_relaxed))
		bits = atomic_exchange(&region->dirty[word], 0);
	if (source->generation == 0)
		bits |= atomic_load(&region->allocated[word]);
	uint64_t rest = region->pages - word * 64;
	return rest < 64 ? bits & ((UINT64_C(1) << rest) - 1) : bits;
}

static bool bitmap_next(struct page_source *source, struct page_run *run)
{
	while (source->pending == 0) {
		if (source->cursor >= (source->region->pages + 63) / 64)
			return false;
		source->pending = take_word(source, source->cursor++);
	}
	unsigned int first = (unsigned int)__builtin_ctzll(source->pending);
	uint64_t above = ~(source->pending >> first);
	unsigned int count = above ? (unsigned int)__builtin_ctzll(above) : 64;
	uint64_t mask = count == 64 ? ~UINT64_C(0) : ((UINT64_C(1) << count) - 1) << first;
	source->pending &= ~mask;
	*run = (struct page_run){(source->cursor - 1) * 64 + first, count, false};
	return true;
}

void page_source_begin(struct page_source *source, struct page_region *region, uint64_t generation)
{
	*source = (struct page_source){
		.region = region, .generation = generation, .next = region->layout.disk ? bitmap_next : memory_next};
}

void page_source_begin_set(struct page_source *source, struct page_region *region, const uint64_t *set)
{
	*source = (struct page_source){.region = region, .set = set, .next = bitmap_next};
}

uint64_t page_source_estimate(const struct page_region *region, uint64_t generation)
{
	if (!region->layout.disk) {
		struct stat info;
		return fstat(region->data, &info) < 0 ? region->layout.size : (uint64_t)info.st_blocks * 512;
	}
	uint64_t blocks = 0;
	for (uint64_t word = 0; word < (region->pages + 63) / 64; word++) {
		uint64_t bits = atomic_load_explicit(&region->dirty[word], memory_order_relaxed);
		if (generation == 0)
			bits |= atomic_load_explicit(&region->allocated[word], memory_order_relaxed);
		blocks += (uint64_t)__builtin_popcountll(bits);
	}
	return blocks * PAGE_BYTES;
}
