/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_REPLAY_H
#define MOBI_REPLAY_H

#include <stdbool.h>
#include <stdint.h>

/*
 * The window that tells a fresh packet counter from one seen before (RFC 6479): a ring of words of 64 counters each.
 * replay_fresh() is asked before the packet is opened, which spares the work for copies; replay_commit() is called only
 * after the packet proved authentic, else a forged counter could push the window away. Zeroed is a new window.
 */
enum { REPLAY_WORDS = 32, REPLAY_SPAN = (REPLAY_WORDS - 1) * 64 };

struct replay {
	uint64_t word[REPLAY_WORDS];
	uint64_t last; /* highest counter accepted */
	bool started;
};

static inline bool replay_fresh(const struct replay *replay, uint64_t counter)
{
	if (!replay->started || counter > replay->last)
		return true;
	if (replay->last - counter >= REPLAY_SPAN)
		return false;
	return !(replay->word[counter / 64 % REPLAY_WORDS] >> (counter % 64) & 1);
}

static inline void replay_commit(struct replay *replay, uint64_t counter)
{
	if (!replay->started) {
		replay->started = true;
		replay->last = counter;
	} else if (counter > replay->last) {
		/* Words after that of the last accepted counter are stale: clear them up to the new one's. */
		uint64_t from = replay->last / 64, words = counter / 64 - from;

		for (uint64_t i = 1; i <= words && i <= REPLAY_WORDS; i++)
			replay->word[(from + i) % REPLAY_WORDS] = 0;
		replay->last = counter;
	}
	replay->word[counter / 64 % REPLAY_WORDS] |= UINT64_C(1) << (counter % 64);
}

#endif
