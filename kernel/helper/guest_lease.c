/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The lease: until when this guest may run. The clock is CLOCK_BOOTTIME, which goes on while the host is suspended.
 * When the deadline passes, the shim freezes the guest, whoever is or is not connected. A guest that does not freeze
 * within a second has its processes stopped: not a state one can copy, but it does not run either.
 */
#include "guest.h"

#include "log.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define FREEZE_TIMEOUT LOOP_SECOND

static uint64_t boottime(void)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return (uint64_t)now.tv_sec * LOOP_SECOND + (uint64_t)now.tv_nsec;
}

bool lease_valid(const struct guest *guest)
{
	return guest->lease.deadline_ns == 0 || boottime() < guest->lease.deadline_ns;
}

static void announce(struct guest *guest)
{
	struct control_message *event;

	if (guest->lease.announced)
		return;
	guest->lease.announced = true;
	event = control_event(guest->control, "expired");
	control_put_u64(event, "deadline_ns", guest->lease.deadline_ns);
	control_send(event);
}

/* A guest that boots cannot be frozen yet, but runs. */
static bool runs(const struct guest *guest)
{
	return guest->state == GUEST_RUNNING || (guest->state == GUEST_STARTING && !guest->options.resume);
}

static void stop_guest(void *context)
{
	struct guest *guest = context;

	if (!guest->lease.expired || !runs(guest))
		return;
	log_error("the lease has expired and the guest does not freeze: its processes are stopped");
	process_signal(&guest->process, SIGSTOP);
	guest->lease.stopped = true;
	announce(guest);
}

void lease_enforce(struct guest *guest)
{
	struct guest_lease *lease = &guest->lease;
	bool free = guest->pending == PENDING_NONE || guest->pending == PENDING_CANCEL;

	if (!lease->expired)
		return;
	if (!runs(guest)) {
		loop_timer_cancel(guest->loop, &lease->stop_timer);
		announce(guest);
		return;
	}
	if (guest->state == GUEST_RUNNING && free)
		guest_freeze(guest, (struct control_ticket){0}, FREEZE_TIMEOUT);
	if (!lease->stop_timer.armed && !lease->stopped)
		loop_timer_set(guest->loop, &lease->stop_timer, loop_now() + FREEZE_TIMEOUT);
}

static void timer_ready(void *context, int fd, uint32_t events)
{
	struct guest *guest = context;
	uint64_t count;

	(void)events;
	if (read(fd, &count, sizeof(count)) < 0 || lease_valid(guest))
		return;
	guest->lease.expired = true;
	log_warning("the lease has expired, the guest must not run any more");
	lease_enforce(guest);
}

void lease_set(struct guest *guest, uint64_t deadline_ns)
{
	struct guest_lease *lease = &guest->lease;
	struct itimerspec when = {.it_value = {(time_t)(deadline_ns / LOOP_SECOND), (long)(deadline_ns % LOOP_SECOND)}};

	lease->deadline_ns = deadline_ns;
	lease->announced = false;
	if (timerfd_settime(lease->timer_fd, TFD_TIMER_ABSTIME, &when, NULL) < 0)
		log_error("the lease's timer: %s", strerror(errno));
	if (!lease_valid(guest))
		return;
	lease->expired = false;
	loop_timer_cancel(guest->loop, &lease->stop_timer);
	if (lease->stopped)
		process_signal(&guest->process, SIGCONT);
	lease->stopped = false;
	guest_cancel_freeze(guest);
}

bool lease_open(struct guest *guest)
{
	struct guest_lease *lease = &guest->lease;

	lease->stop_timer.run = stop_guest;
	lease->stop_timer.context = guest;
	lease->timer_fd = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK | TFD_CLOEXEC);
	return lease->timer_fd >= 0 && loop_add(guest->loop, lease->timer_fd, EPOLLIN, timer_ready, guest) == 0;
}
