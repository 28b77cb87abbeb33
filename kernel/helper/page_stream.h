/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_PAGE_STREAM_H
#define MOBI_PAGE_STREAM_H

/*
 * A migration stream: sealed records over one TCP connection, in both directions. Records are sealed where they are
 * built and opened where they were received, so a page is copied once into the stream and once out of it. Every wait
 * ends with the stop descriptor, and with a deadline when the other side makes no progress.
 *
 * Each direction has a key of its own, HKDF-SHA256 of the key both peers were given, with the migration id as salt; a
 * third output is the secret of the page hashes. A record that does not open ends the stream.
 */
#include "aead.h"
#include "page_record.h"
#include "page_region.h"

enum {
	STREAM_KEY_BYTES = 32,
	STREAM_LENGTH_BYTES = 4,
	STREAM_SEALED_MAX = (1 << 20) + 64,
	STREAM_BUFFER_BYTES = 2 * STREAM_SEALED_MAX,
};

struct page_seal {
	struct aead *aead;
	uint8_t nonce[AEAD_NONCE]; /* 4 bytes of direction, u64 counter */
	uint64_t counter;
};

struct page_stream {
	int fd;
	int stop; /* readable when the stream is to be given up */
	struct page_seal seal, open;
	uint8_t *out, *in;
	size_t out_start, out_end; /* sealed bytes that the kernel has not taken yet */
	size_t in_start, in_end;   /* received bytes not opened yet */
	bool paced;
	bool watch_answer; /* anything the receiver says while we write is a refusal */
	uint64_t pace_due_ns;
	uint64_t waited_ns;         /* how long writing had to wait for the network or the pace */
	_Atomic uint64_t bandwidth; /* bytes/s, 0 = as fast as it goes */
	_Atomic uint64_t sent_bytes;
	_Atomic uint64_t received_bytes;
	struct page_failure failure;
};

/* Takes over `fd`. Fills `secret` for page_regions_set_secret(). */
bool page_stream_open(struct page_stream *stream, int fd, int stop, const uint8_t key[STREAM_KEY_BYTES],
	const uint8_t migration[MIGRATION_ID_BYTES], bool sender, uint8_t secret[PAGE_SECRET_BYTES]);
void page_stream_close(struct page_stream *stream);

/* Room for a record of up to `limit` bytes; page_stream_seal() then seals its first `length` bytes. NULL = failed. */
uint8_t *page_stream_begin(struct page_stream *stream, size_t limit);
void page_stream_seal(struct page_stream *stream, size_t length);
/* What the network carried lately, in bytes/s by TCP's own measure; 0 if unknown. */
uint64_t page_stream_rate(const struct page_stream *stream);
/* Hands everything sealed so far to the kernel. */
bool page_stream_flush(struct page_stream *stream);
static inline size_t page_stream_pending(const struct page_stream *stream)
{
	return stream->out_end - stream->out_start;
}

/*
 * The next record, opened; valid until the next call. Fails with code "closed" at an orderly end between two records.
 * `timeout_ms` is the longest silence that is borne, -1 for no limit.
 */
bool page_stream_read(struct page_stream *stream, const uint8_t **record, size_t *length, int timeout_ms);
/* Whether a whole record was received already, so that reading it will not wait. */
bool page_stream_has_record(const struct page_stream *stream);

#endif
