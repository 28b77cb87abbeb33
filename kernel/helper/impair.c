/* SPDX-License-Identifier: Apache-2.0 */
#include "impair.h"

#include <stdlib.h>
#include <string.h>

#define BURST_BYTES UINT64_C(3000) /* a link that was idle may send this much at once */
#define LIMIT_MIN UINT64_C(32768)
#define NS_PER_US UINT64_C(1000)
#define NS_PER_SECOND UINT64_C(1000000000)

void impair_init(struct impair *impair, uint64_t seed)
{
	memset(impair, 0, sizeof(*impair));
	impair->random = seed;
}

void impair_free(struct impair *impair)
{
	for (size_t i = 0; i < impair->count; i++)
		free(impair->heap[i]);
	free(impair->heap);
	impair->heap = NULL;
	impair->count = impair->room = impair->bytes = 0;
}

void impair_set(struct impair *impair, const struct impair_config *config)
{
	impair->config = *config;
}

/* SplitMix64 (Steele, Lea, Flood 2014): good enough statistics for a link, and a state of one word. */
static uint64_t next_random(struct impair *impair)
{
	uint64_t z = impair->random += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

/* Evenly in [0, bound), by multiplication; bound < 2^32. */
static uint64_t random_below(struct impair *impair, uint64_t bound)
{
	return (next_random(impair) >> 32) * bound >> 32;
}

static bool happens(struct impair *impair, uint32_t ppm)
{
	return ppm && random_below(impair, 1000000) < ppm;
}

static bool earlier(const struct frame_item *a, const struct frame_item *b)
{
	return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->order < b->order;
}

static void heap_up(struct impair *impair, size_t at)
{
	while (at > 0 && earlier(impair->heap[at], impair->heap[(at - 1) / 2])) {
		struct frame_item *item = impair->heap[at];

		impair->heap[at] = impair->heap[(at - 1) / 2];
		impair->heap[(at - 1) / 2] = item;
		at = (at - 1) / 2;
	}
}

static void heap_down(struct impair *impair, size_t at)
{
	for (;;) {
		size_t first = at, left = 2 * at + 1, right = left + 1;
		struct frame_item *item = impair->heap[at];

		if (left < impair->count && earlier(impair->heap[left], impair->heap[first]))
			first = left;
		if (right < impair->count && earlier(impair->heap[right], impair->heap[first]))
			first = right;
		if (first == at)
			return;
		impair->heap[at] = impair->heap[first];
		impair->heap[first] = item;
		at = first;
	}
}

static bool heap_room(struct impair *impair)
{
	size_t room = impair->room ? 2 * impair->room : 64;
	struct frame_item **heap;

	if (impair->count < impair->room)
		return true;
	heap = realloc(impair->heap, room * sizeof(struct frame_item *));
	if (!heap)
		return false;
	impair->heap = heap;
	impair->room = room;
	return true;
}

static void enqueue(struct impair *impair, const struct frame *frame, uint64_t due_ns)
{
	struct frame_item *item = NULL;
	size_t cost = sizeof(*item) + FRAME_HEADROOM + frame->length;

	if (impair->bytes + cost <= IMPAIR_QUEUE_MAX && heap_room(impair))
		item = frame_item_new(frame);
	if (!item) {
		impair->over_limit++;
		return;
	}
	item->due_ns = due_ns;
	item->order = impair->order++;
	impair->bytes += cost;
	impair->heap[impair->count] = item;
	heap_up(impair, impair->count++);
}

/* When the link has sent the frame; false = more waits than may. */
static bool pass_rate(struct impair *impair, uint32_t length, uint64_t now_ns, uint64_t *sent_ns)
{
	uint64_t rate = impair->config.rate, limit = impair->config.limit_bytes, burst_ns, waiting;

	*sent_ns = now_ns;
	if (!rate)
		return true;
	if (!limit)
		limit = rate / 10 > LIMIT_MIN ? rate / 10 : LIMIT_MIN;
	burst_ns = BURST_BYTES * NS_PER_SECOND / rate;
	if (now_ns > burst_ns && impair->free_ns < now_ns - burst_ns)
		impair->free_ns = now_ns - burst_ns;
	waiting = impair->free_ns > now_ns ? (impair->free_ns - now_ns) / NS_PER_US * rate / 1000000 : 0;
	if (waiting + length > limit)
		return false;
	impair->free_ns += (uint64_t)length * NS_PER_SECOND / rate;
	if (impair->free_ns > now_ns)
		*sent_ns = impair->free_ns;
	return true;
}

void impair_offer(struct impair *impair, const struct frame *frame, uint64_t now_ns)
{
	const struct impair_config *c = &impair->config;
	uint64_t sent_ns, delay_ns = c->delay_us * NS_PER_US, jitter_ns = c->jitter_us * NS_PER_US, due_ns;
	bool reorder = delay_ns && happens(impair, c->reorder_ppm);

	if (happens(impair, c->loss_ppm)) {
		impair->lost++;
		return;
	}
	if (!pass_rate(impair, frame->length, now_ns, &sent_ns)) {
		impair->over_rate++;
		return;
	}
	if (reorder) {
		due_ns = sent_ns;
		impair->reordered++;
	} else {
		if (jitter_ns) { /* in µs: 2 × 60 s fit into the 32 bits of random_below() */
			delay_ns += random_below(impair, 2 * c->jitter_us + 1) * NS_PER_US;
			delay_ns = delay_ns > jitter_ns ? delay_ns - jitter_ns : 0;
		}
		due_ns = sent_ns + delay_ns;
		if (due_ns < impair->last_due_ns)
			due_ns = impair->last_due_ns;
		impair->last_due_ns = due_ns;
	}
	enqueue(impair, frame, due_ns);
	if (happens(impair, c->duplicate_ppm)) {
		impair->duplicated++;
		enqueue(impair, frame, due_ns);
	}
}

struct frame_item *impair_due(struct impair *impair, uint64_t now_ns)
{
	struct frame_item *item;

	if (!impair->count || impair->heap[0]->due_ns > now_ns)
		return NULL;
	item = impair->heap[0];
	impair->heap[0] = impair->heap[--impair->count];
	if (impair->count)
		heap_down(impair, 0);
	impair->bytes -= sizeof(*item) + FRAME_HEADROOM + item->frame.length;
	return item;
}

uint64_t impair_next(const struct impair *impair)
{
	return impair->count ? impair->heap[0]->due_ns : UINT64_MAX;
}
