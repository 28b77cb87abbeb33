/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_FRAME_H
#define MOBI_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * An Ethernet frame on its way through the switch, with what the virtio header said about it, and queues of frames that
 * have to wait. The bytes of a frame have FRAME_HEADROOM writable bytes in front of them, so that a tunnel's or a
 * device's header is put there without a copy.
 */
enum {
	FRAME_HEADROOM = 32,
	FRAME_MIN = 14,
	FRAME_MAX = 64000,
};

enum {
	META_NEEDS_CHECKSUM = 0x01, /* the sum from csum_start on is still to be put at csum_start + csum_offset */
	META_FLOODED = 0x02,        /* sent to every peer of the network: broadcast, multicast, unknown destination */
	META_KNOWN = META_NEEDS_CHECKSUM | META_FLOODED,
};

/* As it travels in the tunnel. The upper four bits of flags are the segmentation type, header_length goes with it. */
struct frame_meta {
	uint8_t flags, header_length, csum_start, csum_offset;
};

struct frame {
	uint8_t *data;
	uint32_t length;
	struct frame_meta meta;
};

/*
 * Refuses what must not reach a guest: wrong length, unknown flags or segmentation type, a checksum outside of the
 * frame.
 */
bool frame_valid(const struct frame *frame);

/* Computes the checksum that was left to do, for a receiver that cannot. */
void frame_finish_checksum(struct frame *frame);
/* The same for sums that begin at byte `start` and belong at `field`; both, and the field's end, are in the frame. */
void frame_checksum_at(struct frame *frame, size_t start, size_t field);

static inline const uint8_t *frame_destination(const struct frame *frame)
{
	return frame->data;
}

static inline const uint8_t *frame_source(const struct frame *frame)
{
	return frame->data + 6;
}

static inline bool mac_is_group(const uint8_t *mac)
{
	return mac[0] & 1;
}

/* A frame that waits, or a marker between frames; see handover.c. */
struct frame_item {
	struct frame_item *next;
	uint64_t sender; /* identity of the peer it came from */
	uint64_t due_ns; /* impair.c: when it leaves */
	uint64_t order;  /* impair.c: first come, first served among equal due times */
	uint64_t marker; /* 0 = a frame, else a marker of this epoch and frame.length is 0 */
	bool redirected; /* it came from the guest's old place, not from the sender itself */
	struct frame frame;
	uint8_t storage[];
};

/* A copy on the heap, or NULL without memory. frame->data may be NULL (a marker). */
struct frame_item *frame_item_new(const struct frame *frame);

/* First in, first out; counts the bytes of frames and of their book-keeping. Zeroed is empty. */
struct frame_queue {
	struct frame_item *head, *tail;
	size_t bytes, frames; /* markers are not counted in frames */
};

void frame_queue_push(struct frame_queue *queue, struct frame_item *item);
struct frame_item *frame_queue_pop(struct frame_queue *queue);                   /* NULL when empty; free() it */
void frame_queue_prepend(struct frame_queue *queue, struct frame_queue *before); /* `before` is empty then */
void frame_queue_clear(struct frame_queue *queue);

#endif
