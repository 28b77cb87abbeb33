/* SPDX-License-Identifier: Apache-2.0 */
#include "page_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
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

static uint64_t now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool derive(const uint8_t *key, const uint8_t *migration, const char *label, uint8_t *output, size_t length)
{
	EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
	EVP_KDF_CTX *context = kdf ? EVP_KDF_CTX_new(kdf) : NULL;
	char digest[] = "SHA256";
	OSSL_PARAM parameters[] = {
		OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0),
		OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)(uintptr_t)key, STREAM_KEY_BYTES),
		OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SALT, (void *)(uintptr_t)migration, MIGRATION_ID_BYTES),
		OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, (void *)(uintptr_t)label, strlen(label)),
		OSSL_PARAM_construct_end(),
	};
	bool ok = context && EVP_KDF_derive(context, output, length, parameters) > 0;
	EVP_KDF_CTX_free(context);
	EVP_KDF_free(kdf);
	return ok;
}

static bool seal_init(struct page_seal *seal, const uint8_t *key, const uint8_t *migration, bool forth, bool encrypt)
{
	uint8_t own[STREAM_KEY_BYTES];
	memcpy(seal->nonce, forth ? direction_forth : direction_back, 4);
	seal->cipher = EVP_CIPHER_CTX_new();
	bool ok = seal->cipher && derive(key, migration, forth ? "mobitopolo pages S>D" : "mobitopolo pages D>S", own, 32) &&
		  EVP_CipherInit_ex(seal->cipher, EVP_aes_256_gcm(), NULL, own, NULL, encrypt) == 1;
	OPENSSL_cleanse(own, sizeof(own));
	return ok;
}

static bool seal_next(struct page_seal *seal, const uint8_t *length_prefix)
{
	int unused;
	put_u64(seal->nonce + 4, seal->counter++);
	return EVP_CipherInit_ex(seal->cipher, NULL, NULL, NULL, seal->nonce, -1) == 1 &&
	       EVP_CipherUpdate(seal->cipher, NULL, &unused, length_prefix, STREAM_LENGTH_BYTES) == 1;
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
	if (!stream->out || !stream->in || !seal_init(&stream->seal, key, migration, sender, true) ||
		!seal_init(&stream->open, key, migration, !sender, false) ||
		!derive(key, migration, "mobitopolo pages root", secret, PAGE_SECRET_BYTES))
		return page_fail(&stream->failure, "internal", "cannot set up the stream's ciphers");
	tune_socket(fd);
	return true;
}

void page_stream_close(struct page_stream *stream)
{
	EVP_CIPHER_CTX_free(stream->seal.cipher);
	EVP_CIPHER_CTX_free(stream->open.cipher);
	free(stream->out);
	free(stream->in);
	if (stream->fd >= 0)
		close(stream->fd);
	stream->seal.cipher = stream->open.cipher = NULL;
	stream->out = stream->in = NULL;
	stream->fd = -1;
}

uint8_t *page_stream_begin(struct page_stream *stream, size_t limit)
{
	if (stream->out_end + STREAM_LENGTH_BYTES + limit + STREAM_TAG_BYTES > STREAM_BUFFER_BYTES &&
		!page_stream_flush(stream))
		return NULL;
	return stream->out + stream->out_end + STREAM_LENGTH_BYTES;
}

bool page_stream_seal(struct page_stream *stream, size_t length)
{
	uint8_t *prefix = stream->out + stream->out_end;
	uint8_t *record = prefix + STREAM_LENGTH_BYTES;
	int sealed, rest;
	put_u32(prefix, (uint32_t)(length + STREAM_TAG_BYTES));
	if (!seal_next(&stream->seal, prefix) ||
		EVP_EncryptUpdate(stream->seal.cipher, record, &sealed, record, (int)length) != 1 ||
		EVP_EncryptFinal_ex(stream->seal.cipher, record + sealed, &rest) != 1 ||
		EVP_CIPHER_CTX_ctrl(stream->seal.cipher, EVP_CTRL_AEAD_GET_TAG, STREAM_TAG_BYTES, record + length) != 1)
		return page_fail(&stream->failure, "internal", "cannot seal a record");
	stream->out_end += STREAM_LENGTH_BYTES + length + STREAM_TAG_BYTES;
	return true;
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
		return page_fail(&stream->failure, "io", "poll: %s", strerror(errno));
	if (ready[1].revents)
		return page_fail(&stream->failure, "bad-state", "the migration was cancelled");
	if (count == 0)
		return page_fail(&stream->failure, "timeout", "the other side made no progress for %d s", timeout_ms / 1000);
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
		uint64_t now = now_ns();
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
			page_fail(&stream->failure, "bad-state", "the migration was cancelled");
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
	uint64_t floor = now_ns() - 1000000000u / PACES_PER_SECOND;
	if (stream->pace_due_ns < floor)
		stream->pace_due_ns = floor;
	stream->pace_due_ns += bytes * 1000000000u / rate;
}

bool page_stream_flush(struct page_stream *stream)
{
	uint64_t started = now_ns();
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
			return page_fail(&stream->failure, "io", "the stream broke: %s", strerror(errno));
		short got, events = stream->watch_answer ? POLLIN | POLLOUT : POLLOUT;
		if (!wait_for(stream, events, STALL_MS, &got))
			return false;
		if (stream->watch_answer && (got & POLLIN))
			return page_fail(&stream->failure, "refused", "the receiver ended the stream");
	}
	stream->out_start = stream->out_end = 0;
	stream->waited_ns += now_ns() - started;
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
			return page_fail(&stream->failure, stream->in_end ? "io" : "closed", "the other side closed the stream%s",
				stream->in_end ? " in the middle of a record" : "");
		if (errno != EAGAIN && errno != EINTR)
			return page_fail(&stream->failure, "io", "the stream broke: %s", strerror(errno));
		short unused;
		if (errno == EAGAIN && !wait_for(stream, POLLIN, timeout_ms, &unused))
			return false;
	}
}

bool page_stream_read(struct page_stream *stream, const uint8_t **record, size_t *length, int timeout_ms)
{
	while (!page_stream_has_record(stream)) {
		size_t sealed = front_length(stream);
		if (stream->in_end - stream->in_start >= STREAM_LENGTH_BYTES &&
			(sealed > STREAM_SEALED_MAX || sealed < STREAM_TAG_BYTES + RECORD_HEADER_BYTES))
			return page_fail(&stream->failure, "limit", "a record of %zu bytes was announced", sealed);
		if (!receive_more(stream, timeout_ms))
			return false;
	}
	uint8_t *prefix = stream->in + stream->in_start;
	uint8_t *sealed = prefix + STREAM_LENGTH_BYTES;
	size_t size = get_u32(prefix);
	if (size > STREAM_SEALED_MAX || size < STREAM_TAG_BYTES + RECORD_HEADER_BYTES)
		return page_fail(&stream->failure, "limit", "a record of %zu bytes was announced", size);
	size -= STREAM_TAG_BYTES;
	int opened, rest;
	if (!seal_next(&stream->open, prefix) ||
		EVP_DecryptUpdate(stream->open.cipher, sealed, &opened, sealed, (int)size) != 1 ||
		EVP_CIPHER_CTX_ctrl(stream->open.cipher, EVP_CTRL_AEAD_SET_TAG, STREAM_TAG_BYTES, sealed + size) != 1 ||
		EVP_DecryptFinal_ex(stream->open.cipher, sealed + opened, &rest) != 1)
		return page_fail(&stream->failure, "authentication", "a record does not authenticate: wrong key, or altered");
	stream->in_start += STREAM_LENGTH_BYTES + size + STREAM_TAG_BYTES;
	*record = sealed;
	*length = size;
	return true;
}
