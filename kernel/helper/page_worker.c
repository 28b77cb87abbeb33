/* SPDX-License-Identifier: Apache-2.0 */
#include "page_worker.h"

#include "control.h"
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	PROGRESS_NS = 100 * 1000 * 1000,
};

/* A notice is smaller than PIPE_BUF, so it is written whole. The pipe is closed only when nobody wants it any more. */
static void notify(struct page_worker *worker, const struct page_notice *notice)
{
	_Static_assert(sizeof(*notice) <= 4096, "a notice must fit into one atomic write");
	while (write(worker->notices_in, notice, sizeof(*notice)) < 0 && errno == EINTR)
		;
}

static void notify_failure(struct page_worker *worker, enum page_notice_kind kind, const struct page_failure *failure)
{
	struct page_notice notice = {.kind = kind, .failure = *failure};
	if (strcmp(notice.failure.code, "closed") == 0 || strcmp(notice.failure.code, "refused") == 0)
		notice.failure.code = CONTROL_IO;
	notify(worker, &notice);
}

static bool settle(void *context)
{
	struct page_worker *worker = context;
	int open = PHASE_OPEN;
	return atomic_compare_exchange_strong(&worker->phase, &open, PHASE_RELEASING);
}

static void on_progress(void *context, uint32_t pass, uint64_t done_bytes, uint64_t total_bytes)
{
	struct page_worker *worker = context;
	uint64_t now = loop_now();
	if (now < worker->progress_ns + PROGRESS_NS)
		return;
	worker->progress_ns = now;
	notify(worker, &(struct page_notice){.kind = NOTICE_PROGRESS,
			       .stats.pass = pass,
			       .done_bytes = done_bytes,
			       .total_bytes = total_bytes});
}

static void verify(struct page_worker *worker)
{
	struct page_notice notice = {.kind = NOTICE_VERIFIED};
	XXH128_hash_t root;
	if (!page_regions_hash_all(&worker->regions, worker->stop, &root, &notice.failure)) {
		notice.kind = NOTICE_NOT_VERIFIED;
	} else {
		page_root_bytes(root, notice.final.root);
		notice.final.match = memcmp(notice.final.root, worker->root, PAGE_ROOT_BYTES) == 0;
	}
	notify(worker, &notice);
}

/* The next job; false when there will be none. */
static bool next_job(struct page_worker *worker, uint8_t *job)
{
	ssize_t got;
	do
		got = read(worker->jobs_out, job, 1);
	while (got < 0 && errno == EINTR);
	return got == 1;
}

/* A pass or a final; false when the stream is over. */
static bool send_job(struct page_worker *worker, struct page_sender *sender, enum page_job_kind job)
{
	struct page_notice notice = {.kind = job == JOB_PASS ? NOTICE_PASS : NOTICE_FINAL};
	bool release = job == JOB_RELEASE;
	bool ok = job == JOB_PASS ? page_sender_pass(sender, &notice.stats)
				  : page_sender_final(sender, release, &notice.stats, &notice.final);
	if (job != JOB_PASS)
		memcpy(worker->root, notice.final.root, PAGE_ROOT_BYTES);
	if (!ok)
		page_stream_close(&worker->stream); /* before anybody hears that nothing more can leave */
	if (ok || release) {
		notice.failure = worker->stream.failure;
		notify(worker, &notice);
	}
	if (!ok)
		notify_failure(worker, NOTICE_FAILED, &worker->stream.failure);
	return ok && !release;
}

static void run_sender(struct page_worker *worker)
{
	struct page_sender sender = {.regions = &worker->regions,
		.stream = &worker->stream,
		.may_release = settle,
		.progress = on_progress,
		.context = worker};
	memcpy(sender.migration, worker->migration, MIGRATION_ID_BYTES);
	uint8_t job;
	if (page_sender_open(&sender) && page_sender_hello(&sender)) {
		notify(worker, &(struct page_notice){.kind = NOTICE_READY});
		while (next_job(worker, &job))
			if (job == JOB_VERIFY)
				verify(worker);
			else if (job == JOB_CLOSE || !send_job(worker, &sender, job))
				break;
		page_stream_close(&worker->stream);
	} else {
		page_stream_close(&worker->stream);
		notify_failure(worker, NOTICE_FAILED, &worker->stream.failure);
	}
	page_sender_close(&sender);
}

static void on_sink_event(void *context, enum page_sink_event event, const struct page_sink *sink)
{
	static const enum page_notice_kind kinds[] = {
		[SINK_READY] = NOTICE_READY,
		[SINK_PASS] = NOTICE_PASS,
		[SINK_COMPLETE] = NOTICE_FINAL,
		[SINK_RELEASED] = NOTICE_RELEASED,
	};
	struct page_worker *worker = context;
	struct page_notice notice = {.kind = kinds[event], .stats = sink->stats};
	notice.final.match = sink->match;
	notice.final.released_ns = sink->released_ns;
	memcpy(notice.final.root, sink->root, PAGE_ROOT_BYTES);
	memcpy(worker->root, sink->root, PAGE_ROOT_BYTES);
	notify(worker, &notice);
}

static void run_receiver(struct page_worker *worker)
{
	struct page_sink sink = {.regions = &worker->regions,
		.stream = &worker->stream,
		.event = on_sink_event,
		.may_accept = settle,
		.context = worker};
	memcpy(sink.migration, worker->migration, MIGRATION_ID_BYTES);
	if (page_sink_run(&sink)) {
		page_stream_close(&worker->stream);
		return;
	}
	/* Not closed: what the sender still has under way would reset the connection and take our refusal with it. */
	shutdown(worker->stream.fd, SHUT_WR);
	notify_failure(worker, NOTICE_FAILED, &worker->stream.failure);
}

static void *run(void *context)
{
	struct page_worker *worker = context;
	uint8_t job;
	if (worker->sender)
		run_sender(worker);
	else
		run_receiver(worker);
	while (next_job(worker, &job))
		if (job == JOB_VERIFY)
			verify(worker);
		else if (job == JOB_CLOSE)
			page_stream_close(&worker->stream);
	return NULL;
}

void page_worker_init(struct page_worker *worker)
{
	*worker = (struct page_worker){
		.notices = -1, .notices_in = -1, .jobs = -1, .jobs_out = -1, .stop = -1, .stream.fd = -1};
}

static bool make_pipes(struct page_worker *worker, struct page_failure *failure)
{
	int notices[2], jobs[2];
	worker->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (worker->stop < 0 || pipe2(notices, O_CLOEXEC) < 0)
		return page_fail(failure, CONTROL_LIMIT, "no more descriptors: %s", strerror(errno));
	worker->notices = notices[0];
	worker->notices_in = notices[1];
	if (pipe2(jobs, O_CLOEXEC) < 0)
		return page_fail(failure, CONTROL_LIMIT, "no more descriptors: %s", strerror(errno));
	worker->jobs_out = jobs[0];
	worker->jobs = jobs[1];
	return true;
}

bool page_worker_start(struct page_worker *worker, int fd, const uint8_t key[STREAM_KEY_BYTES], uint64_t bandwidth,
	struct page_failure *failure)
{
	uint8_t secret[PAGE_SECRET_BYTES];
	bool ok = make_pipes(worker, failure);
	if (!page_stream_open(&worker->stream, fd, worker->stop, key, worker->migration, worker->sender, secret)) {
		*failure = worker->stream.failure;
		ok = false;
	}
	if (!ok)
		return false;
	atomic_store(&worker->stream.bandwidth, bandwidth);
	page_regions_set_secret(&worker->regions, secret);
	int error = pthread_create(&worker->thread, NULL, run, worker);
	if (error)
		return page_fail(failure, CONTROL_LIMIT, "no more threads: %s", strerror(error));
	worker->running = true;
	return true;
}

void page_worker_do(struct page_worker *worker, enum page_job_kind job)
{
	uint8_t byte = (uint8_t)job;
	while (write(worker->jobs, &byte, 1) < 0 && errno == EINTR)
		;
}

static void raise_stop(struct page_worker *worker)
{
	const uint64_t one = 1;
	while (write(worker->stop, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

bool page_worker_cancel(struct page_worker *worker)
{
	int open = PHASE_OPEN;
	if (!atomic_compare_exchange_strong(&worker->phase, &open, PHASE_CANCELLED))
		return false;
	raise_stop(worker);
	return true;
}

static void close_one(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

void page_worker_stop(struct page_worker *worker)
{
	if (worker->running) {
		raise_stop(worker);
		close_one(&worker->notices); /* a writer that waits for room gets EPIPE */
		close_one(&worker->jobs);
		pthread_join(worker->thread, NULL);
		worker->running = false;
	}
	page_stream_close(&worker->stream);
	page_regions_close(&worker->regions);
	close_one(&worker->notices);
	close_one(&worker->notices_in);
	close_one(&worker->jobs);
	close_one(&worker->jobs_out);
	close_one(&worker->stop);
}
