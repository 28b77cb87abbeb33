/* SPDX-License-Identifier: Apache-2.0 */
#include "frame.h"

#include <stdlib.h>
#include <string.h>

bool frame_valid(const struct frame *frame)
{
	const struct frame_meta *meta = &frame->meta;

	if (frame->length < FRAME_MIN || frame->length > FRAME_MAX || (meta->flags & ~META_KNOWN))
		return false;
	if (!(meta->flags & META_NEEDS_CHECKSUM))
		return true;
	return meta->csum_start >= FRAME_MIN && (uint32_t)meta->csum_start + meta->csum_offset + 2 <= frame->length;
}

/* The Internet checksum (RFC 1071) of bytes in network order, folded but not inverted. */
static uint16_t internet_sum(const uint8_t *data, size_t length)
{
	uint64_t sum = 0;

	for (; length >= 2; data += 2, length -= 2)
		sum += (uint16_t)(data[0] << 8 | data[1]);
	if (length)
		sum += (uint16_t)(data[0] << 8);
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

void frame_checksum_at(struct frame *frame, size_t start, size_t field)
{
	/* The field holds the sum of the pseudo-header, so it takes part. */
	uint16_t sum = (uint16_t)~internet_sum(frame->data + start, frame->length - start);

	if (sum == 0)
		sum = 0xffff; /* in UDP 0 would say "no checksum"; in TCP both are the same number */
	frame->data[field] = (uint8_t)(sum >> 8);
	frame->data[field + 1] = (uint8_t)sum;
}

void frame_finish_checksum(struct frame *frame)
{
	size_t start = frame->meta.csum_start;

	if (!(frame->meta.flags & META_NEEDS_CHECKSUM))
		return;
	frame_checksum_at(frame, start, start + frame->meta.csum_offset);
	frame->meta.flags &= (uint8_t)~META_NEEDS_CHECKSUM;
	frame->meta.csum_start = frame->meta.csum_offset = 0;
}

struct frame_item *frame_item_new(const struct frame *frame)
{
	struct frame_item *item = malloc(sizeof(*item) + FRAME_HEADROOM + frame->length);

	if (!item)
		return NULL;
	memset(item, 0, sizeof(*item));
	item->frame = *frame;
	item->frame.data = item->storage + FRAME_HEADROOM;
	if (frame->length)
		memcpy(item->frame.data, frame->data, frame->length);
	return item;
}

static size_t item_cost(const struct frame_item *item)
{
	return sizeof(*item) + FRAME_HEADROOM + item->frame.length;
}

void frame_queue_push(struct frame_queue *queue, struct frame_item *item)
{
	item->next = NULL;
	if (queue->tail)
		queue->tail->next = item;
	else
		queue->head = item;
	queue->tail = item;
	queue->bytes += item_cost(item);
	queue->frames += item->marker ? 0 : 1;
}

struct frame_item *frame_queue_pop(struct frame_queue *queue)
{
	struct frame_item *item = queue->head;

	if (!item)
		return NULL;
	queue->head = item->next;
	if (!queue->head)
		queue->tail = NULL;
	queue->bytes -= item_cost(item);
	queue->frames -= item->marker ? 0 : 1;
	return item;
}

void frame_queue_prepend(struct frame_queue *queue, struct frame_queue *before)
{
	if (!before->head)
		return;
	before->tail->next = queue->head;
	if (!queue->tail)
		queue->tail = before->tail;
	queue->head = before->head;
	queue->bytes += before->bytes;
	queue->frames += before->frames;
	memset(before, 0, sizeof(*before));
}

void frame_queue_clear(struct frame_queue *queue)
{
	for (struct frame_item *item; (item = frame_queue_pop(queue));)
		free(item);
}
