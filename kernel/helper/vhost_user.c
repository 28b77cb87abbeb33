/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The vhost-user protocol, back end; the idea is in vhost_user.h. A message is a header of 12 bytes, a payload, and
 * file descriptors that came with its first byte. Everything in it is the front end's word: checked, then used.
 */
#include "vhost_user.h"

#include "log.h"
#include "unix_socket.h"

#include <assert.h>
#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum request {
	GET_FEATURES = 1,
	SET_FEATURES = 2,
	SET_OWNER = 3,
	RESET_OWNER = 4,
	SET_MEM_TABLE = 5,
	SET_VRING_NUM = 8,
	SET_VRING_ADDR = 9,
	SET_VRING_BASE = 10,
	GET_VRING_BASE = 11,
	SET_VRING_KICK = 12,
	SET_VRING_CALL = 13,
	SET_VRING_ERR = 14,
	GET_PROTOCOL_FEATURES = 15,
	SET_PROTOCOL_FEATURES = 16,
	GET_QUEUE_NUM = 17,
	SET_VRING_ENABLE = 18,
	GET_CONFIG = 24,
	SET_CONFIG = 25,
};

#define VERSION 1u
#define VERSION_MASK 3u
#define FLAG_REPLY (1u << 2)
#define FLAG_NEED_REPLY (1u << 3)
#define F_PROTOCOL_FEATURES (UINT64_C(1) << 30)
#define PROTOCOL_F_MQ (UINT64_C(1) << 0)
#define PROTOCOL_F_REPLY_ACK (UINT64_C(1) << 3)
#define PROTOCOL_F_CONFIG (UINT64_C(1) << 9)
#define PROTOCOL_FEATURES (PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG)
#define RING_INDEX_MASK 0xff
#define RING_NO_FD (1u << 8)
#define MAX_CONFIG 256
#define MAX_FDS GUEST_MEMORY_MAX

#define RING_FEATURES                                                                                                  \
	(UINT64_C(1) << VIRTIO_F_VERSION_1 | UINT64_C(1) << VIRTIO_RING_F_INDIRECT_DESC |                              \
		UINT64_C(1) << VIRTIO_RING_F_EVENT_IDX | F_PROTOCOL_FEATURES)

struct header {
	uint32_t request, flags, size;
};

struct ring_state {
	uint32_t index, num;
};

struct ring_addresses {
	uint32_t index, flags;
	uint64_t desc, used, avail, log;
};

struct memory_region {
	uint64_t guest, size, user, offset;
};

struct memory_table {
	uint32_t count, padding;
	struct memory_region regions[GUEST_MEMORY_MAX];
};

struct config_window {
	uint32_t offset, size, flags;
	uint8_t data[MAX_CONFIG];
};

/* Header and payload are adjacent, as on the wire. */
struct message {
	uint32_t alignment;
	struct header header;
	union {
		uint64_t number;
		struct ring_state state;
		struct ring_addresses addresses;
		struct memory_table memory;
		struct config_window config;
	} payload;
};

struct ring {
	struct virtqueue queue;
	struct vhost_user *server;
	struct loop_timer again;
	bool started; /* between its kick descriptor and GET_VRING_BASE */
	bool enabled;
	bool addressed; /* the addresses below were given */
	uint64_t desc, avail, used;
};

struct vhost_user {
	struct loop *loop;
	const struct vhost_user_device *device;
	void *context;
	char *path;
	int listener, connection; /* -1 = none */
	uint64_t features, protocol_features;
	struct guest_memory memory;
	struct ring rings[VHOST_USER_MAX_QUEUES];

	/* The message that is being received. */
	struct message message;
	size_t received;
	int fds[MAX_FDS];
	unsigned fd_count;
};

static_assert(offsetof(struct message, payload) == offsetof(struct message, header) + sizeof(struct header),
	"header and payload are adjacent");

static void run_ring(void *context)
{
	struct ring *ring = context;

	if (ring->queue.running && !ring->queue.broken)
		ring->server->device->kick(ring->server->context, ring->queue.index);
	if (ring->queue.broken && ring->queue.fault) {
		log_warning(
			"%s: queue %u is broken: %s", ring->server->device->name, ring->queue.index, ring->queue.fault);
		ring->queue.fault = NULL;
	}
}

static void kicked(void *context, int fd, uint32_t events)
{
	/* Edge-triggered and never read: a front end could take the count away first and leave the reader waiting. */
	(void)fd;
	(void)events;
	run_ring(context);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Lets the device finish; afterwards the queue is neither read nor written. */
static void ring_pause(struct ring *ring)
{
	struct vhost_user *server = ring->server;

	if (ring->queue.running && server->device->stop)
		server->device->stop(server->context, ring->queue.index);
	ring->queue.running = false;
	loop_timer_cancel(server->loop, &ring->again);
}

static void ring_stop(struct ring *ring)
{
	ring_pause(ring);
	ring->started = false;
	if (ring->queue.kick_fd >= 0)
		loop_remove(ring->server->loop, ring->queue.kick_fd);
	close_fd(&ring->queue.kick_fd);
}

/* Puts the queue into the state that started, enabled, addresses and memory table ask for. Returns what is wrong. */
static const char *ring_update(struct ring *ring)
{
	ring_pause(ring);
	if (!ring->started || !ring->enabled)
		return NULL;
	ring->queue.event_idx = ring->server->features >> VIRTIO_RING_F_EVENT_IDX & 1;
	ring->queue.indirect = ring->server->features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
	if (!virtqueue_start(&ring->queue, ring->desc, ring->avail, ring->used, ring->queue.next_avail))
		return ring->queue.fault;
	virtqueue_want_kicks(&ring->queue);
	vhost_user_again(ring->server, ring->queue.index);
	return NULL;
}

static void reset(struct vhost_user *server)
{
	for (unsigned i = 0; i < server->device->queues; i++) {
		struct ring *ring = &server->rings[i];

		ring_stop(ring);
		close_fd(&ring->queue.call_fd);
		close_fd(&ring->queue.err_fd);
		*ring = (struct ring){.server = server, .again = {.run = run_ring, .context = ring}};
		ring->queue = (struct virtqueue){
			.memory = &server->memory, .index = i, .kick_fd = -1, .call_fd = -1, .err_fd = -1};
	}
	guest_memory_clear(&server->memory);
	server->features = server->protocol_features = 0;
	server->received = 0;
	while (server->fd_count)
		close(server->fds[--server->fd_count]);
}

static void listener_ready(void *context, int fd, uint32_t events);

static void disconnect(struct vhost_user *server)
{
	reset(server);
	loop_remove(server->loop, server->connection);
	close_fd(&server->connection);
	if (server->device->connection)
		server->device->connection(server->context, false);
	if (loop_add(server->loop, server->listener, EPOLLIN, listener_ready, server) < 0)
		log_error("%s: cannot listen again: %s", server->path, strerror(errno));
}

/* A descriptor that came with the message now belongs to the caller. */
static int take_fd(struct vhost_user *server)
{
	int fd = server->fds[0];

	server->fds[0] = server->fds[--server->fd_count];
	return fd;
}

static const char *set_features(struct vhost_user *server, uint64_t features)
{
	if (features & ~(server->device->features | RING_FEATURES))
		return "features that were not offered";
	server->features = features;
	for (unsigned i = 0; i < server->device->queues; i++)
		if (!(features & F_PROTOCOL_FEATURES))
			server->rings[i].enabled = true;
	return NULL;
}

static const char *set_memory(struct vhost_user *server)
{
	const struct memory_table *table = &server->message.payload.memory;
	const char *fault = NULL;

	if (server->message.header.size < 8 || table->count > GUEST_MEMORY_MAX ||
		server->message.header.size < 8 + table->count * sizeof(table->regions[0]))
		return "a memory table of a wrong size";
	if (table->count != server->fd_count)
		return "a memory table without a descriptor for every region";
	for (unsigned i = 0; i < server->device->queues; i++)
		ring_pause(&server->rings[i]);
	guest_memory_clear(&server->memory);
	for (unsigned i = 0; i < table->count && !fault; i++) {
		const struct memory_region *r = &table->regions[i];

		fault = guest_memory_add(&server->memory, r->guest, r->user, r->size, r->offset, server->fds[i]);
	}
	for (unsigned i = 0; i < server->device->queues && !fault; i++)
		fault = ring_update(&server->rings[i]);
	return fault;
}

static const char *set_size(struct ring *ring, uint32_t size)
{
	if (size == 0 || size > VIRTQUEUE_MAX_SIZE || (size & (size - 1)))
		return "a queue size that is no power of two or too large";
	if (ring->started)
		return "a new size for a running queue";
	ring->queue.size = size;
	return NULL;
}

static const char *set_addresses(struct ring *ring, const struct ring_addresses *addresses)
{
	ring->desc = addresses->desc;
	ring->avail = addresses->avail;
	ring->used = addresses->used;
	ring->addressed = true;
	return ring->started ? ring_update(ring) : NULL;
}

static const char *set_base(struct ring *ring, uint32_t base)
{
	if (ring->started)
		return "a new base for a running queue";
	ring->queue.next_avail = (uint16_t)base;
	return NULL;
}

static const char *set_kick(struct ring *ring, int fd)
{
	ring_stop(ring);
	if (fd < 0)
		return "a queue without a kick descriptor, which would have to be polled";
	ring->queue.kick_fd = fd;
	if (!ring->addressed || !ring->queue.size)
		return "a queue started before its size and addresses are known";
	if (loop_add(ring->server->loop, fd, EPOLLIN | EPOLLET, kicked, ring) < 0)
		return "a kick descriptor that cannot be waited for";
	ring->started = true;
	return ring_update(ring);
}

static const char *set_fd(int *slot, int fd)
{
	close_fd(slot);
	*slot = fd;
	return NULL;
}

/* SET_VRING_KICK, CALL and ERR: a queue number, a bit for "no descriptor", a descriptor. */
static const char *set_ring_fd(struct vhost_user *server)
{
	const uint64_t number = server->message.payload.number;
	const unsigned index = number & RING_INDEX_MASK;
	struct ring *ring = &server->rings[index < VHOST_USER_MAX_QUEUES ? index : 0];
	int fd = -1;

	if (server->message.header.size != 8 || index >= server->device->queues)
		return "a queue that does not exist";
	if (!(number & RING_NO_FD)) {
		if (server->fd_count != 1)
			return "a missing descriptor";
		fd = take_fd(server);
	}
	switch (server->message.header.request) {
	case SET_VRING_KICK:
		return set_kick(ring, fd);
	case SET_VRING_CALL:
		return set_fd(&ring->queue.call_fd, fd);
	default:
		return set_fd(&ring->queue.err_fd, fd);
	}
}

static const char *set_ring(struct vhost_user *server)
{
	const struct message *m = &server->message;
	const uint32_t index = m->payload.state.index, num = m->payload.state.num;
	const size_t size =
		m->header.request == SET_VRING_ADDR ? sizeof(m->payload.addresses) : sizeof(m->payload.state);
	struct ring *ring = &server->rings[index < VHOST_USER_MAX_QUEUES ? index : 0];

	if (m->header.size != size || index >= server->device->queues)
		return "a queue that does not exist";
	switch (m->header.request) {
	case SET_VRING_NUM:
		return set_size(ring, num);
	case SET_VRING_ADDR:
		return set_addresses(ring, &m->payload.addresses);
	case SET_VRING_BASE:
		return set_base(ring, num);
	default:
		ring->enabled = num != 0;
		return ring_update(ring);
	}
}

static const char *set_config(struct vhost_user *server)
{
	const struct config_window *window = &server->message.payload.config;

	if (server->message.header.size < 12 || window->size > server->message.header.size - 12 ||
		window->offset > server->device->config_size ||
		window->size > server->device->config_size - window->offset)
		return "a part of the configuration that does not exist";
	if (!server->device->set_config ||
		!server->device->set_config(server->context, window->offset, window->data, window->size))
		return "a change of the configuration";
	return NULL;
}

/* Front ends reply within microseconds: one whose socket is full is not answered but dropped. */
static const char *reply(struct vhost_user *server, size_t size)
{
	struct message *m = &server->message;

	m->header.flags = VERSION | FLAG_REPLY;
	m->header.size = (uint32_t)size;
	if (send(server->connection, &m->header, sizeof(m->header) + size, MSG_DONTWAIT | MSG_NOSIGNAL) !=
		(ssize_t)(sizeof(m->header) + size))
		return "it does not take the reply";
	return NULL;
}

static const char *reply_number(struct vhost_user *server, uint64_t number)
{
	server->message.payload.number = number;
	return reply(server, sizeof(number));
}

static const char *get_ring_base(struct vhost_user *server)
{
	struct ring_state *state = &server->message.payload.state;

	if (server->message.header.size != sizeof(*state) || state->index >= server->device->queues)
		return "a queue that does not exist";
	ring_stop(&server->rings[state->index]);
	state->num = server->rings[state->index].queue.next_avail;
	return reply(server, sizeof(*state));
}

static const char *get_config(struct vhost_user *server)
{
	struct config_window *window = &server->message.payload.config;

	if (server->message.header.size < 12 || window->size > MAX_CONFIG || window->offset > MAX_CONFIG - window->size)
		return "a part of the configuration that does not exist";
	memset(window->data, 0, sizeof(window->data));
	if (window->offset < server->device->config_size) {
		size_t size = server->device->config_size - window->offset;

		memcpy(window->data, (const uint8_t *)server->device->config + window->offset,
			size < window->size ? size : window->size);
	}
	return reply(server, 12 + window->size);
}

/* Requests that ask something. `*answered` says whether it was one of them. */
static const char *handle_question(struct vhost_user *server, bool *answered)
{
	*answered = true;
	switch (server->message.header.request) {
	case GET_FEATURES:
		return reply_number(server, server->device->features | RING_FEATURES);
	case GET_PROTOCOL_FEATURES:
		return reply_number(server, PROTOCOL_FEATURES);
	case GET_QUEUE_NUM:
		return reply_number(server, server->device->queues);
	case GET_VRING_BASE:
		return get_ring_base(server);
	case GET_CONFIG:
		return get_config(server);
	default:
		*answered = false;
		return NULL;
	}
}

static const char *handle_order(struct vhost_user *server)
{
	switch (server->message.header.request) {
	case SET_OWNER:
	case RESET_OWNER:
		return NULL;
	case SET_FEATURES:
		if (server->message.header.size != 8)
			return "features of a wrong size";
		return set_features(server, server->message.payload.number);
	case SET_PROTOCOL_FEATURES:
		if (server->message.header.size != 8)
			return "features of a wrong size";
		server->protocol_features = server->message.payload.number;
		return server->protocol_features & ~PROTOCOL_FEATURES ? "features that were not offered" : NULL;
	case SET_MEM_TABLE:
		return set_memory(server);
	case SET_VRING_NUM:
	case SET_VRING_ADDR:
	case SET_VRING_BASE:
	case SET_VRING_ENABLE:
		return set_ring(server);
	case SET_VRING_KICK:
	case SET_VRING_CALL:
	case SET_VRING_ERR:
		return set_ring_fd(server);
	case SET_CONFIG:
		return set_config(server);
	default:
		return "a request that was not negotiated";
	}
}

/* One whole message. Returns what is wrong when the connection cannot go on. */
static const char *handle(struct vhost_user *server)
{
	const uint32_t request = server->message.header.request;
	/* Whoever sets the flag waits: virtio_uml does already on the request that negotiates REPLY_ACK. */
	const bool acknowledge = server->message.header.flags & FLAG_NEED_REPLY;
	bool answered;
	const char *fault = handle_question(server, &answered);

	if (!answered) {
		fault = handle_order(server);
		if (acknowledge) {
			if (fault)
				log_warning("%s: refused request %u: %s", server->device->name, request, fault);
			server->message.header.request = request;
			fault = reply_number(server, fault ? 1 : 0);
		}
	}
	while (server->fd_count)
		close(server->fds[--server->fd_count]);
	return fault;
}

static const char *take_descriptors(struct vhost_user *server, struct msghdr *header)
{
	const char *fault = header->msg_flags & MSG_CTRUNC ? "too many descriptors" : NULL;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
			if (server->fd_count < MAX_FDS) {
				server->fds[server->fd_count++] = fd;
			} else {
				close(fd);
				fault = "too many descriptors";
			}
		}
	}
	return fault;
}

/* Receives what there is of one message. *complete is set when it is whole; returns what ends the connection. */
static const char *receive(struct vhost_user *server, bool *complete)
{
	struct message *m = &server->message;
	union {
		char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
		struct cmsghdr align;
	} control;
	size_t wanted = sizeof(m->header);

	if (server->received >= sizeof(m->header))
		wanted += m->header.size;
	struct iovec iov = {(uint8_t *)&m->header + server->received, wanted - server->received};
	struct msghdr header = {.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes)};
	ssize_t n = recvmsg(server->connection, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	const char *fault;

	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? NULL : strerror(errno);
	if (n == 0)
		return server->received ? "it closed in the middle of a message" : "it has closed";
	fault = take_descriptors(server, &header);
	if (fault)
		return fault;
	server->received += (size_t)n;
	if (server->received == sizeof(m->header)) {
		if ((m->header.flags & VERSION_MASK) != VERSION || (m->header.flags & FLAG_REPLY))
			return "a message of another version";
		if (m->header.size > sizeof(m->payload))
			return "a message that is too long";
	}
	*complete = server->received >= sizeof(m->header) && server->received == sizeof(m->header) + m->header.size;
	return NULL;
}

static void connection_ready(void *context, int fd, uint32_t events)
{
	struct vhost_user *server = context;
	bool complete = false;
	const char *fault = receive(server, &complete);

	(void)fd;
	(void)events;
	if (complete) {
		server->received = 0;
		fault = handle(server);
	}
	if (fault) {
		log_info("%s: front end disconnected: %s", server->device->name, fault);
		disconnect(server);
	}
}

static void listener_ready(void *context, int fd, uint32_t events)
{
	struct vhost_user *server = context;
	int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC);

	(void)events;
	if (connection < 0)
		return;
	if (loop_add(server->loop, connection, EPOLLIN, connection_ready, server) < 0) {
		log_error("%s: %s", server->path, strerror(errno));
		close(connection);
		return;
	}
	loop_remove(server->loop, fd);
	server->connection = connection;
	if (server->device->connection)
		server->device->connection(server->context, true);
}

struct vhost_user *vhost_user_listen(
	struct loop *loop, const char *path, const struct vhost_user_device *device, void *context)
{
	struct vhost_user *server;

	if (device->queues == 0 || device->queues > VHOST_USER_MAX_QUEUES || device->config_size > MAX_CONFIG) {
		errno = EINVAL;
		return NULL;
	}
	server = calloc(1, sizeof(*server));
	if (!server)
		return NULL;
	server->loop = loop;
	server->device = device;
	server->context = context;
	server->connection = -1;
	for (unsigned i = 0; i < device->queues; i++) {
		server->rings[i].server = server;
		server->rings[i].queue.kick_fd = server->rings[i].queue.call_fd = server->rings[i].queue.err_fd = -1;
	}
	guest_memory_init(&server->memory);
	reset(server);
	server->path = strdup(path);
	server->listener = unix_listen(path, SOCK_STREAM);
	if (server->listener >= 0 && server->path &&
		loop_add(loop, server->listener, EPOLLIN, listener_ready, server) == 0)
		return server;
	int failure = errno;
	close_fd(&server->listener);
	guest_memory_destroy(&server->memory);
	free(server->path);
	free(server);
	errno = failure;
	return NULL;
}

void vhost_user_free(struct vhost_user *server)
{
	if (!server)
		return;
	reset(server);
	loop_remove(server->loop, server->listener);
	if (server->connection >= 0)
		loop_remove(server->loop, server->connection);
	close_fd(&server->connection);
	close_fd(&server->listener);
	unlink(server->path);
	guest_memory_destroy(&server->memory);
	free(server->path);
	free(server);
}

struct virtqueue *vhost_user_queue(struct vhost_user *server, unsigned index)
{
	return &server->rings[index].queue;
}

bool vhost_user_connected(const struct vhost_user *server)
{
	return server->connection >= 0;
}

uint64_t vhost_user_features(const struct vhost_user *server)
{
	return server->features;
}

void vhost_user_again(struct vhost_user *server, unsigned index)
{
	/* In the future, or the loop would never come to its other events. */
	loop_timer_set(server->loop, &server->rings[index].again, loop_now() + 1);
}
