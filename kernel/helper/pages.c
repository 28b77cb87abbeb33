/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The role `pages`: one end of a migration stream (kernel/README.md, section 6). This file is its conversation with the
 * peer; the stream itself is the business of a thread (page_worker.h). One process serves one migration and ends with
 * its controller, except that a release which has begun is finished first.
 */
#include "control.h"
#include "log.h"
#include "options.h"
#include "page_worker.h"
#include "role.h"

#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum {
	CONTROLLER_SECONDS = 30, /* how long nobody may have connected */
};

enum pages_state { IDLE, CONNECTING, READY, PASSING, FINAL, RELEASED, CLOSED, BROKEN };

static const char *const state_names[] = {
	"idle", "connecting", "ready", "pass", "final", "released", "closed", "broken"};
static const char *const released_names[] = {"no", "yes", "maybe"};

struct pages {
	struct loop *loop;
	struct control *control;
	struct loop_timer orphan;
	struct page_worker worker;
	enum pages_state state;
	struct control_ticket ticket; /* of send, receive, pass or final */
	struct control_ticket verify_ticket;
	bool releasing; /* the job under way is a final that releases */
	bool leaving;
	uint32_t pass;
	uint64_t done_bytes, total_bytes;
	struct page_final final;
	bool final_known;
	struct page_failure failure;
};

static void put_double(struct control_message *message, const char *key, double value)
{
	msgpack_pack_double(control_put(message, key), value);
}

static void put_stats(struct control_message *message, const struct page_stats *stats)
{
	control_put_u64(message, "pass", stats->pass);
	control_put_u64(message, "ram_pages", stats->ram_pages);
	control_put_u64(message, "ram_bytes", stats->ram_pages * PAGE_BYTES);
	control_put_u64(message, "disk_blocks", stats->disk_blocks);
	control_put_u64(message, "disk_bytes", stats->disk_blocks * PAGE_BYTES);
	control_put_u64(message, "zero_pages", stats->zero_pages);
	control_put_u64(message, "sent_bytes", stats->sent_bytes);
	put_double(message, "duration", (double)stats->duration_ns / 1e9);
}

static void put_match(struct control_message *message, const struct page_final *final)
{
	control_put_bytes(message, "root", final->root, PAGE_ROOT_BYTES);
	control_put_bool(message, "match", final->match);
}

/* The answer that was put off, or NULL when nobody waits for one. */
static struct control_message *take_reply(struct pages *pages, struct control_ticket *ticket)
{
	struct control_ticket due = *ticket;
	*ticket = (struct control_ticket){0};
	return due.id ? control_reply_to(pages->control, due) : NULL;
}

static void leave(struct pages *pages)
{
	bool under_way = pages->state == FINAL && pages->releasing && !page_worker_cancel(&pages->worker);
	if (under_way)
		pages->leaving = true;
	else
		loop_stop(pages->loop, 0);
}

static void on_final(struct pages *pages, const struct page_notice *notice)
{
	pages->final = notice->final;
	pages->final_known = true;
	pages->pass = notice->stats.pass ? notice->stats.pass : pages->pass;
	if (!pages->worker.sender) {
		struct control_message *event = control_event(pages->control, "complete");
		pages->state = FINAL;
		put_match(event, &notice->final);
		control_send(event);
		return;
	}
	struct control_message *reply = take_reply(pages, &pages->ticket);
	if (!pages->releasing)
		pages->state = READY;
	else
		pages->state = notice->failure.code ? BROKEN : RELEASED;
	if (!reply)
		return;
	put_stats(reply, &notice->stats);
	control_put_bytes(reply, "root", notice->final.root, PAGE_ROOT_BYTES);
	if (notice->final.answered)
		control_put_bool(reply, "match", notice->final.match);
	else
		control_put_nil(reply, "match");
	control_put_u64(reply, "began_ns", notice->final.began_ns);
	control_put_u64(reply, "compared_ns", notice->final.compared_ns);
	control_put_str(reply, "released", released_names[notice->final.released]);
	control_put_str(reply, "message", notice->failure.code ? notice->failure.message : NULL);
	control_send(reply);
}

static void on_pass(struct pages *pages, const struct page_notice *notice)
{
	struct control_message *message;
	pages->pass = notice->stats.pass;
	pages->state = READY;
	if (pages->worker.sender)
		message = take_reply(pages, &pages->ticket);
	else
		message = control_event(pages->control, "pass");
	if (!message)
		return;
	put_stats(message, &notice->stats);
	control_send(message);
}

static void on_failed(struct pages *pages, const struct page_notice *notice)
{
	struct control_ticket due = pages->ticket;
	pages->ticket = (struct control_ticket){0};
	if (due.id)
		control_error_to(pages->control, due, notice->failure.code, "%s", notice->failure.message);
	if (pages->state == RELEASED)
		return;
	pages->state = BROKEN;
	pages->failure = notice->failure;
	struct control_message *event = control_event(pages->control, "broken");
	control_put_str(event, "message", notice->failure.message);
	control_send(event);
}

static void on_verified(struct pages *pages, const struct page_notice *notice)
{
	struct control_ticket due = pages->verify_ticket;
	pages->verify_ticket = (struct control_ticket){0};
	if (notice->kind == NOTICE_NOT_VERIFIED) {
		control_error_to(pages->control, due, notice->failure.code, "%s", notice->failure.message);
		return;
	}
	struct control_message *reply = control_reply_to(pages->control, due);
	put_match(reply, &notice->final);
	control_send(reply);
}

static void on_progress(struct pages *pages, const struct page_notice *notice)
{
	struct control_message *event = control_event(pages->control, "progress");
	pages->done_bytes = notice->done_bytes;
	pages->total_bytes = notice->total_bytes;
	control_put_u64(event, "pass", notice->stats.pass);
	control_put_u64(event, "done_bytes", notice->done_bytes);
	control_put_u64(event, "total_bytes", notice->total_bytes);
	control_send(event);
}

static void on_ready(struct pages *pages)
{
	struct control_message *reply = take_reply(pages, &pages->ticket);
	pages->state = READY;
	if (reply)
		control_send(reply);
}

static void on_released(struct pages *pages, const struct page_notice *notice)
{
	struct control_message *event = control_event(pages->control, "released");
	pages->state = RELEASED;
	put_match(event, &pages->final);
	control_put_u64(event, "released_ns", notice->final.released_ns);
	control_send(event);
}

static void on_notice(void *context, int fd, uint32_t events)
{
	struct pages *pages = context;
	struct page_notice notice;
	(void)events;
	if (read(fd, &notice, sizeof(notice)) != (ssize_t)sizeof(notice))
		return;
	if (notice.kind == NOTICE_VERIFIED || notice.kind == NOTICE_NOT_VERIFIED)
		on_verified(pages, &notice);
	else if (pages->state == CLOSED)
		return; /* the cancel was first: whatever the worker still had to say about the stream is void */
	else if (notice.kind == NOTICE_FAILED)
		on_failed(pages, &notice);
	else if (notice.kind == NOTICE_READY)
		on_ready(pages);
	else if (notice.kind == NOTICE_PASS)
		on_pass(pages, &notice);
	else if (notice.kind == NOTICE_FINAL)
		on_final(pages, &notice);
	else if (notice.kind == NOTICE_RELEASED)
		on_released(pages, &notice);
	else
		on_progress(pages, &notice);
	if (pages->leaving && (notice.kind == NOTICE_FINAL || notice.kind == NOTICE_FAILED))
		loop_stop(pages->loop, 0);
}

/* One element of `regions`, with its descriptors from number *fd on. */
static bool open_region(struct pages *pages, struct control_request *request, const struct control_args *args,
	const msgpack_object_array *list, size_t index, size_t *fd)
{
	static const char *const kinds[] = {"ram", "disk", NULL};
	struct control_args element;
	struct page_region_layout layout = {0};
	struct page_failure failure = {0};
	uint64_t id, block_size;
	size_t kind;
	if (!control_list_map(args, "regions", list, index,
		    "region kind size block_size data_offset allocated_offset dirty_offset", &element) ||
		!control_u64(&element, "region", 0, UINT32_MAX, &id) ||
		!control_choice(&element, "kind", kinds, &kind) ||
		!control_u64(&element, "size", 1, INT64_MAX, &layout.size) ||
		!control_u64(&element, "block_size", PAGE_BYTES, PAGE_BYTES, &block_size))
		return false;
	layout.id = (uint32_t)id;
	layout.disk = kind == 1;
	if (layout.disk && (!control_u64(&element, "data_offset", 0, INT64_MAX, &layout.data_offset) ||
				   !control_u64(&element, "allocated_offset", 0, INT64_MAX, &layout.allocated_offset) ||
				   !control_u64(&element, "dirty_offset", 0, INT64_MAX, &layout.dirty_offset)))
		return false;
	struct page_regions *regions = &pages->worker.regions;
	if (page_regions_find(regions, layout.id)) {
		control_error(
			request, CONTROL_BAD_ARGUMENT, "regions[%zu].region: %u is there twice", index, layout.id);
		return false;
	}
	int data = control_take_fd(request, (*fd)++);
	int maps = layout.disk ? control_take_fd(request, (*fd)++) : -1;
	if (!page_region_open(&regions->region[regions->count++], &layout, data, maps, &failure)) {
		control_error(request, failure.code, "%s", failure.message);
		return false;
	}
	return true;
}

static bool open_regions(struct pages *pages, struct control_request *request, const struct control_args *args)
{
	const msgpack_object_array *list;
	size_t fd = 1;
	if (!control_list(args, "regions", PAGE_REGIONS_MAX, &list))
		return false;
	if (list->size == 0) {
		control_error(request, CONTROL_BAD_ARGUMENT, "regions: at least one is needed");
		return false;
	}
	for (size_t i = 0; i < list->size; i++)
		if (!open_region(pages, request, args, list, i, &fd))
			return false;
	if (control_fd_count(request) != fd) {
		control_error(request, CONTROL_BAD_ARGUMENT,
			"%zu descriptors came, but the socket and these regions are %zu", control_fd_count(request),
			fd);
		return false;
	}
	return true;
}

static bool begin(struct pages *pages, struct control_request *request, const struct control_args *args)
{
	struct page_worker *worker = &pages->worker;
	struct page_failure failure = {0};
	uint8_t key[STREAM_KEY_BYTES];
	uint64_t bandwidth = 0;
	if (!control_bytes(args, "migration", worker->migration, MIGRATION_ID_BYTES) ||
		!control_bytes(args, "key", key, sizeof(key)) ||
		(worker->sender && !control_u64_optional(args, "bandwidth", 0, INT64_MAX, &bandwidth)) ||
		!open_regions(pages, request, args))
		return false;
	bool started = page_worker_start(worker, control_take_fd(request, 0), key, bandwidth, &failure);
	aead_wipe(key, sizeof(key));
	if (started && loop_add(pages->loop, worker->notices, EPOLLIN, on_notice, pages) < 0)
		started = page_fail(&failure, CONTROL_LIMIT, "cannot watch the worker");
	if (!started)
		control_error(request, failure.code, "%s", failure.message);
	return started;
}

static void connect_stream(
	struct pages *pages, struct control_request *request, const struct control_args *args, bool sender)
{
	if (pages->state != IDLE) {
		control_error(request, CONTROL_BAD_STATE, "this process has its stream already (%s)",
			state_names[pages->state]);
		return;
	}
	pages->worker.sender = sender;
	if (!begin(pages, request, args)) {
		page_worker_stop(&pages->worker);
		page_worker_init(&pages->worker);
		return;
	}
	pages->state = CONNECTING;
	pages->ticket = control_defer(request);
}

static void op_send(void *context, struct control_request *request, const struct control_args *args)
{
	connect_stream(context, request, args, true);
}

static void op_receive(void *context, struct control_request *request, const struct control_args *args)
{
	connect_stream(context, request, args, false);
}

static bool refuse_unless_ready(const struct pages *pages, struct control_request *request)
{
	if (pages->worker.sender && pages->state == READY)
		return false;
	control_error(request, CONTROL_BAD_STATE, "only a sender that is ready can do this, and this is %s%s%s",
		pages->worker.sender ? "" : "no sender, ", state_names[pages->state],
		pages->failure.code ? ": the stream broke" : "");
	return true;
}

static void op_pass(void *context, struct control_request *request, const struct control_args *args)
{
	struct pages *pages = context;
	(void)args;
	if (refuse_unless_ready(pages, request))
		return;
	pages->state = PASSING;
	pages->ticket = control_defer(request);
	page_worker_do(&pages->worker, JOB_PASS);
}

static void op_final(void *context, struct control_request *request, const struct control_args *args)
{
	struct pages *pages = context;
	bool release;
	if (!control_bool(args, "release", &release) || refuse_unless_ready(pages, request))
		return;
	pages->state = FINAL;
	pages->releasing = release;
	pages->ticket = control_defer(request);
	page_worker_do(&pages->worker, release ? JOB_RELEASE : JOB_FINAL);
}

static void op_bandwidth(void *context, struct control_request *request, const struct control_args *args)
{
	struct pages *pages = context;
	uint64_t bandwidth;
	if (!control_u64(args, "bandwidth", 0, INT64_MAX, &bandwidth))
		return;
	atomic_store(&pages->worker.stream.bandwidth, bandwidth);
	control_ok(request);
}

static void op_verify(void *context, struct control_request *request, const struct control_args *args)
{
	struct pages *pages = context;
	(void)args;
	bool busy = pages->state == PASSING || (pages->state == FINAL && pages->ticket.id);
	if (!pages->final_known || busy || pages->verify_ticket.id || pages->state == CLOSED) {
		control_error(
			request, CONTROL_BAD_STATE, "there is no root to verify against, or something is under way");
		return;
	}
	/* A receiver's thread is with the stream until it ends. */
	if (!pages->worker.sender && pages->state != RELEASED && pages->state != BROKEN) {
		control_error(request, CONTROL_BAD_STATE, "a receiver can verify once the stream is over");
		return;
	}
	pages->verify_ticket = control_defer(request);
	page_worker_do(&pages->worker, JOB_VERIFY);
}

static void op_cancel(void *context, struct control_request *request, const struct control_args *args)
{
	struct pages *pages = context;
	(void)args;
	bool over = pages->state == CLOSED || pages->state == BROKEN || pages->state == IDLE;
	if (pages->state == RELEASED || (!over && !page_worker_cancel(&pages->worker))) {
		control_error(request, CONTROL_BAD_STATE, "the right to run was released already");
		return;
	}
	if (pages->state != BROKEN)
		pages->state = CLOSED;
	if (pages->ticket.id)
		control_error_to(pages->control, pages->ticket, CONTROL_BAD_STATE, "the migration was cancelled");
	pages->ticket = (struct control_ticket){0};
	if (pages->worker.running)
		page_worker_do(&pages->worker, JOB_CLOSE);
	control_ok(request);
}

static void op_status(void *context, struct control_request *request, const struct control_args *args)
{
	struct pages *pages = context;
	struct page_stream *stream = &pages->worker.stream;
	struct control_message *reply = control_reply(request);
	(void)args;
	control_put_str(reply, "state", state_names[pages->state]);
	control_put_u64(reply, "pass", pages->pass);
	control_put_u64(reply, "sent_bytes", atomic_load(&stream->sent_bytes));
	control_put_u64(reply, "received_bytes", atomic_load(&stream->received_bytes));
	control_put_u64(reply, "bandwidth", atomic_load(&stream->bandwidth));
	control_put_u64(reply, "done_bytes", pages->done_bytes);
	control_put_u64(reply, "total_bytes", pages->total_bytes);
	if (pages->final_known) {
		put_match(reply, &pages->final);
	} else {
		control_put_nil(reply, "root");
		control_put_nil(reply, "match");
	}
	control_put_str(reply, "message", pages->failure.code ? pages->failure.message : NULL);
	control_send(reply);
}

static void on_orphan(void *context)
{
	struct pages *pages = context;
	if (!control_connected(pages->control))
		leave(pages);
}

/* A controller that is replaced is gone for a moment only, so the question is asked after this event. */
static void on_connection(void *context, bool connected)
{
	struct pages *pages = context;
	if (connected)
		loop_timer_cancel(pages->loop, &pages->orphan);
	else
		loop_timer_set(pages->loop, &pages->orphan, loop_now());
}

static void on_quit(void *context)
{
	leave(context);
}

static void on_signal(void *context, const struct signalfd_siginfo *info)
{
	(void)info;
	leave(context);
}

static const struct control_op ops[] = {
	{"send", op_send, "migration key regions bandwidth"},
	{"receive", op_receive, "migration key regions"},
	{"pass", op_pass, ""},
	{"bandwidth", op_bandwidth, "bandwidth"},
	{"final", op_final, "release"},
	{"verify", op_verify, ""},
	{"cancel", op_cancel, ""},
	{"status", op_status, ""},
	{0},
};

static int run_pages(int argc, char **argv)
{
	const char *path = NULL;
	const struct option_spec specs[] = {
		{"control", OPTION_STRING, &path, "SOCKET", "where to serve the control socket", .required = true},
		{0},
	};
	int status = options_parse("pages", "one end of a migration stream", argc, argv, specs);
	if (status >= 0)
		return status;
	log_open("pages");
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN); /* a file size limit is an error of the write, not the end of the process */
	struct pages pages = {.loop = loop_new(), .orphan = {.run = on_orphan}};
	pages.orphan.context = &pages;
	page_worker_init(&pages.worker);
	if (pages.loop)
		pages.control = control_new(&(struct control_config){.loop = pages.loop,
			.path = path,
			.role = "pages",
			.ops = ops,
			.context = &pages,
			.connection = on_connection,
			.quit = on_quit});
	status = 1;
	if (pages.control) {
		loop_signal(pages.loop, SIGTERM, on_signal, &pages);
		loop_signal(pages.loop, SIGINT, on_signal, &pages);
		loop_timer_set(pages.loop, &pages.orphan, loop_now() + CONTROLLER_SECONDS * LOOP_SECOND);
		status = loop_run(pages.loop);
	}
	if (pages.worker.notices >= 0)
		loop_remove(pages.loop, pages.worker.notices);
	page_worker_stop(&pages.worker);
	control_free(pages.control);
	loop_free(pages.loop);
	return status;
}

const struct role role_pages = {
	"pages", "one end of a migration stream: changed pages, sealed and compressed", run_pages};
