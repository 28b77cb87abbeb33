/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_GUEST_STREAM_H
#define MOBI_GUEST_STREAM_H

#include "loop.h"

#include <stddef.h>

/*
 * A byte stream between the guest (a serial line of it) and whoever is attached at the moment. The guest's end is kept
 * open here, so that it outlives a run of the kernel: a fresh process of the same guest goes on with it. What the guest
 * says while nobody is attached is thrown away, after the tap has seen it.
 *
 * Two ways with a reader that is too slow: a *lossless* stream makes the guest wait, any other one drops.
 */
#define STREAM_BUFFER 65536

struct guest_stream {
	struct loop *loop;
	int guest_fd;  /* our end */
	int inner_fd;  /* the guest's end */
	int client_fd; /* our end of the attached one's socket; -1: nobody */
	bool lossless;
	void (*tap)(void *context, const char *data, size_t size); /* may be NULL */
	void *context;
	size_t to_client_size, to_guest_size;
	char to_client[STREAM_BUFFER];
	char to_guest[4096];
};

/* `stream` has lossless, tap and context set. False and errno. */
bool stream_open(struct guest_stream *stream, struct loop *loop);

/* A new socket for the other side (the caller closes it once it is sent), or -1 and errno. Replaces the older one. */
int stream_attach(struct guest_stream *stream);

/* What the guest said last is still in the socket when it has ended. */
void stream_drain(struct guest_stream *stream);

#endif
