/* SPDX-License-Identifier: Apache-2.0 */
#include "loop.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64

/* One per descriptor number. The generation tells a removed descriptor's events from those of its successor. */
struct entry {
	loop_fd_callback run;
	void *context;
	uint32_t generation;
	bool active;
};

struct signal_entry {
	loop_signal_callback run;
	void *context;
};

struct loop {
	int epoll_fd;
	int signal_fd;
	sigset_t signals;
	struct signal_entry signal_entries[NSIG];
	struct entry *entries;
	int entry_count;
	struct loop_timer *timers; /* by deadline */
	bool stopped;
	int status;
};

uint64_t loop_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * LOOP_SECOND + (uint64_t)now.tv_nsec;
}

struct loop *loop_new(void)
{
	struct loop *loop = calloc(1, sizeof(*loop));

	if (!loop)
		return NULL;
	loop->signal_fd = -1;
	sigemptyset(&loop->signals);
	loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (loop->epoll_fd < 0) {
		free(loop);
		return NULL;
	}
	return loop;
}

void loop_free(struct loop *loop)
{
	if (!loop)
		return;
	if (loop->signal_fd >= 0)
		close(loop->signal_fd);
	close(loop->epoll_fd);
	free(loop->entries);
	free(loop);
}

static struct entry *entry_of(struct loop *loop, int fd)
{
	if (fd < 0 || fd >= loop->entry_count || !loop->entries[fd].active)
		return NULL;
	return &loop->entries[fd];
}

static int control_epoll(struct loop *loop, int operation, int fd, uint32_t events)
{
	struct epoll_event event = {
		.events = events, .data.u64 = (uint64_t)loop->entries[fd].generation << 32 | (uint32_t)fd};

	return epoll_ctl(loop->epoll_fd, operation, fd, &event);
}

int loop_add(struct loop *loop, int fd, uint32_t events, loop_fd_callback run, void *context)
{
	struct entry *entry;

	if (fd < 0) {
		errno = EBADF;
		return -1;
	}
	if (fd >= loop->entry_count) {
		int count = fd < 32 ? 64 : 2 * fd;
		struct entry *entries = realloc(loop->entries, (size_t)count * sizeof(*entries));

		if (!entries)
			return -1;
		memset(entries + loop->entry_count, 0, (size_t)(count - loop->entry_count) * sizeof(*entries));
		loop->entries = entries;
		loop->entry_count = count;
	}
	entry = &loop->entries[fd];
	if (entry->active) {
		errno = EEXIST;
		return -1;
	}
	entry->generation++;
	if (control_epoll(loop, EPOLL_CTL_ADD, fd, events) < 0)
		return -1;
	entry->run = run;
	entry->context = context;
	entry->active = true;
	return 0;
}

int loop_modify(struct loop *loop, int fd, uint32_t events)
{
	if (!entry_of(loop, fd)) {
		errno = ENOENT;
		return -1;
	}
	return control_epoll(loop, EPOLL_CTL_MOD, fd, events);
}

void loop_remove(struct loop *loop, int fd)
{
	struct entry *entry = entry_of(loop, fd);

	if (!entry)
		return;
	control_epoll(loop, EPOLL_CTL_DEL, fd, 0);
	entry->active = false;
}

void loop_timer_cancel(struct loop *loop, struct loop_timer *timer)
{
	if (!timer->armed)
		return;
	for (struct loop_timer **link = &loop->timers; *link; link = &(*link)->next)
		if (*link == timer) {
			*link = timer->next;
			break;
		}
	timer->armed = false;
}

void loop_timer_set(struct loop *loop, struct loop_timer *timer, uint64_t deadline_ns)
{
	struct loop_timer **link = &loop->timers;

	loop_timer_cancel(loop, timer);
	while (*link && (*link)->deadline_ns <= deadline_ns)
		link = &(*link)->next;
	timer->deadline_ns = deadline_ns;
	timer->next = *link;
	timer->armed = true;
	*link = timer;
}

static void run_timers(struct loop *loop)
{
	uint64_t now = loop_now();

	while (loop->timers && loop->timers->deadline_ns <= now && !loop->stopped) {
		struct loop_timer *timer = loop->timers;

		loop_timer_cancel(loop, timer);
		timer->run(timer->context);
	}
}

static void signals_readable(void *context, int fd, uint32_t events)
{
	struct loop *loop = context;
	struct signalfd_siginfo info;

	(void)events;
	while (read(fd, &info, sizeof(info)) == (ssize_t)sizeof(info))
		if (info.ssi_signo < NSIG && loop->signal_entries[info.ssi_signo].run)
			loop->signal_entries[info.ssi_signo].run(loop->signal_entries[info.ssi_signo].context, &info);
}

int loop_signal(struct loop *loop, int number, loop_signal_callback run, void *context)
{
	int fd;

	loop->signal_entries[number] = (struct signal_entry){run, context};
	sigaddset(&loop->signals, number);
	if (pthread_sigmask(SIG_BLOCK, &loop->signals, NULL) != 0)
		return -1;
	fd = signalfd(loop->signal_fd, &loop->signals, SFD_NONBLOCK | SFD_CLOEXEC);
	if (fd < 0)
		return -1;
	if (loop->signal_fd >= 0)
		return 0;
	loop->signal_fd = fd;
	return loop_add(loop, fd, EPOLLIN, signals_readable, loop);
}

void loop_signals_unblock(void)
{
	sigset_t none;

	sigemptyset(&none);
	pthread_sigmask(SIG_SETMASK, &none, NULL);
}

static void wait_and_dispatch(struct loop *loop)
{
	struct epoll_event batch[BATCH];
	struct timespec timeout, *wait = NULL;
	int count;

	if (loop->timers) {
		uint64_t now = loop_now();
		uint64_t left = loop->timers->deadline_ns > now ? loop->timers->deadline_ns - now : 0;

		timeout.tv_sec = (time_t)(left / LOOP_SECOND);
		timeout.tv_nsec = (long)(left % LOOP_SECOND);
		wait = &timeout;
	}
	count = epoll_pwait2(loop->epoll_fd, batch, BATCH, wait, NULL);
	if (count < 0 && errno == ENOSYS)
		count = epoll_wait(loop->epoll_fd, batch, BATCH,
			wait ? (int)(timeout.tv_sec * 1000 + (timeout.tv_nsec + 999999) / 1000000) : -1);
	for (int i = 0; i < count && !loop->stopped; i++) {
		struct entry *entry = entry_of(loop, (int)(uint32_t)batch[i].data.u64);

		if (entry && entry->generation == batch[i].data.u64 >> 32)
			entry->run(entry->context, (int)(uint32_t)batch[i].data.u64, batch[i].events);
	}
}

int loop_run(struct loop *loop)
{
	while (!loop->stopped) {
		wait_and_dispatch(loop);
		run_timers(loop);
	}
	return loop->status;
}

void loop_stop(struct loop *loop, int status)
{
	loop->stopped = true;
	loop->status = status;
}
