/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A front end's messages over a real connection. Input: [request 1 | how 1 | length 2 | payload] …: of `how` bits 0 to
 * 3 are the number of descriptors, bit 4 makes them memory instead of events, bit 5 asks for a reply, bit 6 is a wrong
 * version.
 */
#include "../vhost_user.c"
#include "fuzz.h"

#include <sys/eventfd.h>

#define MESSAGES 64
#define FRONT_MEMORY 0x10000

static struct loop *loop;
static struct vhost_user *server;
static uint8_t config[32];

/* Reads and returns everything that the queue offers. */
static void kick(void *context, unsigned index)
{
	struct virtqueue *queue = vhost_user_queue(server, index);
	struct iovec iov[VIRTQUEUE_MAX_IOV];
	struct virtqueue_chain chain;
	uint8_t copy[64];

	(void)context;
	for (unsigned i = 0; i < 8 && virtqueue_pop(queue, &chain, iov, VIRTQUEUE_MAX_IOV) > 0; i++) {
		iov_read(chain.iov, chain.readable, 0, copy, sizeof(copy));
		iov_write(chain.iov + chain.readable, chain.writable, 0, copy, sizeof(copy));
		virtqueue_push(queue, chain.head, sizeof(copy));
	}
	virtqueue_publish(queue);
	if (virtqueue_want_kicks(queue))
		vhost_user_again(server, index);
}

static bool take_config(void *context, size_t offset, const void *data, size_t size)
{
	(void)context;
	check(offset <= sizeof(config) && size <= sizeof(config) - offset);
	memcpy(config + offset, data, size);
	return true;
}

static const struct vhost_user_device device = {.name = "fuzz",
	.queues = 3,
	.config = config,
	.config_size = sizeof(config),
	.kick = kick,
	.set_config = take_config};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	char path[FUZZ_PATH];

	(void)argc;
	(void)argv;
	setenv("MOBI_LOG", "error", 1);
	log_open("fuzz");
	loop = loop_new();
	server = vhost_user_listen(loop, fuzz_path(path, "vhost"), &device, NULL);
	check(server);
	return 0;
}

/* Memory that the input begins, with a chain in the queue whose tables are at 0x4000, 0x4100 and 0x4200. */
static int front_memory(const uint8_t *data, size_t size)
{
	static const struct vring_desc chain[] = {
		{0x100, 64, VRING_DESC_F_NEXT, 1}, {0x200, 64, VRING_DESC_F_WRITE, 0}};
	static const uint16_t available[] = {0, 2};
	int fd = memory_file(data, size, FRONT_MEMORY);

	check(pwrite(fd, chain, sizeof(chain), 0x4000) == sizeof(chain));
	check(pwrite(fd, available, sizeof(available), 0x4100) == sizeof(available));
	return fd;
}

static void send_message(int front, struct input *input, int memory)
{
	uint32_t request = input_number(input, 1), how = input_number(input, 1);
	size_t size, fds = (how & 15) % (MAX_FDS + 2);
	uint8_t *payload = input_piece(input, &size);
	struct header header = {request, (how & 64 ? 2 : VERSION) | (how & 32 ? FLAG_NEED_REPLY : 0), (uint32_t)size};
	struct iovec parts[2] = {{&header, sizeof(header)}, {payload, size}};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE((MAX_FDS + 2) * sizeof(int))];
	} control = {.header = {CMSG_LEN(fds * sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

	for (size_t i = 0; i < fds; i++) {
		int fd = how & 16 ? fcntl(memory, F_DUPFD_CLOEXEC, 0) : eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);

		memcpy(CMSG_DATA(&control.header) + i * sizeof(fd), &fd, sizeof(fd));
	}
	if (fds) {
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE(fds * sizeof(int));
	}
	sendmsg(front, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	for (size_t i = 0; i < fds; i++)
		close(((int *)CMSG_DATA(&control.header))[i]);
	free(payload);
}

/* Header, then payload; then every ring is kicked. */
static void serve(int front)
{
	uint8_t replies[4096];

	for (int i = 0; i < 2 && server->connection >= 0; i++)
		connection_ready(server, server->connection, EPOLLIN);
	for (unsigned i = 0; i < device.queues; i++)
		run_ring(&server->rings[i]);
	while (recv(front, replies, sizeof(replies), MSG_DONTWAIT) > 0)
		;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};
	int front = unix_connect(server->path, SOCK_STREAM), memory = front_memory(data, size);

	memset(config, 0, sizeof(config));
	listener_ready(server, server->listener, EPOLLIN);
	check(front >= 0 && server->connection >= 0);
	for (int i = 0; i < MESSAGES && input.left && server->connection >= 0; i++) {
		send_message(front, &input, memory);
		serve(front);
	}
	if (server->connection >= 0)
		disconnect(server);
	close(front);
	close(memory);
	check(server->memory.count == 0 && server->fd_count == 0);
	return 0;
}
