// SPDX-License-Identifier: Apache-2.0
/*
 * A session is one request of the host that lasts: a program with its three streams, or a file being read or written.
 * Data flows under credit: each side may have 64 KiB unacknowledged per channel, so one talkative program cannot fill
 * the line's queue, and a program whose output nobody takes simply blocks, as on a pipe.
 */
#ifndef MOBI_SESSION_H
#define MOBI_SESSION_H

#include "channel.h"
#include "message.h"

#include <poll.h>
#include <sys/types.h>

#define SESSIONS_MAX 32
#define SESSIONS_WATCH_MAX (3 * SESSIONS_MAX)
#define CREDIT_WINDOW 65536

void session_exec(struct request *request, char **base_environment);
void session_get(struct request *request);
void session_put(struct request *request);
void session_signal(const struct frame *frame);
/* A frame of type stream or credit. */
void session_stream(const struct frame *frame);
void session_credit(const struct frame *frame);

/* A program of a session ended (from the SIGCHLD handler's loop). */
void session_reaped(pid_t pid, int status);
/* Adds the descriptors that sessions wait for; at most SESSIONS_WATCH_MAX of them. */
size_t sessions_watch(struct pollfd *watch);
/* Moves data for which there is credit and room; called once per turn of the loop. Returns ms until the next, or -1. */
int sessions_turn(void);
/* The host attached anew: programs go on, their output is thrown away. */
void sessions_forget(void);
/* A frame may have been lost, and nobody knows whose: all sessions end with an error rather than with a hole. */
void sessions_garbled(void);

#endif
