// SPDX-License-Identifier: Apache-2.0
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>
#include <zlib.h>

#define MAGIC_0 0xA5
#define MAGIC_1 0x5A
#define FRAME_MAX (FRAME_HEADER + FRAME_PAYLOAD_MAX + FRAME_TRAILER)

static int line = -1;
static uint8_t in[2 * FRAME_MAX];
static size_t in_start, in_end;
static uint8_t out[4 * FRAME_MAX];
static size_t out_start, out_end;
static bool garbled;

static void put32(uint8_t *at, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		at[i] = (uint8_t)(value >> (8 * i));
}

static uint32_t get32(const uint8_t *at)
{
	return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

int channel_open(const char *path)
{
	struct termios raw;

	line = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (line < 0)
		return -1;
	if (tcgetattr(line, &raw) == 0) {
		cfmakeraw(&raw);
		tcsetattr(line, TCSANOW, &raw);
	}
	return line;
}

int channel_fd(void)
{
	return line;
}

bool channel_read(void)
{
	ssize_t n;

	if (in_start) {
		memmove(in, in + in_start, in_end - in_start);
		in_end -= in_start;
		in_start = 0;
	}
	if (in_end == sizeof in) /* cannot happen while channel_next() is called: a frame is at most half of it */
		in_end = 0;
	n = read(line, in + in_end, sizeof in - in_end);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR || errno == EIO;
	in_end += (size_t)n;
	return true;
}

bool channel_next(struct frame *frame)
{
	while (in_end - in_start >= FRAME_HEADER + FRAME_TRAILER) {
		uint8_t *at = in + in_start;
		uint32_t length = get32(at + 8);
		size_t whole = FRAME_HEADER + (size_t)length + FRAME_TRAILER;

		if (at[0] != MAGIC_0 || at[1] != MAGIC_1 || at[3] != 0 || length > FRAME_PAYLOAD_MAX) {
			in_start++;
			garbled = true;
			continue;
		}
		if (in_end - in_start < whole)
			return false;
		if (get32(at + whole - FRAME_TRAILER) != crc32(0, at, (uInt)(whole - FRAME_TRAILER))) {
			in_start++;
			garbled = true;
			continue;
		}
		*frame = (struct frame){
			.type = at[2], .session = get32(at + 4), .length = length, .payload = at + FRAME_HEADER};
		in_start += whole;
		return true;
	}
	return false;
}

size_t channel_room(void)
{
	size_t used = out_end - out_start, overhead = FRAME_HEADER + FRAME_TRAILER;

	return sizeof out - used > overhead ? sizeof out - used - overhead : 0;
}

bool channel_send(uint8_t type, uint32_t session, const void *payload, size_t length)
{
	uint8_t *at;

	if (length > FRAME_PAYLOAD_MAX || length > channel_room())
		return false;
	if (sizeof out - out_end < FRAME_HEADER + length + FRAME_TRAILER) {
		memmove(out, out + out_start, out_end - out_start);
		out_end -= out_start;
		out_start = 0;
	}
	at = out + out_end;
	at[0] = MAGIC_0;
	at[1] = MAGIC_1;
	at[2] = type;
	at[3] = 0;
	put32(at + 4, session);
	put32(at + 8, (uint32_t)length);
	if (length)
		memcpy(at + FRAME_HEADER, payload, length);
	put32(at + FRAME_HEADER + length, (uint32_t)crc32(0, at, (uInt)(FRAME_HEADER + length)));
	out_end += FRAME_HEADER + length + FRAME_TRAILER;
	return true;
}

bool channel_flush(void)
{
	while (out_start < out_end) {
		ssize_t n = write(line, out + out_start, out_end - out_start);

		if (n < 0)
			return errno == EAGAIN || errno == EINTR || errno == EIO;
		if (n == 0)
			return true;
		out_start += (size_t)n;
	}
	out_start = out_end = 0;
	return true;
}

bool channel_garbled(void)
{
	const bool was = garbled;

	garbled = false;
	return was;
}

bool channel_pending(void)
{
	return out_end > out_start;
}

void channel_forget(void)
{
	out_start = out_end = 0;
}
