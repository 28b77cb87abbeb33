/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_PAGE_WORKER_H
#define MOBI_PAGE_WORKER_H

/*
 * The thread that owns a migration stream, so that the control socket answers while pages move. The two threads share
 * two pipes (jobs in, notices out) and the few atomics named here; regions and stream belong to the worker from
 * page_worker_start() to page_worker_stop().
 *
 * `phase` settles who was first, a cancel or a release: it leaves PHASE_OPEN once, by compare-and-swap.
 */
#include "page_sender.h"
#include "page_sink.h"

#include <pthread.h>

enum page_job_kind {
	JOB_PASS,
	JOB_FINAL,
	JOB_RELEASE, /* a final that releases */
	JOB_VERIFY,
	JOB_CLOSE,
};

enum page_notice_kind {
	NOTICE_READY,    /* the other side agreed */
	NOTICE_PASS,     /* stats */
	NOTICE_FINAL,    /* sender: stats, final, failure; receiver: final.root and final.match */
	NOTICE_VERIFIED, /* final.root and final.match */
	NOTICE_PROGRESS,
	NOTICE_RELEASED, /* receiver */
	NOTICE_FAILED,   /* failure; ends the stream */
	NOTICE_NOT_VERIFIED,
};

struct page_notice {
	enum page_notice_kind kind;
	struct page_stats stats;
	struct page_final final;
	struct page_failure failure;
	uint64_t done_bytes, total_bytes;
};

enum page_phase { PHASE_OPEN, PHASE_RELEASING, PHASE_CANCELLED };

struct page_worker {
	bool sender;
	uint8_t migration[MIGRATION_ID_BYTES];
	struct page_regions regions;
	struct page_stream stream;
	_Atomic int phase;
	int notices; /* the owner reads struct page_notice from here */
	int notices_in, jobs, jobs_out, stop;
	pthread_t thread;
	bool running;
	uint64_t progress_ns;
	uint8_t root[PAGE_ROOT_BYTES];
};

void page_worker_init(struct page_worker *worker);
/* Regions are open, stream is not yet. Takes over `fd`. */
bool page_worker_start(struct page_worker *worker, int fd, const uint8_t key[STREAM_KEY_BYTES], uint64_t bandwidth,
	struct page_failure *failure);
void page_worker_do(struct page_worker *worker, enum page_job_kind job);
/* Everything that waits or verifies gives up soon; false when a release was first. */
bool page_worker_cancel(struct page_worker *worker);
/* Ends the thread and frees everything, whatever was set up. */
void page_worker_stop(struct page_worker *worker);

#endif
