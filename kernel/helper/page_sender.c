/* SPDX-License-Identifier: Apache-2.0 */
#include "page_sender.h"

#include "control.h"
#include "loop.h"
#include "page_scan.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

enum {
	ANSWER_MS = 30000,
	FLUSH_BYTES = 128 * 1024,
	ZSTD_LEVEL = 1,
	RAW_RATE = 250 * 1000 * 1000, /* bytes/s from which compressing the last pages costs more than it saves */
	PROGRESS_RUNS = 64,           /* how many runs between two looks at the clock */
};

/* Pages and zero runs collected for the next records. All pages of a batch are of one region. */
struct page_batch {
	ZSTD_CCtx *zstd;
	struct page_region *region;
	struct page_stats *stats;
	uint64_t *set; /* of a final pass */
	uint64_t compared_ns;
	size_t pages, runs;
	bool urgent; /* send each record at once: somebody is frozen */
	bool raw;    /* the network is faster than the compressor */
	uint32_t numbers[RECORD_PAGES_MAX];
	uint32_t run[RECORD_RUNS_MAX][2];
	_Alignas(64) uint8_t data[RECORD_PAGES_MAX][PAGE_BYTES];
	_Alignas(64) uint8_t blocks[RECORD_PAGES_MAX][PAGE_BYTES]; /* a disk's run as read */
};

bool page_sender_open(struct page_sender *sender)
{
	sender->batch = aligned_alloc(64, (sizeof(struct page_batch) + 63) / 64 * 64);
	if (sender->batch)
		*sender->batch = (struct page_batch){.zstd = ZSTD_createCCtx()};
	if (!sender->batch || !sender->batch->zstd)
		return page_fail(&sender->stream->failure, CONTROL_LIMIT, "no memory for a batch of pages");
	return true;
}

void page_sender_close(struct page_sender *sender)
{
	if (sender->batch) {
		ZSTD_freeCCtx(sender->batch->zstd);
		free(sender->batch->set);
	}
	free(sender->batch);
	sender->batch = NULL;
}

static struct page_failure *failure_of(struct page_sender *sender)
{
	return &sender->stream->failure;
}

/* The next record must be of this type; a refusal's text becomes the failure. */
static bool expect(struct page_sender *sender, uint8_t type, uint32_t number, const uint8_t **record)
{
	size_t length;
	if (!page_stream_read(sender->stream, record, &length, ANSWER_MS))
		return false;
	const uint8_t *answer = *record;
	if (answer[0] == RECORD_REFUSED) {
		size_t text = get_u16(answer + 2);
		text = text <= length - RECORD_HEADER_BYTES ? text : length - RECORD_HEADER_BYTES;
		return page_fail(failure_of(sender), CONTROL_MISMATCH, "the receiver refused: %.*s", (int)text,
			(const char *)answer + RECORD_HEADER_BYTES);
	}
	if (answer[0] != type || get_u32(answer + 4) != number)
		return page_fail(failure_of(sender), CONTROL_IO, "an unexpected answer of type %u came", answer[0]);
	return true;
}

static bool flush(struct page_sender *sender)
{
	if (page_stream_flush(sender->stream))
		return true;
	if (failure_of(sender)->code && strcmp(failure_of(sender)->code, "refused") == 0) {
		const uint8_t *record;
		*failure_of(sender) = (struct page_failure){0};
		if (expect(sender, RECORD_REFUSED, 0, &record))
			return page_fail(failure_of(sender), CONTROL_IO, "the receiver ended the stream");
	}
	return false;
}

bool page_sender_hello(struct page_sender *sender)
{
	const struct page_regions *regions = sender->regions;
	size_t length = RECORD_HEADER_BYTES + MIGRATION_ID_BYTES + regions->count * RECORD_REGION_BYTES;
	uint8_t *record = page_stream_begin(sender->stream, length);
	if (!record)
		return false;
	put_header(record, RECORD_HELLO, RECORD_VERSION, (uint16_t)regions->count, 0);
	memcpy(record + RECORD_HEADER_BYTES, sender->migration, MIGRATION_ID_BYTES);
	uint8_t *at = record + RECORD_HEADER_BYTES + MIGRATION_ID_BYTES;
	for (size_t i = 0; i < regions->count; i++, at += RECORD_REGION_BYTES) {
		const struct page_region_layout *layout = &regions->region[i].layout;
		put_u32(at, layout->id);
		put_u32(at + 4, layout->disk);
		put_u64(at + 8, layout->size);
		put_u32(at + 16, PAGE_BYTES);
		put_u32(at + 20, 0);
	}
	const uint8_t *answer;
	page_stream_seal(sender->stream, length);
	if (!flush(sender))
		return false;
	if (expect(sender, RECORD_ACCEPTED, 0, &answer))
		return true;
	if (strcmp(failure_of(sender)->code, "closed") == 0)
		*failure_of(sender) = (struct page_failure){CONTROL_AUTHENTICATION,
			"the receiver closed the stream unanswered: its key or migration is another"};
	return false;
}

static bool send_pages(struct page_sender *sender)
{
	struct page_batch *batch = sender->batch;
	size_t raw = batch->pages * PAGE_BYTES, head = RECORD_HEADER_BYTES + 4 * batch->pages;
	if (batch->pages == 0)
		return true;
	uint8_t *record = page_stream_begin(sender->stream, head + ZSTD_compressBound(raw));
	if (!record)
		return false;
	size_t packed = raw;
	uint8_t encoding = ENCODING_ZSTD;
	if (!batch->raw)
		packed = ZSTD_compressCCtx(
			batch->zstd, record + head, ZSTD_compressBound(raw), batch->data, raw, ZSTD_LEVEL);
	if (ZSTD_isError(packed) || packed >= raw) {
		encoding = ENCODING_RAW;
		packed = raw;
		memcpy(record + head, batch->data, raw);
	}
	put_header(record, RECORD_PAGES, encoding, (uint16_t)batch->pages, batch->region->layout.id);
	for (size_t i = 0; i < batch->pages; i++)
		put_u32(record + RECORD_HEADER_BYTES + 4 * i, batch->numbers[i]);
	batch->pages = 0;
	page_stream_seal(sender->stream, head + packed);
	return (!batch->urgent && page_stream_pending(sender->stream) < FLUSH_BYTES) || flush(sender);
}

static bool send_zeros(struct page_sender *sender)
{
	struct page_batch *batch = sender->batch;
	size_t length = RECORD_HEADER_BYTES + 8 * batch->runs;
	if (batch->runs == 0)
		return true;
	uint8_t *record = page_stream_begin(sender->stream, length);
	if (!record)
		return false;
	put_header(record, RECORD_ZEROS, 0, (uint16_t)batch->runs, batch->region->layout.id);
	for (size_t i = 0; i < batch->runs; i++) {
		put_u32(record + RECORD_HEADER_BYTES + 8 * i, batch->run[i][0]);
		put_u32(record + RECORD_HEADER_BYTES + 8 * i + 4, batch->run[i][1]);
	}
	batch->runs = 0;
	page_stream_seal(sender->stream, length);
	return true;
}

static bool add_zero(struct page_sender *sender, uint64_t page)
{
	struct page_batch *batch = sender->batch;
	bool disk = batch->region->layout.disk;
	page_region_note(sender->regions, batch->region, page, disk ? sender->regions->zero : (XXH128_hash_t){0});
	batch->stats->zero_pages++;
	if (batch->runs) {
		uint32_t *last = batch->run[batch->runs - 1];
		if ((uint64_t)last[0] + last[1] == page) {
			last[1]++;
			return true;
		}
	}
	if (batch->runs == RECORD_RUNS_MAX && !send_zeros(sender))
		return false;
	batch->run[batch->runs][0] = (uint32_t)page;
	batch->run[batch->runs++][1] = 1;
	return true;
}

/* Enters a page whose content may still be changing: what is copied here is what counts. */
static bool add_page(struct page_sender *sender, uint64_t page, const uint8_t *content)
{
	struct page_batch *batch = sender->batch;
	uint8_t *copy = batch->data[batch->pages];
	memcpy(copy, content, PAGE_BYTES);
	XXH128_hash_t hash = page_hash(sender->regions, copy);
	XXH128_hash_t known = batch->region->hashes[page];
	if (page_hash_equal(hash, known))
		return true;
	if (page_hash_equal(hash, sender->regions->zero))
		return page_hash_none(known) && !batch->region->layout.disk ? true : add_zero(sender, page);
	page_region_note(sender->regions, batch->region, page, hash);
	if (batch->region->layout.disk)
		batch->stats->disk_blocks++;
	else
		batch->stats->ram_pages++;
	batch->numbers[batch->pages++] = (uint32_t)page;
	return batch->pages < RECORD_PAGES_MAX || send_pages(sender);
}

static bool visit_memory(struct page_sender *sender, const struct page_run *run)
{
	struct page_region *region = sender->batch->region;
	for (uint64_t page = run->first; page < run->first + run->count; page++) {
		const uint8_t *content = region->memory + page * PAGE_BYTES;
		XXH128_hash_t known = region->hashes[page];
		if (run->hole) {
			if (!page_hash_none(known) && !add_zero(sender, page))
				return false;
		} else if (page_hash_none(known) || !page_hash_equal(page_hash(sender->regions, content), known)) {
			if (!add_page(sender, page, content))
				return false;
		}
	}
	return true;
}

static bool visit_disk(struct page_sender *sender, const struct page_run *run)
{
	struct page_batch *batch = sender->batch;
	const struct page_region_layout *layout = &batch->region->layout;
	size_t wanted = run->count * PAGE_BYTES;
	ssize_t got;
	do
		got = pread(batch->region->data, batch->blocks, wanted,
			(off_t)(layout->data_offset + run->first * PAGE_BYTES));
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return page_fail(failure_of(sender), CONTROL_IO, "disk %u: cannot read block %llu: %s", layout->id,
			(unsigned long long)run->first, strerror(errno));
	/* The file may end in the middle of the last block that was written. */
	memset((uint8_t *)batch->blocks + got, 0, wanted - (size_t)got);
	for (uint64_t i = 0; i < run->count; i++)
		if (!add_page(sender, run->first + i, batch->blocks[i]))
			return false;
	return true;
}

/* A hole is given as one run however long; holes of a first pass need no look, nothing was ever sent of them. */
static bool visit(struct page_sender *sender, const struct page_run *run)
{
	if (run->hole && sender->passes == 0)
		return true;
	return sender->batch->region->layout.disk ? visit_disk(sender, run) : visit_memory(sender, run);
}

/* A frozen guest's memory is compared in one go first; nothing of it changes any more. */
static bool begin_source(struct page_sender *sender, struct page_source *source, struct page_region *region)
{
	struct page_batch *batch = sender->batch;
	if (!batch->urgent || region->layout.disk || sender->passes == 0) {
		page_source_begin(source, region, sender->passes);
		return true;
	}
	batch->set = calloc((region->pages + 63) / 64, sizeof(*batch->set));
	if (!batch->set) {
		page_fail(failure_of(sender), CONTROL_LIMIT, "no memory for a set of pages");
		return false;
	}
	page_scan(sender->regions, region, batch->set);
	batch->compared_ns = loop_now();
	page_source_begin_set(source, region, batch->set);
	return true;
}

static bool send_region(struct page_sender *sender, struct page_region *region, uint64_t *done, uint64_t total)
{
	struct page_source source;
	struct page_run run;
	unsigned int runs = 0;
	sender->batch->region = region;
	if (!begin_source(sender, &source, region))
		return false;
	while (page_source_next(&source, &run)) {
		if (!visit(sender, &run))
			return false;
		*done += run.hole ? 0 : run.count * PAGE_BYTES;
		if (++runs % PROGRESS_RUNS == 0)
			sender->progress(sender->context, sender->passes + 1, *done < total ? *done : total, total);
	}
	free(sender->batch->set);
	sender->batch->set = NULL;
	return send_zeros(sender) && send_pages(sender);
}

/* All regions and the PASS record; the last records stay in the stream's buffer. */
static bool send_changes(struct page_sender *sender, struct page_stats *stats)
{
	uint64_t done = 0, total = 0;
	sender->batch->stats = stats;
	sender->stream->watch_answer = true;
	for (size_t i = 0; i < sender->regions->count; i++)
		total += page_source_estimate(&sender->regions->region[i], sender->passes);
	for (size_t i = 0; i < sender->regions->count; i++)
		if (!send_region(sender, &sender->regions->region[i], &done, total))
			return false;
	sender->stream->watch_answer = false;
	stats->pass = ++sender->passes;
	uint8_t *record = page_stream_begin(sender->stream, RECORD_HEADER_BYTES + 16);
	if (!record)
		return false;
	put_header(record, RECORD_PASS, 0, 0, stats->pass);
	put_u64(record + RECORD_HEADER_BYTES, stats->ram_pages + stats->disk_blocks);
	put_u64(record + RECORD_HEADER_BYTES + 8, stats->zero_pages);
	page_stream_seal(sender->stream, RECORD_HEADER_BYTES + 16);
	return true;
}

bool page_sender_pass(struct page_sender *sender, struct page_stats *stats)
{
	*stats = (struct page_stats){0};
	uint64_t started = loop_now(), sent = atomic_load(&sender->stream->sent_bytes);
	const uint8_t *answer;
	sender->stream->paced = true;
	sender->batch->urgent = sender->batch->raw = false;
	bool ok = send_changes(sender, stats) && flush(sender) && expect(sender, RECORD_PASSED, stats->pass, &answer);
	stats->duration_ns = loop_now() - started;
	stats->sent_bytes = atomic_load(&sender->stream->sent_bytes) - sent;
	return ok;
}

static bool send_root(struct page_sender *sender, uint32_t pass, const uint8_t root[PAGE_ROOT_BYTES])
{
	size_t length = RECORD_HEADER_BYTES + PAGE_ROOT_BYTES;
	uint8_t *record = page_stream_begin(sender->stream, length);
	if (!record)
		return false;
	put_header(record, RECORD_ROOT, 0, 0, pass);
	memcpy(record + RECORD_HEADER_BYTES, root, PAGE_ROOT_BYTES);
	page_stream_seal(sender->stream, length);
	return true;
}

/* Seals the release and hands everything to the kernel; released_at is where its first byte lies in the stream. */
static bool send_release(struct page_sender *sender, uint64_t *released_at)
{
	size_t length = RECORD_HEADER_BYTES + MIGRATION_ID_BYTES;
	uint8_t *record = page_stream_begin(sender->stream, length);
	if (!record)
		return false;
	if (!sender->may_release(sender->context))
		return page_fail(failure_of(sender), CONTROL_BAD_STATE, "the migration was cancelled");
	*released_at = atomic_load(&sender->stream->sent_bytes) + page_stream_pending(sender->stream);
	put_header(record, RECORD_RELEASE, 0, 0, 0);
	memcpy(record + RECORD_HEADER_BYTES, sender->migration, MIGRATION_ID_BYTES);
	page_stream_seal(sender->stream, length);
	return true;
}

static bool await_final(struct page_sender *sender, uint32_t pass, bool release, struct page_final *final)
{
	const uint8_t *answer;
	if (!expect(sender, RECORD_PASSED, pass, &answer) || !expect(sender, RECORD_MATCHED, pass, &answer))
		return false;
	final->answered = true;
	final->match = answer[1] == 1;
	return !release || expect(sender, RECORD_RELEASED, 0, &answer);
}

bool page_sender_final(struct page_sender *sender, bool release, struct page_stats *stats, struct page_final *final)
{
	*stats = (struct page_stats){0};
	*final = (struct page_final){.released = RELEASED_NO, .began_ns = loop_now()};
	struct page_stream *stream = sender->stream;
	uint64_t sent = atomic_load(&stream->sent_bytes), released_at = UINT64_MAX;
	stream->paced = false;
	sender->batch->compared_ns = final->began_ns;
	sender->batch->urgent = true;
	sender->batch->raw = sender->passes > 0 && page_stream_rate(stream) > RAW_RATE;
	bool ok = send_changes(sender, stats);
	final->compared_ns = sender->batch->compared_ns;
	page_root_bytes(sender->regions->root, final->root);
	ok = ok && send_root(sender, stats->pass, final->root) && (!release || send_release(sender, &released_at)) &&
	     flush(sender);
	if (atomic_load(&stream->sent_bytes) > released_at)
		final->released = RELEASED_MAYBE;
	ok = ok && await_final(sender, stats->pass, release, final);
	if (ok && release)
		final->released = RELEASED_YES;
	stats->duration_ns = loop_now() - final->began_ns;
	stats->sent_bytes = atomic_load(&stream->sent_bytes) - sent;
	return ok;
}
