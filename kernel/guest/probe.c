// SPDX-License-Identifier: Apache-2.0
#include "probe.h"

#include "channel.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <time.h>

#define FAST_NS 1000000LL
#define SLOW_NS 50000000LL
#define SAMPLE_GAP_NS 2000000LL /* shorter holes are scheduling, not moves */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t faster;
static int64_t largest_gap, fast_until, heartbeat;
static struct {
	int64_t at, gap;
} samples[PROBE_SAMPLES];
static size_t sample_count;

static int64_t clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void note(int64_t at, int64_t gap)
{
	heartbeat++;
	if (gap > largest_gap)
		largest_gap = gap;
	if (gap >= SAMPLE_GAP_NS && sample_count < PROBE_SAMPLES) {
		samples[sample_count].at = at;
		samples[sample_count++].gap = gap;
	}
}

static void *loop(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&lock);
	for (;;) {
		int64_t before = clock_ns(CLOCK_MONOTONIC), step = before < fast_until ? FAST_NS : SLOW_NS;
		int64_t due = before + step, woken;
		struct timespec until = {.tv_sec = due / 1000000000, .tv_nsec = due % 1000000000};

		pthread_cond_timedwait(&faster, &lock, &until);
		woken = clock_ns(CLOCK_MONOTONIC);
		note(woken, woken > due ? woken - due : 0);
	}
	return NULL;
}

void probe_start(void)
{
	pthread_condattr_t attributes;
	pthread_t thread;

	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&faster, &attributes);
	if (pthread_create(&thread, NULL, loop, NULL))
		fprintf(stderr, "mobi-agent: cannot start the clock loop\n");
}

static void pack_samples(struct reply *reply)
{
	reply_key(reply, "samples");
	msgpack_pack_array(&reply->packer, sample_count);
	for (size_t i = 0; i < sample_count; i++) {
		msgpack_pack_array(&reply->packer, 2);
		msgpack_pack_int64(&reply->packer, samples[i].at);
		msgpack_pack_int64(&reply->packer, samples[i].gap);
	}
}

void probe(struct request *request)
{
	bool with_samples = map_bool(request->map, "samples", false);
	struct reply reply;
	struct sysinfo info = {0};

	sysinfo(&info);
	pthread_mutex_lock(&lock);
	if (map_bool(request->map, "reset", false)) {
		largest_gap = 0;
		sample_count = 0;
		fast_until = clock_ns(CLOCK_MONOTONIC) + PROBE_SECONDS * 1000000000LL;
		pthread_cond_signal(&faster);
	}
	reply_open(&reply, request->session, 8 + with_samples);
	reply_bool(&reply, "ok", true);
	reply_int(&reply, "realtime_ns", clock_ns(CLOCK_REALTIME));
	reply_int(&reply, "monotonic_ns", clock_ns(CLOCK_MONOTONIC));
	reply_int(&reply, "boottime_ns", clock_ns(CLOCK_BOOTTIME));
	reply_int(&reply, "largest_gap_ns", largest_gap);
	reply_int(&reply, "heartbeat", heartbeat);
	reply_int(&reply, "load", (int64_t)(info.loads[0] * 100 >> SI_LOAD_SHIFT));
	reply_int(&reply, "memory_free", (int64_t)info.freeram * info.mem_unit);
	if (with_samples)
		pack_samples(&reply);
	pthread_mutex_unlock(&lock);
	reply_send(&reply, FRAME_RESULT);
}
