/* SPDX-License-Identifier: Apache-2.0 */
#include "page_sink.h"

#include "control.h"
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

enum {
	HELLO_MS = 10000,
};

/* The body of a record, after its header. */
struct body {
	const uint8_t *record, *at;
	size_t length;
};

static struct page_failure *failure_of(struct page_sink *sink)
{
	return &sink->stream->failure;
}

static bool bad(struct page_sink *sink, const char *what)
{
	return page_fail(failure_of(sink), CONTROL_MISMATCH, "the sender's record is wrong: %s", what);
}

static bool hello(struct page_sink *sink, const struct body *body)
{
	const struct page_regions *regions = sink->regions;
	if (body->record[1] != RECORD_VERSION)
		return bad(sink, "another version of the stream");
	if (get_u16(body->record + 2) != regions->count)
		return bad(sink, "another number of regions");
	if (body->length != MIGRATION_ID_BYTES + regions->count * RECORD_REGION_BYTES)
		return bad(sink, "a greeting of the wrong length");
	if (memcmp(body->at, sink->migration, MIGRATION_ID_BYTES) != 0)
		return bad(sink, "another migration");
	for (size_t i = 0; i < regions->count; i++) {
		const uint8_t *at = body->at + MIGRATION_ID_BYTES + i * RECORD_REGION_BYTES;
		const struct page_region_layout *own = &regions->region[i].layout;
		if (get_u32(at) != own->id || get_u32(at + 4) != own->disk || get_u64(at + 8) != own->size ||
			get_u32(at + 16) != PAGE_BYTES || get_u32(at + 20) != 0)
			return bad(sink, "a region differs in number, kind, size or block size");
	}
	return true;
}

static bool write_pages(
	struct page_sink *sink, struct page_region *region, uint64_t first, uint64_t count, const uint8_t *content)
{
	size_t left = count * PAGE_BYTES;
	off_t at = (off_t)(region->layout.data_offset + first * PAGE_BYTES);
	while (left) {
		ssize_t put = pwrite(region->data, content, left, at);
		if (put < 0 && errno == EINTR)
			continue;
		if (put <= 0)
			return page_fail(failure_of(sink), put < 0 && errno == ENOSPC ? CONTROL_NO_SPACE : CONTROL_IO,
				"region %u: cannot write page %llu: %s", region->layout.id, (unsigned long long)first,
				put < 0 ? strerror(errno) : "nothing was written");
		content += put;
		at += put;
		left -= (size_t)put;
	}
	return true;
}

static void mark_allocated(struct page_region *region, uint64_t first, uint64_t count)
{
	for (uint64_t page = first; page < first + count; page++)
		atomic_fetch_or(&region->allocated[page / 64], UINT64_C(1) << (page % 64));
}

static bool apply_run(
	struct page_sink *sink, struct page_region *region, uint64_t first, uint64_t count, const uint8_t *content)
{
	if (!write_pages(sink, region, first, count, content))
		return false;
	if (region->layout.disk)
		mark_allocated(region, first, count);
	for (uint64_t i = 0; i < count; i++)
		page_region_note(sink->regions, region, first + i, page_hash(sink->regions, content + i * PAGE_BYTES));
	return true;
}

/* The unpacked pages of a record, exactly count of them; NULL if it does not hold that. */
static const uint8_t *unpack(
	struct page_sink *sink, uint8_t encoding, const uint8_t *packed, size_t length, size_t count)
{
	size_t wanted = count * PAGE_BYTES;
	if (encoding == ENCODING_RAW)
		return length == wanted ? packed : NULL;
	if (encoding != ENCODING_ZSTD ||
		ZSTD_decompressDCtx(sink->zstd, sink->unpacked, wanted, packed, length) != wanted)
		return NULL;
	return sink->unpacked;
}

static bool pages(struct page_sink *sink, const struct body *body)
{
	struct page_region *region = page_regions_find(sink->regions, get_u32(body->record + 4));
	size_t count = get_u16(body->record + 2);
	if (!region)
		return bad(sink, "pages of an unknown region");
	if (count == 0 || count > RECORD_PAGES_MAX || body->length < 4 * count)
		return bad(sink, "an impossible number of pages");
	for (size_t i = 0; i < count; i++) {
		uint32_t page = get_u32(body->at + 4 * i);
		if (page >= region->pages || (i && page <= get_u32(body->at + 4 * (i - 1))))
			return bad(sink, "a page number out of range or order");
	}
	const uint8_t *content = unpack(sink, body->record[1], body->at + 4 * count, body->length - 4 * count, count);
	if (!content)
		return bad(sink, "pages that do not unpack to their size");
	for (size_t i = 0, run; i < count; i += run) {
		uint32_t first = get_u32(body->at + 4 * i);
		for (run = 1; i + run < count && get_u32(body->at + 4 * (i + run)) == first + run; run++)
			;
		if (!apply_run(sink, region, first, run, content + i * PAGE_BYTES))
			return false;
	}
	*(region->layout.disk ? &sink->stats.disk_blocks : &sink->stats.ram_pages) += count;
	return true;
}

/* Zeros over what is there: a hole where the file system can make one. */
static bool write_zeros(struct page_sink *sink, struct page_region *region, uint64_t first, uint64_t count)
{
	static const uint8_t zeros[PAGE_BYTES];
	off_t at = (off_t)(region->layout.data_offset + first * PAGE_BYTES);
	if (fallocate(region->data, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, (off_t)(count * PAGE_BYTES)) == 0)
		return true;
	for (uint64_t page = first; page < first + count; page++)
		if (!write_pages(sink, region, page, 1, zeros))
			return false;
	return true;
}

static bool zero_run(struct page_sink *sink, struct page_region *region, uint64_t first, uint64_t count)
{
	bool disk = region->layout.disk;
	if (!write_zeros(sink, region, first, count))
		return false;
	if (disk)
		mark_allocated(region, first, count);
	for (uint64_t page = first; page < first + count; page++)
		page_region_note(sink->regions, region, page, disk ? sink->regions->zero : (XXH128_hash_t){0});
	sink->stats.zero_pages += count;
	return true;
}

static bool zeros(struct page_sink *sink, const struct body *body)
{
	struct page_region *region = page_regions_find(sink->regions, get_u32(body->record + 4));
	size_t runs = get_u16(body->record + 2);
	uint64_t floor = 0;
	if (!region)
		return bad(sink, "zeros of an unknown region");
	if (runs == 0 || runs > RECORD_RUNS_MAX || body->length != 8 * runs)
		return bad(sink, "an impossible number of runs");
	for (size_t i = 0; i < runs; i++) {
		uint64_t first = get_u32(body->at + 8 * i), count = get_u32(body->at + 8 * i + 4);
		if (count == 0 || first < floor || first + count > region->pages)
			return bad(sink, "a run out of range or order");
		floor = first + count;
	}
	for (size_t i = 0; i < runs; i++)
		if (!zero_run(sink, region, get_u32(body->at + 8 * i), get_u32(body->at + 8 * i + 4)))
			return false;
	return true;
}

/* An answer goes out at once unless more of the sender's words are here already: then one write serves all. */
static bool answer(struct page_sink *sink, uint8_t type, uint8_t detail, uint32_t number)
{
	uint8_t *record = page_stream_begin(sink->stream, RECORD_HEADER_BYTES);
	if (!record)
		return false;
	put_header(record, type, detail, 0, number);
	page_stream_seal(sink->stream, RECORD_HEADER_BYTES);
	return page_stream_has_record(sink->stream) || page_stream_flush(sink->stream);
}

static bool pass_end(struct page_sink *sink, const struct body *body)
{
	uint32_t number = get_u32(body->record + 4);
	if (body->length != 16 || number != sink->stats.pass + 1)
		return bad(sink, "the end of another pass");
	if (get_u64(body->at) != sink->stats.ram_pages + sink->stats.disk_blocks ||
		get_u64(body->at + 8) != sink->stats.zero_pages)
		return bad(sink, "a pass of another number of pages");
	uint64_t received = atomic_load(&sink->stream->received_bytes);
	sink->stats.pass = number;
	sink->stats.sent_bytes = received - sink->pass_began_bytes;
	sink->stats.duration_ns = loop_now() - sink->pass_began_ns;
	sink->event(sink->context, SINK_PASS, sink);
	sink->stats = (struct page_stats){.pass = number};
	sink->pass_began_bytes = received;
	sink->pass_began_ns = 0;
	return answer(sink, RECORD_PASSED, 0, number);
}

static bool root(struct page_sink *sink, const struct body *body)
{
	if (body->length != PAGE_ROOT_BYTES || get_u32(body->record + 4) != sink->stats.pass || sink->pass_began_ns)
		return bad(sink, "a root in the middle of a pass");
	page_root_bytes(sink->regions->root, sink->root);
	sink->match = memcmp(sink->root, body->at, PAGE_ROOT_BYTES) == 0;
	sink->complete = true;
	sink->event(sink->context, SINK_COMPLETE, sink);
	return answer(sink, RECORD_MATCHED, sink->match, sink->stats.pass);
}

static bool release(struct page_sink *sink, const struct body *body)
{
	if (!sink->complete || body->length != MIGRATION_ID_BYTES ||
		memcmp(body->at, sink->migration, MIGRATION_ID_BYTES) != 0)
		return bad(sink, "a release that does not follow its root");
	if (!sink->may_accept(sink->context))
		return page_fail(failure_of(sink), CONTROL_BAD_STATE, "the migration was cancelled");
	sink->released_ns = loop_now();
	sink->event(sink->context, SINK_RELEASED, sink);
	/* The right to run is here whether or not the sender hears of it. */
	answer(sink, RECORD_RELEASED, sink->match, 0);
	return true;
}

/* Applies one record; *over is set by the release. */
static bool apply(struct page_sink *sink, const uint8_t *record, size_t length, bool *over)
{
	struct body body = {record, record + RECORD_HEADER_BYTES, length - RECORD_HEADER_BYTES};
	if (record[0] != RECORD_RELEASE)
		sink->complete = false;
	if (sink->pass_began_ns == 0 && (record[0] == RECORD_PAGES || record[0] == RECORD_ZEROS))
		sink->pass_began_ns = loop_now();
	switch (record[0]) {
	case RECORD_PAGES:
		return pages(sink, &body);
	case RECORD_ZEROS:
		return zeros(sink, &body);
	case RECORD_PASS:
		if (sink->pass_began_ns == 0)
			sink->pass_began_ns = loop_now();
		return pass_end(sink, &body);
	case RECORD_ROOT:
		return root(sink, &body);
	case RECORD_RELEASE:
		*over = true;
		return release(sink, &body);
	default:
		return bad(sink, "an unknown type");
	}
}

static bool converse(struct page_sink *sink)
{
	const uint8_t *record;
	size_t length;
	if (!page_stream_read(sink->stream, &record, &length, HELLO_MS))
		return false;
	struct body body = {record, record + RECORD_HEADER_BYTES, length - RECORD_HEADER_BYTES};
	if (record[0] != RECORD_HELLO)
		return bad(sink, "no greeting");
	if (!hello(sink, &body) || !answer(sink, RECORD_ACCEPTED, 0, 0))
		return false;
	sink->pass_began_bytes = atomic_load(&sink->stream->received_bytes);
	sink->event(sink->context, SINK_READY, sink);
	for (bool over = false; !over;)
		if (!page_stream_read(sink->stream, &record, &length, -1) || !apply(sink, record, length, &over))
			return false;
	return true;
}

/* Tells an authenticated sender why; one that is not, or is gone, gets nothing. */
static void refuse(struct page_sink *sink)
{
	const struct page_failure *failure = failure_of(sink);
	size_t text = strlen(failure->message);
	if (strcmp(failure->code, CONTROL_MISMATCH) != 0 && strcmp(failure->code, CONTROL_NO_SPACE) != 0 &&
		strcmp(failure->code, CONTROL_IO) != 0)
		return;
	uint8_t *record = page_stream_begin(sink->stream, RECORD_HEADER_BYTES + text);
	if (!record)
		return;
	put_header(record, RECORD_REFUSED, 0, (uint16_t)text, 0);
	memcpy(record + RECORD_HEADER_BYTES, failure->message, text);
	page_stream_seal(sink->stream, RECORD_HEADER_BYTES + text);
	page_stream_flush(sink->stream);
}

bool page_sink_run(struct page_sink *sink)
{
	sink->zstd = ZSTD_createDCtx();
	sink->unpacked = malloc((size_t)RECORD_PAGES_MAX * PAGE_BYTES);
	bool ok = sink->zstd && sink->unpacked
			  ? converse(sink)
			  : page_fail(failure_of(sink), CONTROL_LIMIT, "no memory for a record of pages");
	if (!ok)
		refuse(sink);
	ZSTD_freeDCtx(sink->zstd);
	free(sink->unpacked);
	return ok;
}
