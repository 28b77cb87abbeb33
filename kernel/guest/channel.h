// SPDX-License-Identifier: Apache-2.0
/*
 * The agent's channel: frames over a raw serial line (kernel/README.md, section 9). The line may deliver garbage (boot
 * messages, the middle of a frame after the host attached anew), so a reader searches for the two magic bytes and
 * believes a frame only when its CRC is right.
 */
#ifndef MOBI_CHANNEL_H
#define MOBI_CHANNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_HEADER 12
#define FRAME_TRAILER 4
#define FRAME_PAYLOAD_MAX 65536

enum frame_type {
	FRAME_RESET = 1,
	FRAME_HELLO = 2,
	FRAME_CONFIGURE = 3,
	FRAME_EXEC = 4,
	FRAME_STREAM = 5,
	FRAME_CREDIT = 6,
	FRAME_SIGNAL = 7,
	FRAME_GET = 8,
	FRAME_PUT = 9,
	FRAME_PROBE = 10,
	FRAME_POWEROFF = 11,
	FRAME_RESULT = 12,
};

struct frame {
	uint8_t type;
	uint32_t session;
	uint32_t length;
	const uint8_t *payload; /* valid until the next call of channel_read() or channel_next() */
};

/* Opens the line in raw, non-blocking mode; -1 and errno on failure. */
int channel_open(const char *path);
int channel_fd(void);

/* Takes what the line has into the buffer; false when the line is broken. */
bool channel_read(void);
/* The next whole frame, or false when more bytes are needed. */
bool channel_next(struct frame *frame);
/* Whether bytes that belong to no frame were skipped since the last call: a frame may have been lost. */
bool channel_garbled(void);

/* Queues one frame; false when the queue is full (the caller keeps its data and tries again later). */
bool channel_send(uint8_t type, uint32_t session, const void *payload, size_t length);
/* Bytes of payload that one channel_send() would take now. */
size_t channel_room(void);
/* Writes what the line takes; false when the line is broken. */
bool channel_flush(void);
bool channel_pending(void);
/* Forgets what is queued: the host has attached anew. */
void channel_forget(void);

#endif
