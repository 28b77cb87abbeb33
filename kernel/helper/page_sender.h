/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_PAGE_SENDER_H
#define MOBI_PAGE_SENDER_H

/*
 * The sending end: passes over the regions while the guest runs, each sending what changed since the one before, and
 * the last one over the frozen guest. A page is copied into a batch before it is hashed and sent, so the table of
 * hashes says what the receiver has, also when the guest was writing to that page meanwhile; the next pass sees the
 * difference.
 *
 * In the final pass everything is in one go: compare, send, root, and the release right behind the root in the same
 * write, so that the destination can run after half a round trip.
 */
#include "page_region.h"
#include "page_source.h"
#include "page_stream.h"

#include <zstd.h>

struct page_stats {
	uint32_t pass;
	uint64_t ram_pages;
	uint64_t disk_blocks;
	uint64_t zero_pages;
	uint64_t sent_bytes;
	uint64_t duration_ns;
};

enum page_released {
	RELEASED_NO,    /* no byte of the release left this host */
	RELEASED_YES,   /* the receiver has it */
	RELEASED_MAYBE, /* only the other side knows */
};

struct page_final {
	uint8_t root[PAGE_ROOT_BYTES];
	bool answered; /* `match` is known */
	bool match;
	uint64_t began_ns, compared_ns; /* at a sender: when it began, and when it knew what of the memory changed */
	uint64_t released_ns;           /* at a receiver: when the release was here */
	enum page_released released;
};

struct page_sender {
	struct page_regions *regions;
	struct page_stream *stream;
	uint8_t migration[MIGRATION_ID_BYTES];
	uint32_t passes;
	/* Asked once before the release is handed over; false = it was cancelled first. */
	bool (*may_release)(void *context);
	void (*progress)(void *context, uint32_t pass, uint64_t done_bytes, uint64_t total_bytes);
	void *context;
	struct page_batch *batch;
};

bool page_sender_open(struct page_sender *sender);
void page_sender_close(struct page_sender *sender);
/* Until the receiver has agreed on the regions. */
bool page_sender_hello(struct page_sender *sender);
/* Until the receiver has applied the pass. */
bool page_sender_pass(struct page_sender *sender, struct page_stats *stats);
/*
 * On a frozen guest. With `release`, final->released is true to its words also when this fails; without, the stream
 * goes on afterwards.
 */
bool page_sender_final(struct page_sender *sender, bool release, struct page_stats *stats, struct page_final *final);

#endif
