/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest's network device: virtio-net over vhost-user with one pair of queues, 0 = receive, 1 = transmit (as the guest
 * calls them). Checksums the guest left to its device are carried on as they are, down to the receiving guest, which is
 * told so; the tunnel protects the bytes on the way. Segmentation offloads are not offered.
 */
#include "switch.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_net.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { RECEIVE = 0, TRANSMIT = 1 };

#define FRAMES_PER_TURN 64
#define IMPAIRED_PER_TURN 256
#define BACKLOG_BOUND ((size_t)1 << 20)
#define VLAN_TAG 4
#define FEATURE(bit) (UINT64_C(1) << (bit))
#define FEATURES                                                                                                       \
	(FEATURE(VIRTIO_NET_F_CSUM) | FEATURE(VIRTIO_NET_F_GUEST_CSUM) | FEATURE(VIRTIO_NET_F_MTU) |                   \
		FEATURE(VIRTIO_NET_F_MAC))

/* Before virtio 1.0 the header lacks its last field, unless buffers are mergeable, which is not offered. */
static size_t header_size(const struct switch_port *port)
{
	return vhost_user_features(port->device) & FEATURE(VIRTIO_F_VERSION_1)
		       ? sizeof(struct virtio_net_hdr_v1)
		       : offsetof(struct virtio_net_hdr_v1, num_buffers);
}

static void mark_dirty(struct switch_port *port)
{
	if (port->dirty)
		return;
	port->dirty = true;
	port->next_dirty = port->sw->dirty;
	port->sw->dirty = port;
}

void port_publish(struct switch_port *port)
{
	struct virtqueue *queue = vhost_user_queue(port->device, RECEIVE);

	port->dirty = false;
	if (queue->running)
		virtqueue_publish(queue);
}

/* True when the frame is dealt with, false when the guest offers no buffer now. */
static bool put_frame(struct switch_port *port, struct frame *frame)
{
	struct virtqueue *queue = vhost_user_queue(port->device, RECEIVE);
	struct iovec iov[VIRTQUEUE_MAX_IOV];
	struct virtqueue_chain chain;
	struct virtio_net_hdr_v1 header = {.num_buffers = htole16(1)};
	size_t before = header_size(port);

	if (!queue->running || queue->broken || virtqueue_pop(queue, &chain, iov, VIRTQUEUE_MAX_IOV) <= 0)
		return false;
	if (chain.writable_bytes < before + frame->length) {
		virtqueue_unpop(queue, 1);
		port->counters.rx_dropped++;
		return true;
	}
	if (!(vhost_user_features(port->device) & FEATURE(VIRTIO_NET_F_GUEST_CSUM)))
		frame_finish_checksum(frame);
	if (frame->meta.flags & META_NEEDS_CHECKSUM) {
		header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		header.csum_start = htole16(frame->meta.csum_start);
		header.csum_offset = htole16(frame->meta.csum_offset);
	}
	iov_write(chain.iov + chain.readable, chain.writable, 0, &header, before);
	iov_write(chain.iov + chain.readable, chain.writable, before, frame->data, frame->length);
	virtqueue_push(queue, chain.head, (uint32_t)(before + frame->length));
	mark_dirty(port);
	port->counters.rx_frames++;
	port->counters.rx_bytes += frame->length;
	return true;
}

static void ask_for_kicks(struct switch_port *port)
{
	struct virtqueue *queue = vhost_user_queue(port->device, RECEIVE);

	if (queue->running && virtqueue_want_kicks(queue))
		vhost_user_again(port->device, RECEIVE);
}

void port_deliver(struct switch_port *port, struct frame *frame)
{
	bool patient = port->generous || port->state == PORT_INCOMING || port->handover.expecting;
	size_t bound = patient ? HANDOVER_BOUND : BACKLOG_BOUND;
	struct frame_item *item = NULL;

	if (!port->backlog.head && put_frame(port, frame))
		return;
	if ((patient || vhost_user_connected(port->device)) && port->backlog.bytes + frame->length <= bound)
		item = frame_item_new(frame);
	if (!item) {
		port->counters.rx_dropped++;
		return;
	}
	frame_queue_push(&port->backlog, item);
	if (port->backlog.head == item)
		ask_for_kicks(port);
}

static void receive_queue_ready(struct switch_port *port)
{
	virtqueue_no_kicks(vhost_user_queue(port->device, RECEIVE));
	while (port->backlog.head && put_frame(port, &port->backlog.head->frame))
		free(frame_queue_pop(&port->backlog));
	if (port->backlog.head)
		ask_for_kicks(port);
	else
		port->generous = false;
}

/* What the guest says of a checksum; finished here when the tunnel's meta has no room for it. */
static bool take_checksum(struct frame *frame, const struct virtio_net_hdr_v1 *header)
{
	size_t start = le16toh(header->csum_start), offset = le16toh(header->csum_offset);

	if (!(header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
		return true;
	if (start + offset + 2 > frame->length)
		return false;
	if (start > UINT8_MAX || offset > UINT8_MAX) {
		frame_checksum_at(frame, start, start + offset);
		return true;
	}
	frame->meta.flags = META_NEEDS_CHECKSUM;
	frame->meta.csum_start = (uint8_t)start;
	frame->meta.csum_offset = (uint8_t)offset;
	return true;
}

/* One chain of the transmit queue, copied before it is looked at: the guest may write to it meanwhile. */
static void take_frame(struct switch_port *port, const struct virtqueue_chain *chain, uint64_t now_ns)
{
	struct virtio_net_hdr_v1 header = {0};
	struct frame frame = {.data = port->sw->scratch + FRAME_HEADROOM};
	size_t before = header_size(port);

	if (chain->readable_bytes < before + FRAME_MIN ||
		chain->readable_bytes - before > (size_t)port->mtu + FRAME_MIN + VLAN_TAG) {
		port->counters.tx_malformed++;
		return;
	}
	frame.length = (uint32_t)(chain->readable_bytes - before);
	iov_read(chain->iov, chain->readable, 0, &header, before);
	iov_read(chain->iov, chain->readable, before, frame.data, frame.length);
	if (header.gso_type != VIRTIO_NET_HDR_GSO_NONE || !take_checksum(&frame, &header)) {
		port->counters.tx_malformed++;
		return;
	}
	forward_from_port(port, &frame, now_ns);
}

static void transmit_queue_ready(struct switch_port *port)
{
	struct virtqueue *queue = vhost_user_queue(port->device, TRANSMIT);
	struct iovec iov[VIRTQUEUE_MAX_IOV];
	struct virtqueue_chain chain;
	uint64_t now = loop_now();
	int turns = FRAMES_PER_TURN;

	virtqueue_no_kicks(queue);
	while (turns-- > 0 && virtqueue_pop(queue, &chain, iov, VIRTQUEUE_MAX_IOV) > 0) {
		take_frame(port, &chain, now);
		virtqueue_push(queue, chain.head, 0);
	}
	virtqueue_publish(queue);
	if (virtqueue_want_kicks(queue))
		vhost_user_again(port->device, TRANSMIT);
}

static void kick(void *context, unsigned index)
{
	struct switch_port *port = context;

	if (index == RECEIVE)
		receive_queue_ready(port);
	else
		transmit_queue_ready(port);
	switch_flush(port->sw);
}

static void connection(void *context, bool connected)
{
	struct switch_port *port = context;

	if (!connected && port->state == PORT_RUNNING && !port->generous && !port->handover.expecting)
		frame_queue_clear(&port->backlog);
}

static void impair_tick(void *context)
{
	struct switch_port *port = context;
	uint64_t now = loop_now();
	struct frame_item *item;

	for (int i = 0; i < IMPAIRED_PER_TURN && (item = impair_due(&port->impair, now)); i++) {
		/* A switch that was stopped must not send afterwards what its guest said long ago. */
		if (forward_expired(port))
			port->counters.tx_fenced++;
		else
			forward_output(port, &item->frame);
		free(item);
	}
	port_impair_arm(port);
	switch_flush(port->sw);
}

void port_impair_arm(struct switch_port *port)
{
	uint64_t next = impair_next(&port->impair);

	if (next == UINT64_MAX)
		loop_timer_cancel(port->sw->loop, &port->impair_timer);
	else if (!port->impair_timer.armed || port->impair_timer.deadline_ns != next)
		loop_timer_set(port->sw->loop, &port->impair_timer, next);
}

static void port_identity(struct switch_port *port, const struct port_setup *setup)
{
	port->handle = setup->handle;
	port->network = setup->network;
	port->mtu = setup->mtu;
	port->epoch = setup->epoch;
	port->state = setup->state;
	port->lease_bound = setup->lease_bound;
	memcpy(port->mac, setup->mac, sizeof(port->mac));
	memcpy(port->config.mac, setup->mac, sizeof(port->config.mac));
	port->config.status = htole16(VIRTIO_NET_S_LINK_UP);
	port->config.queue_pairs = htole16(1);
	port->config.mtu = htole16(setup->mtu);
}

struct switch_port *port_new(struct switch_state *sw, const struct port_setup *setup)
{
	struct switch_port *port = calloc(1, sizeof(*port));
	uint64_t seed;

	if (!port)
		return NULL;
	if (getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
		seed = loop_now();
	port->sw = sw;
	port_identity(port, setup);
	handover_init(port);
	impair_init(&port->impair, seed);
	port->impair_timer = (struct loop_timer){.run = impair_tick, .context = port};
	port->description = (struct vhost_user_device){
		.name = "net",
		.features = FEATURES,
		.queues = 2,
		.config = &port->config,
		.config_size = sizeof(port->config),
		.kick = kick,
		.connection = connection,
	};
	port->device = vhost_user_listen(sw->loop, setup->socket, &port->description, port);
	if (!port->device) {
		int error = errno;

		free(port);
		errno = error;
		return NULL;
	}
	port->next_in_network = port->network->ports;
	port->network->ports = port;
	sw->ports[port->handle] = port;
	return port;
}

void port_free(struct switch_port *port)
{
	struct switch_state *sw = port->sw;
	struct switch_port **at = &port->network->ports;

	while (*at != port)
		at = &(*at)->next_in_network;
	*at = port->next_in_network;
	for (at = &sw->dirty; *at; at = &(*at)->next_dirty)
		if (*at == port) {
			*at = port->next_dirty;
			break;
		}
	sw->ports[port->handle] = NULL;
	vhost_user_free(port->device);
	loop_timer_cancel(sw->loop, &port->impair_timer);
	impair_free(&port->impair);
	handover_free(port);
	frame_queue_clear(&port->backlog);
	free(port);
}
