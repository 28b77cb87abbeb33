/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The life of a guest. The kernel is asked one thing at a time (`pending`) and everything follows from its reports and
 * its end. What it says is believed only as far as it concerns itself: a guest that lies about being frozen hurts its
 * own copy, not anybody else.
 */
#include "guest.h"

#include "log.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define GO_TIMEOUT (10 * LOOP_SECOND)
#define END_TIMEOUT (5 * LOOP_SECOND)
#define ERROR_MAX 4095

static const struct control_ticket nobody;

const char *guest_state_name(enum guest_state state)
{
	static const char *const names[] = {"starting", "running", "waiting", "frozen", "exited"};

	return names[state];
}

const char *guest_reason_name(enum guest_reason reason)
{
	static const char *const names[] = {NULL, "poweroff", "reboot", "panic", "killed", "crashed"};

	return names[reason];
}

static void tell_state(struct guest *guest)
{
	struct control_message *event = control_event(guest->control, "state");

	control_put_str(event, "state", guest_state_name(guest->state));
	guest_put_exit(guest, event);
	control_send(event);
}

void guest_set_state(struct guest *guest, enum guest_state state)
{
	if (guest->state == state)
		return;
	guest->state = state;
	guest->since_ns = loop_now();
	log_info("the guest is %s", guest_state_name(state));
	tell_state(guest);
	lease_enforce(guest);
}

/* Takes the ticket of what was pending; answered by the caller. */
static struct control_ticket settle(struct guest *guest)
{
	struct control_ticket ticket = guest->ticket;

	guest->pending = PENDING_NONE;
	guest->ticket = nobody;
	loop_timer_cancel(guest->loop, &guest->pending_timer);
	return ticket;
}

static void refuse(struct guest *guest, struct control_ticket ticket, const char *code, const char *message)
{
	if (ticket.id)
		control_error_to(guest->control, ticket, code, "%s", message);
}

static void finish_reconnect(struct guest *guest, const struct freeze_report *report, const char *error);

/* The answer may still come and is then acted upon, only nobody waits for it any more. */
static void pending_timeout(void *context)
{
	struct guest *guest = context;
	struct control_ticket ticket = guest->ticket;
	const char *message = "the guest's kernel does not answer";

	guest->ticket = nobody;
	if (guest->pending == PENDING_FREEZE) {
		guest->pending = PENDING_CANCEL;
		message = "the guest did not freeze in time; it goes on";
	}
	refuse(guest, ticket, CONTROL_TIMEOUT, message);
	finish_reconnect(guest, NULL, message);
}

static void ask(
	struct guest *guest, uint32_t op, enum guest_pending pending, struct control_ticket ticket, uint64_t timeout_ns)
{
	struct freeze_request request = {.op = op, .sequence = ++guest->sequence};

	if (request.sequence == 0)
		request.sequence = guest->sequence = 1;
	guest->pending = pending;
	guest->ticket = ticket;
	guest->requested_ns = loop_now();
	guest->pending_timer.run = pending_timeout;
	guest->pending_timer.context = guest;
	loop_timer_set(guest->loop, &guest->pending_timer, guest->requested_ns + timeout_ns);
	/* A kernel that does not read is noticed by the time-out, one that is gone by its end. */
	if (send(guest->report_fd, &request, sizeof(request), MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		log_warning("the guest's kernel cannot be asked: %s", strerror(errno));
}

void guest_freeze(struct guest *guest, struct control_ticket ticket, uint64_t timeout_ns)
{
	if (guest->pending == PENDING_NONE) {
		ask(guest, FREEZE_OP_FREEZE, PENDING_FREEZE, ticket, timeout_ns);
		return;
	}
	/* A freeze that was given up, or that the lease asked for, is still under way: this is its answer. */
	guest->pending = PENDING_FREEZE;
	if (ticket.id)
		guest->ticket = ticket;
	loop_timer_set(guest->loop, &guest->pending_timer, loop_now() + timeout_ns);
}

void guest_cancel_freeze(struct guest *guest)
{
	if (guest->pending == PENDING_FREEZE && !guest->ticket.id && !guest->reconnecting)
		guest->pending = PENDING_CANCEL;
}

void guest_thaw(struct guest *guest, struct control_ticket ticket)
{
	ask(guest, FREEZE_OP_THAW, PENDING_THAW, ticket, GO_TIMEOUT);
}

void guest_go(struct guest *guest, struct control_ticket ticket)
{
	ask(guest, FREEZE_OP_GO, PENDING_GO, ticket, GO_TIMEOUT);
}

static void answer_frozen(struct guest *guest, struct control_ticket ticket, const struct freeze_report *report)
{
	struct control_message *reply;

	if (!ticket.id)
		return;
	reply = control_reply_to(guest->control, ticket);
	control_put_u64(reply, "requested_ns", guest->requested_ns);
	control_put_u64(reply, "begun_ns", report->t_begin);
	control_put_u64(reply, "devices_ns", report->t_devices);
	control_put_u64(reply, "frozen_ns", report->t_done);
	control_put_bool(reply, "backend_lost", report->flags & FREEZE_FLAG_BACKEND_LOST);
	control_send(reply);
}

static void answer_running(struct guest *guest, struct control_ticket ticket, const struct freeze_report *report)
{
	struct control_message *reply;

	if (!ticket.id)
		return;
	reply = control_reply_to(guest->control, ticket);
	control_put_u64(reply, "requested_ns", guest->requested_ns);
	control_put_u64(reply, "devices_ns", report->t_devices);
	control_put_u64(reply, "running_ns", report->t_done);
	control_send(reply);
}

static void on_frozen(struct guest *guest, const struct freeze_report *report)
{
	bool given_up = guest->pending == PENDING_CANCEL && !guest->lease.expired && !guest->reconnecting;
	struct control_ticket ticket;

	if (guest->pending != PENDING_FREEZE && guest->pending != PENDING_CANCEL)
		return;
	ticket = settle(guest);
	if (given_up) {
		guest_thaw(guest, nobody);
		return;
	}
	guest_set_state(guest, GUEST_FROZEN);
	answer_frozen(guest, ticket, report);
	if (guest->reconnecting)
		guest_reconnect_step(guest);
}

static void finish_reconnect(struct guest *guest, const struct freeze_report *report, const char *error)
{
	struct control_ticket ticket = guest->reconnect_ticket;

	if (!guest->reconnecting)
		return;
	guest->reconnecting = false;
	guest->reconnect_ticket = nobody;
	for (size_t i = 0; i < guest->device_count; i++)
		close(guest->device_fds[i]);
	guest->device_count = 0;
	if (error)
		refuse(guest, ticket, CONTROL_IO, error);
	else
		answer_running(guest, ticket, report);
}

static void on_running(struct guest *guest, const struct freeze_report *report)
{
	struct control_ticket ticket;

	if (guest->pending != PENDING_THAW && guest->pending != PENDING_GO)
		return;
	ticket = settle(guest);
	guest_set_state(guest, GUEST_RUNNING);
	answer_running(guest, ticket, report);
	finish_reconnect(guest, report, NULL);
}

static void on_failed(struct guest *guest, const struct freeze_report *report)
{
	/* Any number may stand there, and the smallest one has no opposite. */
	int error = report->error < 0 && report->error >= -ERROR_MAX ? -report->error : EPROTO;
	char message[GUEST_MESSAGE_MAX];

	snprintf(message, sizeof(message), "%s: %s", report->text, strerror(error));
	log_warning("the guest's kernel refused: %s", message);
	if (guest->pending == PENDING_GO)
		tell_state(guest); /* not what `status` has said */
	refuse(guest, settle(guest), CONTROL_IO, message);
	finish_reconnect(guest, report, message);
	lease_enforce(guest);
}

static void on_waiting(struct guest *guest, const struct freeze_report *report)
{
	if (guest->state != GUEST_STARTING)
		return;
	loop_timer_cancel(guest->loop, &guest->end_timer);
	guest_set_state(guest, GUEST_WAITING);
	if (!guest->reconnecting)
		return;
	if (guest->reconnect_running && lease_valid(guest))
		guest_go(guest, nobody);
	else
		finish_reconnect(guest, report, NULL);
}

static void end_timeout(void *context)
{
	struct guest *guest = context;

	log_warning("the guest's kernel neither goes on nor ends, killed");
	process_kill(&guest->process);
}

static void limit_end(struct guest *guest)
{
	guest->end_timer.run = end_timeout;
	guest->end_timer.context = guest;
	loop_timer_set(guest->loop, &guest->end_timer, loop_now() + END_TIMEOUT);
}

static void on_last_words(struct guest *guest, enum guest_reason reason, const struct freeze_report *report)
{
	if (guest->reason != EXIT_NONE)
		return;
	guest->reason = reason;
	snprintf(guest->exit_message, sizeof(guest->exit_message), "%s", report->text);
	limit_end(guest);
}

static void on_report(struct guest *guest, const struct freeze_report *report)
{
	bool answers = report->sequence != 0 && report->sequence == guest->sequence;

	switch (report->kind) {
	case FREEZE_KIND_BOOTED:
		if (guest->state == GUEST_STARTING && !guest->options.resume)
			guest_set_state(guest, GUEST_RUNNING);
		return;
	case FREEZE_KIND_WAITING:
		on_waiting(guest, report);
		return;
	case FREEZE_KIND_POWEROFF:
		on_last_words(guest, EXIT_POWEROFF, report);
		return;
	case FREEZE_KIND_REBOOT:
		on_last_words(guest, EXIT_REBOOT, report);
		return;
	case FREEZE_KIND_PANIC:
		on_last_words(guest, EXIT_PANIC, report);
		return;
	case FREEZE_KIND_FROZEN:
		if (answers)
			on_frozen(guest, report);
		return;
	case FREEZE_KIND_RUNNING:
		if (answers)
			on_running(guest, report);
		return;
	case FREEZE_KIND_FAILED:
		if (answers && guest->pending != PENDING_NONE)
			on_failed(guest, report);
		return;
	default:
		log_warning("the guest's kernel sent a report of unknown kind %u", report->kind);
	}
}

/* A report's text is of the guest's making. */
static void clean_text(char *text)
{
	text[FREEZE_TEXT_SIZE - 1] = 0;
	for (; *text; text++)
		if (*text < ' ' || *text > '~')
			*text = '?';
}

static bool receive_report(struct guest *guest)
{
	struct freeze_report report;
	ssize_t size = recv(guest->report_fd, &report, sizeof(report), MSG_DONTWAIT | MSG_TRUNC);

	if (size == 0 || (size < 0 && errno != EINTR))
		return false;
	if (size != (ssize_t)sizeof(report))
		return true;
	clean_text(report.text);
	on_report(guest, &report);
	return true;
}

static void close_reports(struct guest *guest)
{
	if (guest->report_fd < 0)
		return;
	loop_remove(guest->loop, guest->report_fd);
	close(guest->report_fd);
	guest->report_fd = -1;
}

void guest_report_ready(void *context, int fd, uint32_t events)
{
	struct guest *guest = context;

	(void)fd;
	if (!receive_report(guest) && events & (EPOLLHUP | EPOLLERR))
		close_reports(guest);
}

void guest_reconnect_step(struct guest *guest)
{
	struct freeze_request request = {.op = FREEZE_OP_EXIT, .sequence = ++guest->sequence};

	if (send(guest->report_fd, &request, sizeof(request), MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		process_kill(&guest->process);
	limit_end(guest);
}

static void explain_exit(struct guest *guest, int status)
{
	guest->exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
	if (guest->reason != EXIT_NONE)
		return;
	guest->reason = EXIT_CRASHED;
	if (guest->console.last[0])
		snprintf(guest->exit_message, sizeof(guest->exit_message), "last line of the console: %s",
			guest->console.last);
	else if (WIFSIGNALED(status))
		snprintf(guest->exit_message, sizeof(guest->exit_message), "ended by signal %d (%s)", WTERMSIG(status),
			strsignal(WTERMSIG(status)));
	else
		snprintf(guest->exit_message, sizeof(guest->exit_message), "ended with status %d", guest->exit_code);
}

static void process_ended(struct guest *guest, int status)
{
	char message[GUEST_MESSAGE_MAX];

	while (guest->report_fd >= 0 && receive_report(guest))
		continue;
	close_reports(guest);
	loop_timer_cancel(guest->loop, &guest->end_timer);
	stream_drain(&guest->console.stream);
	if (guest->reconnecting && guest->state == GUEST_FROZEN && guest->reason == EXIT_NONE) {
		guest->state = GUEST_STARTING;
		if (guest_launch(guest, true, message)) {
			limit_end(guest);
			return;
		}
		snprintf(guest->exit_message, sizeof(guest->exit_message), "%s", message);
		guest->reason = EXIT_CRASHED;
	}
	explain_exit(guest, status);
	refuse(guest, settle(guest), CONTROL_BAD_STATE, "the guest has ended");
	finish_reconnect(guest, NULL, "the guest ended while it was reconnected");
	guest_set_state(guest, GUEST_EXITED);
	if (guest->kill_ticket.id)
		control_send(control_reply_to(guest->control, guest->kill_ticket));
	guest->kill_ticket = nobody;
	if (guest->quitting)
		loop_stop(guest->loop, 0);
}

void guest_child_ended(void *context, const struct signalfd_siginfo *info)
{
	struct guest *guest = context;
	int status;
	pid_t pid;

	(void)info;
	while ((pid = waitpid(-1, &status, WNOHANG | __WALL)) > 0)
		if (process_reaped(&guest->process, pid, &status))
			process_ended(guest, status);
}

void guest_kill(struct guest *guest)
{
	if (guest->state == GUEST_EXITED)
		return;
	if (guest->reason == EXIT_NONE)
		guest->reason = EXIT_KILLED;
	process_kill(&guest->process);
}
