/* SPDX-License-Identifier: Apache-2.0 */
#include "page_stream.h"

#include "control.h"
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <openssl/core_names.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	STALL_MS = 30000,
	PACE_SLICE_MS = 50, /* how soon a new bandwidth is obeyed */
	PACE_CHUNK_MIN = 4096,
	PACE_CHUNK_MAX = 256 * 1024,
	PACES_PER_SECOND = 200,
};

static const char direction_forth[4] = {'S', '>', 'D', 0};
static const char direction_back[4] = {'D', '>', 'S', 0};

static bool derive(const uint8_t *key, const uint8_t *migration, const char *label, uint8_t *output, size_t length)
{
	EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
	EVP_KDF_CTX *context = kdf ? EVP_KDF_CTX_new(kdf) : NULL;
	char digest[] = "SHA256";
	OSSL_PARAM parameters[] = {
		OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0),
		OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)(uintptr_t)key, STREAM_KEY_BYTES),
		OSSL_PARAM_construct_octet_string(
			OSSL_KDF_PARAM_SALT, (void *)(uintptr_t)migration, MIGRATION_ID_BYTES),
		OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, (void *)(uintptr_t)label, strlen(label)),
		OSSL_PARAM_construct_end(),
	};
	bool ok = context && EVP_KDF_derive(context, output, length, parameters) > 0;
	EVP_KDF_CTX_free(context);
	EVP_KDF_free(kdf);
	return ok;
}

static bool seal_init(struct page_seal *seal, const uint8_t *key, const uint8_t *migration, bool forth)
{
	uint8_t own[STREAM_KEY_BYTES];
	memcpy(seal->nonce, forth ? direction_forth : direction_back, 4);
	if (derive(key, migration, forth ? "mobitopolo pages S>D" : "mobitopolo pages D>S", own, sizeof(own)))
		seal->aead = aead_new(own);
	aead_wipe(own, sizeof(own));
	return seal->aead != NULL;
}

static const uint8_t *next_nonce(struct page_seal *seal)
{
	put_u64(seal->nonce + 4, seal->counter++);
	return seal->nonce;
}

static void tune_socket(int fd)
{
	int on = 1, idle = 10, interval = 5, probes = 3;
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	/* Not every stream is TCP (tests use a socket pair), so none of these may fail the migration. */
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
}

bool page_stream_open(struct page_stream *stream, int fd, int stop, const uint8_t key[STREAM_KEY_BYTES],
	const uint8_t migration[MIGRATION_ID_BYTES], bool sender, uint8_t secret[PAGE_SECRET_BYTES])
{
	*stream = (struct page_stream){.fd = fd, .stop = stop};
	stream->out = malloc(STREAM_BUFFER_BYTES);
	stream->in = malloc(STREAM_BUFFER_BYTES);
	if (!stream->out || !stream->in || !seal_init(&stream->seal, key, migration, sender) ||
		!seal_init(&stream->open, key, migration, !sender) ||
		!derive(key, migration, "mobitopolo pages root", secret, PAGE_SECRET_BYTES))
		return page_fail(&stream->failure, CONTROL_INTERNAL, "cannot set up the stream's ciphers");
	tune_socket(fd);
	return true;
}

void page_stream_close(struct page_stream *stream)
{
	aead_free(stream->seal.aead);
	aead_free(stream->open.aead);
	free(stream->out);
	free(stream->in);
	if (stream->fd >= 0)
		close(stream->fd);
	stream->seal.aead = stream->open.aead = NULL;
	stream->out = stream->in = NULL;
	stream->fd = -1;
}

uint8_t *page_stream_begin(struct page_stream *stream, size_t limit)
{
	if (stream->out_end + STREAM_LENGTH_BYTES + limit + AEAD_TAG > STREAM_BUFFER_BYTES &&
		!page_stream_flush(stream))
		return NULL;
	return stream->out + stream->out_end + STREAM_LENGTH_BYTES;
}

void page_stream_seal(struct page_stream *stream, size_t length)
{
	uint8_t *prefix = stream->out + stream->out_end;
	uint8_t *record = prefix + STREAM_LENGTH_BYTES;
	put_u32(prefix, (uint32_t)(length + AEAD_TAG));
	aead_seal(stream->seal.aead, next_nonce(&stream->seal), prefix, STREAM_LENGTH_BYTES, record, length, record);
	stream->out_end += STREAM_LENGTH_BYTES + length + AEAD_TAG;
}

uint64_t page_stream_rate(const struct page_stream *stream)
{
	struct tcp_info info = {0};
	socklen_t length = sizeof(info);
	if (getsockopt(stream->fd, IPPROTO_TCP, TCP_INFO, &info, &length) < 0 ||
		length < offsetof(struct tcp_info, tcpi_delivery_rate) + sizeof(info.tcpi_delivery_rate))
		return 0;
	return info.tcpi_delivery_rate;
}

/* Waits for `events` on the socket; false when stopped, after a silence of timeout_ms, or on a poll error. */
static bool wait_for(struct page_stream *stream, short events, int timeout_ms, short *got)
{
	struct pollfd ready[2] = {{.fd = stream->fd, .events = events}, {.fd = stream->stop, .events = POLLIN}};
	int count;
	do
		count = poll(ready, 2, timeout_ms);
	while (count < 0 && errno == EINTR);
	if (count < 0)
		return page_fail(&stream->failure, CONTROL_IO, "poll: %s", strerror(errno));
	if (ready[1].revents)
		return page_fail(&stream->failure, CONTROL_BAD_STATE, "the migration was cancelled");
	if (count == 0)
		return page_fail(&stream->failure, CONTROL_TIMEOUT, "the other side made no progress for %d s",
			timeout_ms / 1000);
	*got = ready[0].revents;
	return true;
}

/* How many bytes may be written now, after waiting for the pace to allow any. 0 = stopped. */
static size_t pace(struct page_stream *stream, size_t wanted)
{
	for (;;) {
		uint64_t rate = atomic_load(&stream->bandwidth);
		if (!stream->paced || rate == 0)
			return wanted;
		uint64_t now = loop_now();
		if (stream->pace_due_ns <= now) {
			size_t chunk = rate / PACES_PER_SECOND;
			chunk = chunk < PACE_CHUNK_MIN ? PACE_CHUNK_MIN : chunk;
			chunk = chunk > PACE_CHUNK_MAX ? PACE_CHUNK_MAX : chunk;
			return wanted < chunk ? wanted : chunk;
		}
		uint64_t wait_ns = stream->pace_due_ns - now;
		if (wait_ns > PACE_SLICE_MS * 1000000u)
			wait_ns = PACE_SLICE_MS * 1000000u;
		struct timespec timeout = {.tv_nsec = (long)wait_ns};
		struct pollfd stop = {.fd = stream->stop, .events = POLLIN};
		if (ppoll(&stop, 1, &timeout, NULL) > 0) {
			page_fail(&stream->failure, CONTROL_BAD_STATE, "the migration was cancelled");
			return 0;
		}
	}
}

/* The time the bytes just written have to last; unused time is kept for one pace only, so there are no bursts. */
static void pace_spend(struct page_stream *stream, size_t bytes)
{
	uint64_t rate = atomic_load(&stream->bandwidth);
	if (!stream->paced || rate == 0)
		return;
	uint64_t floor = loop_now() - 1000000000u / PACES_PER_SECOND;
	if (stream->pace_due_ns < floor)
		stream->pace_due_ns = floor;
	stream->pace_due_ns += bytes * 1000000000u / rate;
}

bool page_stream_flush(struct page_stream *stream)
{
	uint64_t started = loop_now();
	while (stream->out_start < stream->out_end) {
		size_t allowed = pace(stream, stream->out_end - stream->out_start);
		if (allowed == 0)
			return false;
		ssize_t sent = send(stream->fd, stream->out + stream->out_start, allowed, MSG_NOSIGNAL);
		if (sent >= 0) {
			stream->out_start += (size_t)sent;
			atomic_fetch_add(&stream->sent_bytes, (uint64_t)sent);
			pace_spend(stream, (size_t)sent);
			continue;
		}
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN)
			return page_fail(&stream->failure, CONTROL_IO, "the stream broke: %s", strerror(errno));
		short got, events = stream->watch_answer ? POLLIN | POLLOUT : POLLOUT;
		if (!wait_for(stream, events, STALL_MS, &got))
			return false;
		if (stream->watch_answer && (got & POLLIN))
			return page_fail(&stream->failure, "refused", "the receiver ended the stream");
	}
	stream->out_start = stream->out_end = 0;
	stream->waited_ns += loop_now() - started;
	return true;
}

/* The sealed length of the record at the front of the buffer, 0 when its prefix has not come yet. */
static size_t front_length(const struct page_stream *stream)
{
	if (stream->in_end - stream->in_start < STREAM_LENGTH_BYTES)
		return 0;
	return get_u32(stream->in + stream->in_start);
}

bool page_stream_has_record(const struct page_stream *stream)
{
	size_t sealed = front_length(stream);
	return sealed && stream->in_end - stream->in_start >= STREAM_LENGTH_BYTES + sealed;
}

static bool receive_more(struct page_stream *stream, int timeout_ms)
{
	if (stream->in_start > 0) {
		memmove(stream->in, stream->in + stream->in_start, stream->in_end - stream->in_start);
		stream->in_end -= stream->in_start;
		stream->in_start = 0;
	}
	for (;;) {
		ssize_t got = recv(stream->fd, stream->in + stream->in_end, STREAM_BUFFER_BYTES - stream->in_end, 0);
		if (got > 0) {
			stream->in_end += (size_t)got;
			atomic_fetch_add(&stream->received_bytes, (uint64_t)got);
			return true;
		}
		if (got == 0)
			return page_fail(&stream->failure, stream->in_end ? CONTROL_IO : "closed",
				"the other side closed the stream%s",
				stream->in_end ? " in the middle of a record" : "");
		if (errno != EAGAIN && errno != EINTR)
			return page_fail(&stream->failure, CONTROL_IO, "the stream broke: %s", strerror(errno));
		short unused;
		if (errno == EAGAIN && !wait_for(stream, POLLIN, timeout_ms, &unused))
			return false;
	}
}

bool page_stream_read(struct page_stream *stream, const uint8_t **record, size_t *length, int timeout_ms)
{
	while (stream->in_end - stream->in_start < STREAM_LENGTH_BYTES)
		if (!receive_more(stream, timeout_ms))
			return false;
	size_t size = front_length(stream);
	if (size > STREAM_SEALED_MAX || size < AEAD_TAG + RECORD_HEADER_BYTES)
		return page_fail(&stream->failure, CONTROL_LIMIT, "a record of %zu bytes was announced", size);
	while (!page_stream_has_record(stream))
		if (!receive_more(stream, timeout_ms))
			return false;
	uint8_t *prefix = stream->in + stream->in_start;
	uint8_t *sealed = prefix + STREAM_LENGTH_BYTES;
	if (!aead_open(stream->open.aead, next_nonce(&stream->open), prefix, STREAM_LENGTH_BYTES, sealed, size, sealed))
		return page_fail(&stream->failure, CONTROL_AUTHENTICATION,
			"a record does not authenticate: wrong key, or altered");
	stream->in_start += STREAM_LENGTH_BYTES + size;
	*record = sealed;
	*length = size - AEAD_TAG;
	return true;
}
