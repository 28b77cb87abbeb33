/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_IMPAIR_H
#define MOBI_IMPAIR_H

#include "frame.h"

/*
 * What a link does to the frames a guest sends: loss, rate, delay, jitter, reordering, duplicates, in this order.
 *
 * The rate is a token bucket kept as the time at which the link is free again. A frame leaves at that time plus the
 * delay, with jitter evenly spread over ± jitter_us; frames keep their order (a TCP stream over a jittery link of this
 * kind sees no reordering), except the share `reorder_ppm`, which skips the delay and so overtakes the others.
 * Losses are independent of one another. Zeroed is a perfect link.
 */
struct impair_config {
	uint64_t delay_us, jitter_us; /* at most IMPAIR_DELAY_MAX_US each */
	uint32_t loss_ppm, reorder_ppm, duplicate_ppm;
	uint64_t rate;        /* bytes/s of Ethernet frames; 0 = unlimited */
	uint64_t limit_bytes; /* what may wait for the rate; 0 = 100 ms worth of it, at least 32 KiB */
};

#define IMPAIR_DELAY_MAX_US UINT64_C(60000000)
#define IMPAIR_QUEUE_MAX ((size_t)64 << 20) /* bytes a link may hold, whatever the reason */

struct impair {
	struct impair_config config;
	uint64_t free_ns;     /* when the link has sent all it has taken */
	uint64_t last_due_ns; /* no frame but a reordered one leaves before this */
	uint64_t random, order;
	struct frame_item **heap; /* by due time */
	size_t count, room, bytes;
	uint64_t lost, over_rate, over_limit, reordered, duplicated; /* frames */
};

void impair_init(struct impair *impair, uint64_t seed);
void impair_free(struct impair *impair);
void impair_set(struct impair *impair, const struct impair_config *config);

/* Whether frames have to go through impair_offer(). */
static inline bool impair_active(const struct impair *impair)
{
	const struct impair_config *c = &impair->config;

	return impair->count || c->delay_us || c->jitter_us || c->loss_ppm || c->rate || c->duplicate_ppm;
}

/* Takes a copy of the frame, or two, or drops it. */
void impair_offer(struct impair *impair, const struct frame *frame, uint64_t now_ns);

/* The next frame whose time has come, to be freed by the caller; NULL if there is none. */
struct frame_item *impair_due(struct impair *impair, uint64_t now_ns);
uint64_t impair_next(const struct impair *impair); /* when to ask again; UINT64_MAX = nothing waits */

#endif
