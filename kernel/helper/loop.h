/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_LOOP_H
#define MOBI_LOOP_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * An event loop: one thread, callbacks for file descriptors (epoll), timers (CLOCK_MONOTONIC, ns) and signals
 * (signalfd). Nothing runs at the same time as anything else in the same loop; a callback that blocks blocks all.
 * A role that wants more threads gives each a loop of its own (only one of them takes signals).
 *
 *	static void readable(void *context, int fd, uint32_t events) { … loop_remove(loop, fd); close(fd); … }
 *	static void tick(void *context) { … loop_timer_set(loop, &timer, loop_now() + 10 * LOOP_MS); }
 *	static void ended(void *context, const struct signalfd_siginfo *info) { loop_stop(loop, 0); }
 *
 *	struct loop *loop = loop_new();
 *	struct loop_timer timer = {.run = tick, .context = &state};
 *	loop_add(loop, fd, EPOLLIN, readable, &state);
 *	loop_timer_set(loop, &timer, loop_now() + LOOP_SECOND);
 *	loop_signal(loop, SIGTERM, ended, &state);
 *	int status = loop_run(loop);
 *	loop_free(loop);
 *
 * A callback may add, change and remove any descriptor or timer, its own too: no event of the same batch reaches a
 * removed one, nor a new descriptor that got the same number. Remove a descriptor before it is closed.
 */
#define LOOP_MS UINT64_C(1000000)
#define LOOP_SECOND UINT64_C(1000000000)

struct loop;
struct signalfd_siginfo;

typedef void (*loop_fd_callback)(void *context, int fd, uint32_t events);
typedef void (*loop_signal_callback)(void *context, const struct signalfd_siginfo *info);

/* Owned by the caller, zeroed before its first use, cancelled before it is freed. One shot. */
struct loop_timer {
	void (*run)(void *context);
	void *context;
	uint64_t deadline_ns; /* of the loop from here on */
	struct loop_timer *next;
	bool armed;
};

struct loop *loop_new(void); /* NULL and errno */
void loop_free(struct loop *loop);

uint64_t loop_now(void); /* CLOCK_MONOTONIC, ns */

/* events: EPOLLIN, EPOLLOUT, …; level-triggered unless EPOLLET. 0, or -1 and errno. */
int loop_add(struct loop *loop, int fd, uint32_t events, loop_fd_callback run, void *context);
int loop_modify(struct loop *loop, int fd, uint32_t events);
void loop_remove(struct loop *loop, int fd); /* of a descriptor that is not there: nothing */

/* At or soon after `deadline_ns` (absolute); again = moved. Timers are few: a list. */
void loop_timer_set(struct loop *loop, struct loop_timer *timer, uint64_t deadline_ns);
void loop_timer_cancel(struct loop *loop, struct loop_timer *timer);

/*
 * Blocks the signal in the calling thread and delivers it to the loop: call before other threads are started. SIGCHLD
 * may stand for several children: reap in a loop. A child process must unblock (loop_signals_unblock) before exec.
 */
int loop_signal(struct loop *loop, int number, loop_signal_callback run, void *context);
void loop_signals_unblock(void);

/* Until loop_stop(): returns the status given there. */
int loop_run(struct loop *loop);
void loop_stop(struct loop *loop, int status);

#endif
