/* SPDX-License-Identifier: Apache-2.0 */
#include "page_region.h"

#include "control.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	VERIFY_CHUNK_PAGES = 256,
};

bool page_fail(struct page_failure *failure, const char *code, const char *format, ...)
{
	if (failure->code)
		return false;
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(failure->message, sizeof(failure->message), format, arguments);
	va_end(arguments);
	failure->code = code;
	return false;
}

/*
 * A descriptor passed by another process shares its file offset, and SEEK_DATA moves that; so memory gets an open file
 * of its own. Where /proc is closed to us the shared one must do: the other holders of the memfd never use its offset.
 */
static int own_description(int fd)
{
	char path[32];
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	int own = open(path, O_RDWR | O_CLOEXEC);
	if (own < 0)
		return fd;
	close(fd);
	return own;
}

static bool open_memory(struct page_region *region, struct page_failure *failure)
{
	struct stat info;
	if (fstat(region->data, &info) < 0 || (uint64_t)info.st_size < region->layout.size)
		return page_fail(failure, CONTROL_BAD_ARGUMENT,
			"region %u: the memfd is shorter than the region's %llu bytes", region->layout.id,
			(unsigned long long)region->layout.size);
	region->data = own_description(region->data);
	void *memory = mmap(NULL, region->layout.size, PROT_READ, MAP_SHARED | MAP_NORESERVE, region->data, 0);
	if (memory == MAP_FAILED)
		return page_fail(
			failure, CONTROL_IO, "region %u: cannot map the memfd: %s", region->layout.id, strerror(errno));
	region->memory = memory;
	return true;
}

static bool bitmap_fits(const struct page_region *region, uint64_t offset, uint64_t size)
{
	uint64_t bytes = (region->pages + 63) / 64 * 8;
	return offset % 8 == 0 && offset <= size && bytes <= size - offset;
}

static bool open_disk(struct page_region *region, struct page_failure *failure)
{
	const struct page_region_layout *layout = &region->layout;
	struct stat overlay, maps;
	if (fstat(region->data, &overlay) < 0 || !S_ISREG(overlay.st_mode) || fstat(region->maps, &maps) < 0)
		return page_fail(
			failure, CONTROL_BAD_ARGUMENT, "region %u: the overlay is not a regular file", layout->id);
	if (!bitmap_fits(region, layout->allocated_offset, (uint64_t)maps.st_size) ||
		!bitmap_fits(region, layout->dirty_offset, (uint64_t)maps.st_size))
		return page_fail(
			failure, CONTROL_BAD_ARGUMENT, "region %u: a bitmap lies outside the maps memfd", layout->id);
	void *base = mmap(NULL, (size_t)maps.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, region->maps, 0);
	if (base == MAP_FAILED)
		return page_fail(
			failure, CONTROL_IO, "region %u: cannot map the maps memfd: %s", layout->id, strerror(errno));
	region->map_base = base;
	region->map_bytes = (size_t)maps.st_size;
	region->allocated = (_Atomic uint64_t *)(void *)(region->map_base + layout->allocated_offset);
	region->dirty = (_Atomic uint64_t *)(void *)(region->map_base + layout->dirty_offset);
	return true;
}

bool page_region_open(struct page_region *region, const struct page_region_layout *layout, int data, int maps,
	struct page_failure *failure)
{
	*region =
		(struct page_region){.layout = *layout, .pages = layout->size / PAGE_BYTES, .data = data, .maps = maps};
	const uint64_t limit = (uint64_t)PAGE_BYTES << 32; /* page numbers are 32 bits on the wire */
	if (layout->size == 0 || layout->size % PAGE_BYTES || layout->size > limit ||
		layout->data_offset % PAGE_BYTES || layout->data_offset > limit)
		return page_fail(failure, CONTROL_BAD_ARGUMENT,
			"region %u: size %llu or its data offset is no multiple of 4096 up to 16 TiB", layout->id,
			(unsigned long long)layout->size);
	if (!(layout->disk ? open_disk(region, failure) : open_memory(region, failure)))
		return false;
	void *hashes = mmap(NULL, region->pages * sizeof(XXH128_hash_t), PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (hashes == MAP_FAILED)
		return page_fail(failure, CONTROL_LIMIT, "region %u: no memory for its page hashes", layout->id);
	region->hashes = hashes;
	return true;
}

void page_regions_close(struct page_regions *regions)
{
	for (size_t i = 0; i < regions->count; i++) {
		struct page_region *region = &regions->region[i];
		if (region->memory)
			munmap((void *)(uintptr_t)region->memory, region->layout.size);
		if (region->map_base)
			munmap(region->map_base, region->map_bytes);
		if (region->hashes)
			munmap(region->hashes, region->pages * sizeof(XXH128_hash_t));
		if (region->data >= 0)
			close(region->data);
		if (region->maps >= 0)
			close(region->maps);
	}
	*regions = (struct page_regions){0};
}

void page_regions_set_secret(struct page_regions *regions, const uint8_t secret[PAGE_SECRET_BYTES])
{
	static const uint8_t zeros[PAGE_BYTES];
	memcpy(regions->secret, secret, PAGE_SECRET_BYTES);
	regions->zero = page_hash(regions, zeros);
}

struct page_region *page_regions_find(struct page_regions *regions, uint32_t id)
{
	for (size_t i = 0; i < regions->count; i++)
		if (regions->region[i].layout.id == id)
			return &regions->region[i];
	return NULL;
}

XXH128_hash_t page_hash(const struct page_regions *regions, const void *page)
{
	return XXH3_128bits_withSecret(page, PAGE_BYTES, regions->secret, PAGE_SECRET_BYTES);
}

static XXH128_hash_t root_term(
	const struct page_regions *regions, const struct page_region *region, uint64_t page, XXH128_hash_t hash)
{
	if (page_hash_none(hash))
		return hash;
	const uint64_t words[4] = {region->layout.id, page, hash.low64, hash.high64};
	return XXH3_128bits_withSecret(words, sizeof(words), regions->secret, PAGE_SECRET_BYTES);
}

void page_region_note(struct page_regions *regions, struct page_region *region, uint64_t page, XXH128_hash_t hash)
{
	XXH128_hash_t before = root_term(regions, region, page, region->hashes[page]);
	XXH128_hash_t after = root_term(regions, region, page, hash);
	regions->root.low64 += after.low64 - before.low64;
	regions->root.high64 += after.high64 - before.high64;
	region->hashes[page] = hash;
}

void page_root_bytes(XXH128_hash_t root, uint8_t bytes[PAGE_ROOT_BYTES])
{
	for (int i = 0; i < 8; i++) {
		bytes[i] = (uint8_t)(root.low64 >> (8 * i));
		bytes[8 + i] = (uint8_t)(root.high64 >> (8 * i));
	}
}

static bool stopped(int stop)
{
	struct pollfd ready = {.fd = stop, .events = POLLIN};
	return poll(&ready, 1, 0) > 0;
}

static void add_term(const struct page_regions *regions, const struct page_region *region, uint64_t page,
	const uint8_t *content, XXH128_hash_t *root)
{
	XXH128_hash_t hash = page_hash(regions, content);
	if (!region->layout.disk && page_hash_equal(hash, regions->zero))
		return;
	XXH128_hash_t term = root_term(regions, region, page, hash);
	root->low64 += term.low64;
	root->high64 += term.high64;
}

static bool hash_memory(struct page_regions *regions, const struct page_region *region, int stop, XXH128_hash_t *root,
	struct page_failure *failure)
{
	off_t limit = (off_t)region->layout.size;
	for (off_t at = lseek(region->data, 0, SEEK_DATA); at >= 0 && at < limit;
		at = lseek(region->data, at, SEEK_DATA)) {
		off_t end = lseek(region->data, at, SEEK_HOLE);
		if (end < 0 || end > limit)
			end = limit;
		for (; at < end; at += PAGE_BYTES) {
			uint64_t page = (uint64_t)at / PAGE_BYTES;
			if (page % VERIFY_CHUNK_PAGES == 0 && stopped(stop))
				return page_fail(failure, CONTROL_BAD_STATE, "verification was given up");
			add_term(regions, region, page, region->memory + at, root);
		}
	}
	return true;
}

static bool hash_disk(struct page_regions *regions, const struct page_region *region, int stop, XXH128_hash_t *root,
	struct page_failure *failure)
{
	uint8_t block[PAGE_BYTES];
	for (uint64_t page = 0; page < region->pages; page++) {
		uint64_t word = atomic_load(&region->allocated[page / 64]);
		if (word == 0)
			page |= 63;
		if (!(word >> (page % 64) & 1))
			continue;
		if (page % VERIFY_CHUNK_PAGES == 0 && stopped(stop))
			return page_fail(failure, CONTROL_BAD_STATE, "verification was given up");
		off_t offset = (off_t)(region->layout.data_offset + page * PAGE_BYTES);
		ssize_t got = pread(region->data, block, sizeof(block), offset);
		if (got < 0)
			return page_fail(failure, CONTROL_IO, "region %u: cannot read block %llu: %s",
				region->layout.id, (unsigned long long)page, strerror(errno));
		memset(block + got, 0, sizeof(block) - (size_t)got);
		add_term(regions, region, page, block, root);
	}
	return true;
}

bool page_regions_hash_all(struct page_regions *regions, int stop, XXH128_hash_t *root, struct page_failure *failure)
{
	*root = (XXH128_hash_t){0};
	for (size_t i = 0; i < regions->count; i++) {
		const struct page_region *region = &regions->region[i];
		if (!(region->layout.disk ? hash_disk(regions, region, stop, root, failure)
					  : hash_memory(regions, region, stop, root, failure)))
			return false;
	}
	return true;
}
