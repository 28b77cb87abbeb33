/* SPDX-License-Identifier: Apache-2.0 */
/* Frames from port to port through lanes; wan.h says what these are. */
#include "wan.h"

#include "log.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum {
	BATCH = 32,
	TURN = 256, /* frames a lane delivers before others have their turn */
	FRAME_SPACE = 68 * 1024,
	SOCKET_BUFFER = 32 << 20,
};

/* What a frame in a lane begins with: where it goes, and what the packet socket wants to know of it. */
struct envelope {
	uint32_t port;
	struct virtio_net_hdr header;
} __attribute__((packed));

struct wan_buffers {
	struct mmsghdr messages[BATCH];
	struct iovec iovs[BATCH];
	uint8_t frames[BATCH][FRAME_SPACE];
};

static uint64_t lane_seed(const struct wan *wan, unsigned from, unsigned to)
{
	uint64_t seed = wan->seed;

	for (const char *c = wan->sites[from].name; *c; c++)
		seed = (seed ^ (uint8_t)*c) * UINT64_C(0x100000001b3);
	seed = (seed ^ '>') * UINT64_C(0x100000001b3);
	for (const char *c = wan->sites[to].name; *c; c++)
		seed = (seed ^ (uint8_t)*c) * UINT64_C(0x100000001b3);
	return seed;
}

static struct wan_port *port_of(struct wan *wan, uint32_t id)
{
	for (unsigned i = 0; id && i < WAN_MAX_PORTS; i++)
		if (wan->ports[i].id == id)
			return &wan->ports[i];
	return NULL;
}

/* Writes frames to the ports their envelopes name: one system call for each run of frames to the same port. */
static void deliver(struct wan *wan, struct frame_item **items, unsigned count)
{
	for (unsigned done = 0; done < count;) {
		struct mmsghdr messages[BATCH] = {0};
		struct iovec iovs[BATCH];
		struct envelope first, next;
		struct wan_port *port;
		unsigned n = 0;
		int sent;

		memcpy(&first, items[done]->frame.data, sizeof(first));
		port = port_of(wan, first.port);
		for (; done + n < count && n < BATCH; n++) {
			struct frame *frame = &items[done + n]->frame;

			memcpy(&next, frame->data, sizeof(next));
			if (next.port != first.port)
				break;
			iovs[n].iov_base = frame->data + offsetof(struct envelope, header);
			iovs[n].iov_len = frame->length - offsetof(struct envelope, header);
			messages[n].msg_hdr.msg_iov = &iovs[n];
			messages[n].msg_hdr.msg_iovlen = 1;
		}
		if (!port) { /* detached meanwhile */
			done += n;
			continue;
		}
		sent = sendmmsg(port->fd, messages, n, MSG_DONTWAIT);
		for (int i = 0; i < sent; i++) {
			port->tx_frames++;
			port->tx_bytes += messages[i].msg_len - sizeof(struct virtio_net_hdr);
		}
		if (sent <= 0) { /* the first one is not wanted: too long, or no room; the others may pass */
			port->tx_dropped++;
			sent = 1;
		}
		done += (unsigned)sent;
	}
}

static void lane_arm(struct wan_lane *lane)
{
	const uint64_t next = impair_next(&lane->impair);

	if (next == UINT64_MAX)
		loop_timer_cancel(lane->wan->loop, &lane->timer);
	else if (!lane->timer.armed || lane->timer.deadline_ns != next)
		loop_timer_set(lane->wan->loop, &lane->timer, next);
}

static void lane_run(void *context)
{
	struct wan_lane *lane = context;
	struct frame_item *items[TURN];
	const uint64_t now = loop_now();
	unsigned count = 0;

	while (count < TURN && (items[count] = impair_due(&lane->impair, now)))
		count++;
	if (lane->cut)
		lane->cut_frames += count;
	else
		deliver(lane->wan, items, count);
	for (unsigned i = 0; i < count; i++)
		free(items[i]);
	lane_arm(lane);
}

struct wan_lane *wan_lane(struct wan *wan, unsigned from, unsigned to)
{
	struct wan_lane *lane = wan->lanes[from][to];

	if (lane)
		return lane;
	lane = calloc(1, sizeof(*lane));
	if (!lane)
		return NULL;
	*lane = (struct wan_lane){.wan = wan, .from = from, .to = to, .timer = {.run = lane_run, .context = lane}};
	impair_init(&lane->impair, lane_seed(wan, from, to));
	wan->lanes[from][to] = lane;
	return lane;
}

static void offer(struct wan_port *from, const struct wan_port *to, struct frame *frame, uint64_t now)
{
	struct wan_lane *lane = wan_lane(from->wan, from->site, to->site);

	if (!lane)
		return;
	lane->frames++;
	lane->bytes += frame->length - sizeof(struct envelope);
	if (lane->cut) {
		lane->cut_frames++;
		return;
	}
	memcpy(frame->data, &to->id, sizeof(to->id));
	impair_offer(&lane->impair, frame, now);
	lane_arm(lane);
}

static struct wan_address *find_address(struct wan *wan, const uint8_t *mac)
{
	for (unsigned i = 0; i < wan->address_count; i++)
		if (memcmp(wan->addresses[i].mac, mac, ETH_ALEN) == 0)
			return &wan->addresses[i];
	return NULL;
}

static void learn(struct wan_port *port, const uint8_t *mac)
{
	struct wan *wan = port->wan;
	struct wan_address *address = find_address(wan, mac);

	if (mac[0] & 1)
		return;
	if (!address) {
		if (wan->address_count < WAN_MAX_ADDRESSES)
			address = &wan->addresses[wan->address_count++];
		else
			address = &wan->addresses[wan->address_next++ % WAN_MAX_ADDRESSES];
		memcpy(address->mac, mac, ETH_ALEN);
	}
	address->port = port->id;
}

/* The BLOCK_ bit of a frame's protocol, 0 for others. */
static unsigned protocol_bit(const uint8_t *frame, size_t length)
{
	const uint16_t type = (uint16_t)(frame[12] << 8 | frame[13]);
	uint8_t protocol = 0;

	if (type == ETH_P_IP && length >= 34)
		protocol = frame[23];
	else if (type == ETH_P_IPV6 && length >= 54)
		protocol = frame[20];
	switch (protocol) {
	case IPPROTO_TCP:
		return BLOCK_TCP;
	case IPPROTO_UDP:
		return BLOCK_UDP;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return BLOCK_ICMP;
	default:
		return 0;
	}
}

/* One frame that came in at a port; frame->data begins with room for the envelope. */
static void forward(struct wan_port *port, struct frame *frame, uint64_t now)
{
	struct wan *wan = port->wan;
	const uint8_t *ethernet = frame->data + sizeof(struct envelope);
	const size_t length = frame->length - sizeof(struct envelope);
	const unsigned protocol = protocol_bit(ethernet, length);
	struct wan_address *known = find_address(wan, ethernet);
	struct wan_port *only = known ? port_of(wan, known->port) : NULL;

	learn(port, ethernet + ETH_ALEN);
	for (unsigned i = 0; i < WAN_MAX_PORTS; i++) {
		struct wan_port *to = only ? only : &wan->ports[i];

		if (to->id && to != port) {
			if (protocol & (wan->sites[port->site].block | wan->sites[to->site].block))
				port->blocked++;
			else
				offer(port, to, frame, now);
		}
		if (only)
			return;
	}
}

static void port_ready(void *context, int fd, uint32_t events)
{
	struct wan_port *port = context;
	struct wan_buffers *b = port->wan->buffers;
	const uint64_t now = loop_now();
	int count;

	(void)events;
	for (unsigned i = 0; i < BATCH; i++) {
		b->iovs[i] = (struct iovec){b->frames[i] + offsetof(struct envelope, header),
			FRAME_SPACE - offsetof(struct envelope, header)};
		b->messages[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &b->iovs[i], .msg_iovlen = 1}};
	}
	count = recvmmsg(fd, b->messages, BATCH, MSG_DONTWAIT, NULL);
	for (int i = 0; i < count; i++) {
		struct frame frame = {
			.data = b->frames[i], .length = b->messages[i].msg_len + offsetof(struct envelope, header)};

		if (frame.length < sizeof(struct envelope) + ETH_HLEN || b->messages[i].msg_hdr.msg_flags & MSG_TRUNC)
			continue;
		port->rx_frames++;
		port->rx_bytes += frame.length - sizeof(struct envelope);
		forward(port, &frame, now);
	}
}

/* A packet socket on the interface, with virtio headers and large buffers. -1 and errno. */
static int open_socket(const char *interface)
{
	struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
	const int one = 1, large = SOCKET_BUFFER;
	int fd, failure;

	address.sll_ifindex = (int)if_nametoindex(interface);
	if (address.sll_ifindex == 0)
		return -1;
	fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -1;
	/* Without the privilege for more, the host's limits hold. */
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &large, sizeof(large)) < 0)
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &large, sizeof(large));
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &large, sizeof(large)) < 0)
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &large, sizeof(large));
	if (setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof(one)) == 0 &&
		setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof(one)) == 0 &&
		bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0)
		return fd;
	failure = errno;
	close(fd);
	errno = failure;
	return -1;
}

struct wan_port *wan_attach(struct wan *wan, unsigned site, const char *interface)
{
	struct wan_port *port = NULL;
	int fd;

	for (unsigned i = 0; i < WAN_MAX_PORTS && !port; i++)
		if (!wan->ports[i].id)
			port = &wan->ports[i];
	if (!port) {
		errno = ENOSPC;
		return NULL;
	}
	fd = open_socket(interface);
	if (fd < 0)
		return NULL;
	*port = (struct wan_port){.wan = wan, .id = ++wan->last_port, .site = site, .fd = fd};
	strncpy(port->interface, interface, sizeof(port->interface) - 1);
	if (loop_add(wan->loop, fd, EPOLLIN, port_ready, port) == 0)
		return port;
	close(fd);
	port->id = 0;
	return NULL;
}

void wan_detach(struct wan_port *port)
{
	loop_remove(port->wan->loop, port->fd);
	close(port->fd);
	port->id = 0;
}

struct wan_port *wan_find_port(struct wan *wan, const char *interface)
{
	for (unsigned i = 0; i < WAN_MAX_PORTS; i++)
		if (wan->ports[i].id && strcmp(wan->ports[i].interface, interface) == 0)
			return &wan->ports[i];
	return NULL;
}

bool wan_init(struct wan *wan, struct loop *loop, uint64_t seed)
{
	wan->loop = loop;
	wan->seed = seed;
	wan->buffers = malloc(sizeof(*wan->buffers));
	return wan->buffers != NULL;
}

void wan_free(struct wan *wan)
{
	for (unsigned i = 0; i < WAN_MAX_PORTS; i++)
		if (wan->ports[i].id)
			wan_detach(&wan->ports[i]);
	for (unsigned a = 0; a < WAN_MAX_SITES; a++)
		for (unsigned b = 0; b < WAN_MAX_SITES; b++) {
			struct wan_lane *lane = wan->lanes[a][b];

			if (!lane)
				continue;
			loop_timer_cancel(wan->loop, &lane->timer);
			impair_free(&lane->impair);
			free(lane);
		}
	free(wan->buffers);
}
