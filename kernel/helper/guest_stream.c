/* SPDX-License-Identifier: Apache-2.0 */
#include "guest_stream.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static void client_ready(void *context, int fd, uint32_t events);

static void detach(struct guest_stream *stream)
{
	if (stream->client_fd < 0)
		return;
	loop_remove(stream->loop, stream->client_fd);
	close(stream->client_fd);
	stream->client_fd = -1;
	stream->to_client_size = 0;
}

/* Which side is listened to follows from what is buffered. */
static void update(struct guest_stream *stream)
{
	bool full = stream->lossless && stream->client_fd >= 0 && stream->to_client_size == STREAM_BUFFER;

	loop_modify(stream->loop, stream->guest_fd, (full ? 0 : EPOLLIN) | (stream->to_guest_size ? EPOLLOUT : 0));
	if (stream->client_fd >= 0)
		loop_modify(stream->loop, stream->client_fd,
			(stream->to_guest_size ? 0 : EPOLLIN) | (stream->to_client_size ? EPOLLOUT : 0));
}

/* Sends what it can and keeps the rest. False: the other side is gone. */
static bool flush(int fd, char *buffer, size_t *size)
{
	ssize_t sent = *size ? send(fd, buffer, *size, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;

	if (sent < 0)
		return errno == EAGAIN || errno == EINTR;
	*size -= (size_t)sent;
	memmove(buffer, buffer + sent, *size);
	return true;
}

/* False when there is nothing more to read now. */
static bool from_guest(struct guest_stream *stream)
{
	char data[16384];
	size_t room = STREAM_BUFFER - stream->to_client_size, wanted = sizeof(data);
	ssize_t size;

	if (stream->lossless && stream->client_fd >= 0 && wanted > room)
		wanted = room;
	size = recv(stream->guest_fd, data, wanted, MSG_DONTWAIT);
	if (size <= 0)
		return false;
	if (stream->tap)
		stream->tap(stream->context, data, (size_t)size);
	if (stream->client_fd >= 0) {
		if ((size_t)size > room)
			size = (ssize_t)room;
		memcpy(stream->to_client + stream->to_client_size, data, (size_t)size);
		stream->to_client_size += (size_t)size;
		if (!flush(stream->client_fd, stream->to_client, &stream->to_client_size))
			detach(stream);
	}
	return true;
}

static void guest_ready(void *context, int fd, uint32_t events)
{
	struct guest_stream *stream = context;

	if (events & EPOLLOUT)
		flush(fd, stream->to_guest, &stream->to_guest_size);
	if (events & EPOLLIN)
		from_guest(stream);
	update(stream);
}

static void client_ready(void *context, int fd, uint32_t events)
{
	struct guest_stream *stream = context;
	ssize_t size;

	if (events & EPOLLOUT && !flush(fd, stream->to_client, &stream->to_client_size)) {
		detach(stream);
	} else if (events & (EPOLLIN | EPOLLHUP | EPOLLERR) && !stream->to_guest_size) {
		size = recv(fd, stream->to_guest, sizeof(stream->to_guest), MSG_DONTWAIT);
		if (size > 0) {
			stream->to_guest_size = (size_t)size;
			flush(stream->guest_fd, stream->to_guest, &stream->to_guest_size);
		} else if (size == 0 || errno != EAGAIN) {
			detach(stream);
		}
	} else if (events & (EPOLLHUP | EPOLLERR)) {
		detach(stream);
	}
	update(stream);
}

bool stream_open(struct guest_stream *stream, struct loop *loop)
{
	int pair[2];

	stream->loop = loop;
	stream->client_fd = -1;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		return false;
	stream->guest_fd = pair[0];
	stream->inner_fd = pair[1];
	return loop_add(loop, stream->guest_fd, EPOLLIN, guest_ready, stream) == 0;
}

int stream_attach(struct guest_stream *stream)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		return -1;
	detach(stream);
	stream->to_guest_size = 0;
	if (loop_add(stream->loop, pair[0], EPOLLIN, client_ready, stream) < 0) {
		close(pair[0]);
		close(pair[1]);
		return -1;
	}
	stream->client_fd = pair[0];
	update(stream);
	return pair[1];
}

void stream_drain(struct guest_stream *stream)
{
	while (from_guest(stream))
		continue;
	update(stream);
}
