/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A migration stream, from a sender that has the key. Input: [mode 1 | length 2 | bytes] …: mode 0 seals the bytes as
 * one record, 1 sends them as they are, 2 sends the right greeting instead, 3 compresses what follows a record's
 * header and page numbers.
 */
#include "../page_sink.h"
#include "fuzz.h"

#include <sys/socket.h>

enum { PAGES = 32, REGION_BYTES = PAGES * PAGE_BYTES };

static const uint8_t id[MIGRATION_ID_BYTES];
static struct page_stream sender_begun, receiver_begun; /* their buffers and ciphers serve all inputs */
static uint8_t secret[PAGE_SECRET_BYTES];
static int stop[2];

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	static const uint8_t key[STREAM_KEY_BYTES];

	(void)argc;
	(void)argv;
	check(pipe(stop) == 0);
	check(page_stream_open(&sender_begun, -1, stop[0], key, id, true, secret));
	check(page_stream_open(&receiver_begun, -1, stop[0], key, id, false, secret));
	return 0;
}

static void put_greeting(struct page_stream *sender, const struct page_regions *regions)
{
	size_t length = RECORD_HEADER_BYTES + MIGRATION_ID_BYTES + regions->count * RECORD_REGION_BYTES;
	uint8_t *record = page_stream_begin(sender, length), *at = record + RECORD_HEADER_BYTES + MIGRATION_ID_BYTES;

	memset(record, 0, length);
	put_header(record, RECORD_HELLO, RECORD_VERSION, (uint16_t)regions->count, 0);
	for (size_t i = 0; i < regions->count; i++, at += RECORD_REGION_BYTES) {
		put_u32(at, regions->region[i].layout.id);
		put_u32(at + 4, regions->region[i].layout.disk);
		put_u64(at + 8, regions->region[i].layout.size);
		put_u32(at + 16, PAGE_BYTES);
	}
	page_stream_seal(sender, length);
}

static void put_record(struct page_stream *sender, const uint8_t *data, size_t size, bool compress)
{
	uint8_t *record = page_stream_begin(sender, STREAM_SEALED_MAX - AEAD_TAG);
	size_t head = compress && size >= 4 ? RECORD_HEADER_BYTES + 4 * (size_t)get_u16(data + 2) : size;

	memset(record, 0, RECORD_HEADER_BYTES);
	head = head < size ? head : size;
	memcpy(record, data, head);
	if (head < size)
		head += ZSTD_compress(record + head, ZSTD_compressBound(size), data + head, size - head, 1);
	page_stream_seal(sender, head > RECORD_HEADER_BYTES ? head : RECORD_HEADER_BYTES);
}

static void put_all(struct page_stream *sender, struct input input, const struct page_regions *regions)
{
	while (input.left) {
		unsigned mode = input_number(&input, 1) & 3;
		size_t size;
		uint8_t *piece = input_piece(&input, &size);

		if (mode == 2)
			put_greeting(sender, regions);
		else if (mode == 1 && page_stream_flush(sender))
			check(send(sender->fd, piece, size, MSG_DONTWAIT) >= 0 || size == 0);
		else
			put_record(sender, piece, size, mode == 3);
		free(piece);
	}
	page_stream_flush(sender);
	shutdown(sender->fd, SHUT_WR);
}

static void open_regions(struct page_regions *regions)
{
	const struct page_region_layout memory = {.id = 1, .size = REGION_BYTES};
	const struct page_region_layout disk = {
		.id = 2, .disk = true, .size = REGION_BYTES, .data_offset = PAGE_BYTES, .dirty_offset = 8};
	struct page_failure failure = {0};

	*regions = (struct page_regions){.count = 2};
	check(page_region_open(&regions->region[0], &memory, memory_file("", 0, REGION_BYTES), -1, &failure));
	check(page_region_open(&regions->region[1], &disk, memory_file("", 0, PAGE_BYTES + REGION_BYTES),
		memory_file("", 0, 64), &failure));
}

static void on_event(void *context, enum page_sink_event event, const struct page_sink *sink)
{
	(void)context;
	check(event != SINK_RELEASED || sink->complete);
}

static bool may_accept(void *context)
{
	(void)context;
	return true;
}

/* What the sink has noted of the pages is what they are. */
static void check_root(struct page_regions *regions)
{
	struct page_failure failure = {0};
	XXH128_hash_t root;

	check(page_regions_hash_all(regions, stop[0], &root, &failure));
	check(page_hash_equal(root, regions->root));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	int pair[2], room = 1 << 20; /* for answers, which nobody reads */
	struct page_regions regions;
	struct page_stream sender = sender_begun, receiver = receiver_begun;
	struct page_sink sink = {.regions = &regions, .stream = &receiver, .event = on_event, .may_accept = may_accept};

	check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) == 0);
	check(setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)) == 0);
	sender.fd = pair[0];
	receiver.fd = pair[1];
	open_regions(&regions);
	page_regions_set_secret(&regions, secret);
	put_all(&sender, (struct input){data, size}, &regions);
	if (!page_sink_run(&sink))
		check(receiver.failure.code && receiver.failure.message[0]);
	check_root(&regions);
	page_regions_close(&regions);
	close(pair[0]);
	close(pair[1]);
	return 0;
}
