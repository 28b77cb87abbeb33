/* SPDX-License-Identifier: Apache-2.0 */
/* What a frame's meta says about its checksum, in memory of just the frame's size. Input: [meta 4 | frame …]. */
#include "../frame.h"
#include "../tunnel_packet.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct frame_queue queue = {0};
	struct frame frame;

	if (size < TUNNEL_META)
		return 0;
	frame = (struct frame){.meta = tunnel_meta_get(data), .length = (uint32_t)(size - TUNNEL_META)};
	frame.data = malloc(frame.length + (frame.length == 0));
	check(frame.data);
	memcpy(frame.data, data + TUNNEL_META, frame.length);
	if (frame_valid(&frame)) {
		struct frame_item *item = frame_item_new(&frame);

		check(item);
		frame_queue_push(&queue, item);
		frame_finish_checksum(&frame);
		check(!(frame.meta.flags & META_NEEDS_CHECKSUM));
		frame_finish_checksum(&item->frame);
		check(memcmp(item->frame.data, frame.data, frame.length) == 0);
	}
	frame_queue_clear(&queue);
	check(queue.bytes == 0 && queue.frames == 0);
	free(frame.data);
	return 0;
}
