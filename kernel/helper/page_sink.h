/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_PAGE_SINK_H
#define MOBI_PAGE_SINK_H

/*
 * The receiving end. Nothing of a record is looked at before it authenticated, and nothing of it is applied before all
 * of it was checked against the regions. Pages are written with pwrite, which fills a memfd without faults and without
 * zeroing first; a disk's blocks go into its overlay, and their *allocated* bits are set after the data.
 *
 * The sink keeps its own table of hashes, made from what it unpacked, so its root says what it applied and not what it
 * was told.
 */
#include "page_region.h"
#include "page_sender.h"
#include "page_stream.h"

enum page_sink_event {
	SINK_READY,    /* regions agreed */
	SINK_PASS,     /* stats */
	SINK_COMPLETE, /* root, match */
	SINK_RELEASED, /* the same root; the stream is over */
};

struct page_sink {
	struct page_regions *regions;
	struct page_stream *stream;
	uint8_t migration[MIGRATION_ID_BYTES];
	void (*event)(void *context, enum page_sink_event event, const struct page_sink *sink);
	/* Asked once when the release came; false = this side has cancelled before. */
	bool (*may_accept)(void *context);
	void *context;
	struct page_stats stats; /* of the pass under way */
	uint8_t root[PAGE_ROOT_BYTES];
	bool match;
	bool complete; /* the last record was a root: a release may follow */
	uint64_t pass_began_ns, pass_began_bytes, released_ns;
	ZSTD_DCtx *zstd;
	uint8_t *unpacked;
};

/* Runs until the release arrived (true) or the stream failed (false, see the stream's failure). */
bool page_sink_run(struct page_sink *sink);

#endif
