/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The server side of the control socket: listener, the one connection, its bounded queue, and how a datagram finds its
 * handler. Arguments are read in control_args.c, messages are built in control_message.c.
 */
#include "control_internal.h"

#include "log.h"
#include "unix_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define PROTOCOL_VERSION 1

static void queued_free(struct control_queued *queued)
{
	for (size_t i = 0; i < queued->fd_count; i++)
		close(queued->fds[i]);
	free(queued);
}

static void drop_connection(struct control *control)
{
	if (control->connection_fd < 0)
		return;
	loop_remove(control->config.loop, control->connection_fd);
	close(control->connection_fd);
	control->connection_fd = -1;
	while (control->queue_head) {
		struct control_queued *queued = control->queue_head;

		control->queue_head = queued->next;
		queued_free(queued);
	}
	control->queue_tail = NULL;
	control->queue_length = 0;
}

void control_disconnect(struct control *control)
{
	if (control->connection_fd < 0)
		return;
	drop_connection(control);
	if (control->config.connection)
		control->config.connection(control->config.context, false);
}

bool control_connected(const struct control *control)
{
	return control->connection_fd >= 0;
}

/* 0 sent, 1 would block, -1 the connection is of no use any more. */
static int send_datagram(int fd, const void *data, size_t size, const int *fds, size_t fd_count)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(CONTROL_FDS_MAX * sizeof(int))];
	} ancillary = {0};
	struct iovec part = {(void *)(uintptr_t)data, size};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

	if (fd_count) {
		message.msg_control = &ancillary;
		message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
		ancillary.header.cmsg_level = SOL_SOCKET;
		ancillary.header.cmsg_type = SCM_RIGHTS;
		ancillary.header.cmsg_len = CMSG_LEN(fd_count * sizeof(int));
		memcpy(CMSG_DATA(&ancillary.header), fds, fd_count * sizeof(int));
	}
	if (sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
		return 0;
	return errno == EAGAIN || errno == ENOBUFS ? 1 : -1;
}

static bool enqueue(struct control *control, const void *data, size_t size, const int *fds, size_t fd_count)
{
	struct control_queued *queued;

	if (control->queue_length >= CONTROL_QUEUE_MAX)
		return false;
	queued = malloc(sizeof(*queued) + size);
	if (!queued)
		return false;
	*queued = (struct control_queued){.size = size};
	memcpy(queued->data, data, size);
	for (; queued->fd_count < fd_count; queued->fd_count++) {
		int copy = fcntl(fds[queued->fd_count], F_DUPFD_CLOEXEC, 0);

		if (copy < 0) {
			queued_free(queued);
			return false;
		}
		queued->fds[queued->fd_count] = copy;
	}
	if (control->queue_tail)
		control->queue_tail->next = queued;
	else
		control->queue_head = queued;
	control->queue_tail = queued;
	control->queue_length++;
	return loop_modify(control->config.loop, control->connection_fd, EPOLLIN | EPOLLOUT) == 0;
}

/* Only shut down: the loop then sees its end. So no handler loses its connection while it runs. */
static void break_connection(struct control *control)
{
	control->connection_broken = true;
	shutdown(control->connection_fd, SHUT_RDWR);
}

void control_transmit(struct control *control, const void *data, size_t size, const int *fds, size_t fd_count)
{
	int result = 1;

	if (control->connection_fd < 0 || control->connection_broken)
		return;
	if (!control->queue_head)
		result = send_datagram(control->connection_fd, data, size, fds, fd_count);
	if (result == 0)
		return;
	if (result < 0 || !enqueue(control, data, size, fds, fd_count)) {
		if (result > 0)
			log_warning("the controller does not read its answers; disconnected");
		break_connection(control);
	}
}

static void flush_queue(struct control *control)
{
	while (control->queue_head) {
		struct control_queued *queued = control->queue_head;
		int result = send_datagram(
			control->connection_fd, queued->data, queued->size, queued->fds, queued->fd_count);

		if (result > 0)
			return;
		if (result < 0) {
			break_connection(control);
			return;
		}
		control->queue_head = queued->next;
		if (!control->queue_head)
			control->queue_tail = NULL;
		control->queue_length--;
		queued_free(queued);
	}
	loop_modify(control->config.loop, control->connection_fd, EPOLLIN);
}

static void op_hello(struct control *control, struct control_request *request)
{
	struct control_message *reply = control_reply(request);

	control_put_str(reply, "role", control->config.role);
	control_put_u64(reply, "pid", (uint64_t)getpid());
	control_put_str(reply, "version", MOBI_VERSION);
	control_put_u64(reply, "protocol", PROTOCOL_VERSION);
	control_send(reply);
}

static void op_quit(struct control *control, struct control_request *request)
{
	control_ok(request);
	if (control->config.quit)
		control->config.quit(control->config.context);
	else
		loop_stop(control->config.loop, 0);
}

static void run_operation(struct control *control, struct control_request *request)
{
	struct control_args args = {.request = request, .map = &request->root.via.map};
	const struct control_op *op;
	const char *name;

	if (!control_str(&args, "op", 64, &name))
		return;
	for (op = control->config.ops; op->name; op++)
		if (strcmp(op->name, name) == 0)
			break;
	if (op->name) {
		if (control_check_keys(&args, op->keys))
			op->run(control->config.context, request, &args);
	} else if (strcmp(name, "hello") == 0) {
		if (control_check_keys(&args, ""))
			op_hello(control, request);
	} else if (strcmp(name, "quit") == 0) {
		if (control_check_keys(&args, ""))
			op_quit(control, request);
	} else {
		control_error(request, CONTROL_UNKNOWN_OP, "role %s has no operation '%s'", control->config.role, name);
	}
}

/* The id first, so that every other mistake can be answered under it. 0: no id. */
static uint64_t id_of(const msgpack_object *root)
{
	const msgpack_object *id = root->type == MSGPACK_OBJECT_MAP ? control_find(&root->via.map, "id") : NULL;

	return id && id->type == MSGPACK_OBJECT_POSITIVE_INTEGER ? id->via.u64 : 0;
}

static void handle_datagram(struct control *control, struct control_request *request, const char *data, size_t size)
{
	size_t offset = 0;

	request->ticket.connection = control->connection;
	msgpack_zone_init(&request->zone, 2048);
	if (!control_plausible(data, size) ||
		msgpack_unpack(data, size, &offset, &request->zone, &request->root) != MSGPACK_UNPACK_SUCCESS ||
		offset != size || request->root.type != MSGPACK_OBJECT_MAP) {
		control_error(request, CONTROL_BAD_REQUEST, "a request is one MessagePack map");
	} else {
		request->ticket.id = id_of(&request->root);
		if (!request->ticket.id)
			control_error(request, CONTROL_BAD_REQUEST, "a request has an id greater than 0");
		else
			run_operation(control, request);
	}
	if (!request->answered)
		control_error(request, CONTROL_INTERNAL, "the operation gave no answer");
	msgpack_zone_destroy(&request->zone);
}

static void collect_fds(struct control_request *request, struct msghdr *message)
{
	for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
		size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < count; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
			if (request->fd_count < CONTROL_FDS_MAX)
				request->fds[request->fd_count++] = fd;
			else
				close(fd);
		}
	}
}

/* One datagram per call, so that other descriptors get their turn. */
static void receive(struct control *control)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(CONTROL_FDS_MAX * sizeof(int))];
	} ancillary;
	struct control_request request = {.control = control};
	struct iovec part = {control->buffer, sizeof(control->buffer)};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof(ancillary)};
	ssize_t size = recvmsg(control->connection_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (size <= 0) {
		control_disconnect(control);
		return;
	}
	collect_fds(&request, &message);
	if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
		request.ticket.connection = control->connection;
		control_error(&request, CONTROL_BAD_REQUEST, "a request has at most %d bytes and %d descriptors",
			CONTROL_MESSAGE_MAX, CONTROL_FDS_MAX);
	} else {
		handle_datagram(control, &request, control->buffer, (size_t)size);
	}
	for (size_t i = 0; i < request.fd_count; i++)
		if (request.fds[i] >= 0)
			close(request.fds[i]);
}

static void connection_ready(void *context, int fd, uint32_t events)
{
	struct control *control = context;

	(void)fd;
	if (events & EPOLLOUT)
		flush_queue(control);
	if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
		receive(control);
}

static void listener_ready(void *context, int fd, uint32_t events)
{
	struct control *control = context;
	int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	(void)events;
	if (connection < 0)
		return;
	control_disconnect(control);
	if (loop_add(control->config.loop, connection, EPOLLIN, connection_ready, control) < 0) {
		log_error("cannot watch the controller: %s", strerror(errno));
		close(connection);
		return;
	}
	control->connection_fd = connection;
	control->connection_broken = false;
	control->connection++;
	if (control->config.connection)
		control->config.connection(control->config.context, true);
}

struct control *control_new(const struct control_config *config)
{
	struct control *control = calloc(1, sizeof(*control));

	if (!control) {
		log_error("no memory for the control socket");
		return NULL;
	}
	control->config = *config;
	control->connection_fd = -1;
	control->listener_fd = unix_listen(config->path, SOCK_SEQPACKET);
	if (control->listener_fd < 0 ||
		loop_add(config->loop, control->listener_fd, EPOLLIN, listener_ready, control) < 0) {
		log_error("control socket %s: %s", config->path, strerror(errno));
		if (control->listener_fd >= 0)
			close(control->listener_fd);
		free(control);
		return NULL;
	}
	return control;
}

void control_free(struct control *control)
{
	if (!control)
		return;
	if (control->connection_fd >= 0)
		flush_queue(control);
	drop_connection(control);
	loop_remove(control->config.loop, control->listener_fd);
	close(control->listener_fd);
	unlink(control->config.path);
	free(control);
}
