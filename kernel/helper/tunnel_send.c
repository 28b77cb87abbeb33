/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sending: packets are sealed one behind the other into the peer's buffer and leave as one UDP_SEGMENT message, in
 * which all packets have one size and only the last may be shorter. A full socket never blocks the switch: what it does
 * not take waits in a bounded queue per peer, in order, and is dropped (and counted) beyond that.
 */
#include "log.h"
#include "tunnel_internal.h"

#include <errno.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <sys/epoll.h>

static ssize_t send_message(
	const struct tunnel *tunnel, struct tunnel_peer *peer, const uint8_t *data, size_t length, size_t segment)
{
	union {
		char bytes[CMSG_SPACE(sizeof(uint16_t))];
		struct cmsghdr align;
	} control = {0};
	struct iovec vector = {(void *)data, length};
	struct msghdr message = {
		.msg_name = &peer->address, .msg_namelen = peer->address_length, .msg_iov = &vector, .msg_iovlen = 1};

	if (length > segment) {
		uint16_t size = (uint16_t)segment;
		struct cmsghdr *c;

		message.msg_control = control.bytes;
		message.msg_controllen = sizeof(control.bytes);
		c = CMSG_FIRSTHDR(&message);
		c->cmsg_level = SOL_UDP;
		c->cmsg_type = UDP_SEGMENT;
		c->cmsg_len = CMSG_LEN(sizeof(size));
		memcpy(CMSG_DATA(c), &size, sizeof(size));
	}
	return sendmsg(tunnel->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* For devices that cannot split: one system call for all, one message per packet. Returns the packets sent. */
static size_t send_each(
	const struct tunnel *tunnel, struct tunnel_peer *peer, uint8_t *data, size_t length, size_t segment)
{
	struct mmsghdr messages[TUNNEL_SEGMENTS];
	struct iovec vectors[TUNNEL_SEGMENTS];
	unsigned count = 0;
	int sent;

	memset(messages, 0, sizeof(messages));
	for (size_t at = 0; at < length && count < TUNNEL_SEGMENTS; at += segment, count++) {
		vectors[count] = (struct iovec){data + at, length - at < segment ? length - at : segment};
		messages[count].msg_hdr.msg_name = &peer->address;
		messages[count].msg_hdr.msg_namelen = peer->address_length;
		messages[count].msg_hdr.msg_iov = &vectors[count];
		messages[count].msg_hdr.msg_iovlen = 1;
	}
	sent = sendmmsg(tunnel->fd, messages, count, MSG_DONTWAIT | MSG_NOSIGNAL);
	return sent < 0 ? 0 : (size_t)sent;
}

static size_t packets_in(size_t length, size_t segment)
{
	return (length + segment - 1) / segment;
}

/* The path takes less than thought: step down to the next common size. Frames from now on are fragmented for it. */
static void path_is_smaller(struct tunnel *tunnel, struct tunnel_peer *peer)
{
	static const uint32_t plateaus[] = {9000, 1500, 1492, 1480, 1450, 1400, 1280, TUNNEL_MTU_MIN};

	for (size_t i = 0; i < sizeof(plateaus) / sizeof(plateaus[0]); i++)
		if (plateaus[i] < peer->mtu) {
			tunnel_set_mtu(tunnel, peer, plateaus[i]);
			log_info("the path to peer %u takes less: MTU %u from now on", peer->handle, peer->mtu);
			return;
		}
}

static bool cannot_split(int error)
{
	return error == EIO || error == EINVAL || error == EOPNOTSUPP || error == ENOPROTOOPT;
}

/* True when the message is dealt with (sent or lost), false when the socket is full. */
static bool try_send(struct tunnel *tunnel, struct tunnel_peer *peer, uint8_t *data, size_t length, size_t segment)
{
	size_t packets = packets_in(length, segment), sent = 0;

	if (!peer->batch->no_offload || packets == 1) {
		if (send_message(tunnel, peer, data, length, segment) >= 0) {
			sent = packets;
		} else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
			return false;
		} else if (errno == EMSGSIZE) {
			path_is_smaller(tunnel, peer);
		} else if (packets > 1 && cannot_split(errno)) {
			peer->batch->no_offload = true;
		}
	}
	if (!sent && peer->batch->no_offload && packets > 1)
		sent = send_each(tunnel, peer, data, length, segment);
	peer->counters.tx_packets += sent;
	peer->counters.tx_bytes += sent == packets ? length : sent * segment;
	peer->counters.tx_errors += packets - sent;
	return true;
}

static void keep_pending(
	struct tunnel *tunnel, struct tunnel_peer *peer, const uint8_t *data, size_t length, size_t segment)
{
	struct tunnel_batch *batch = peer->batch;
	struct tunnel_pending *pending = NULL;

	if (batch->pending_bytes + length <= TUNNEL_PENDING)
		pending = malloc(sizeof(*pending) + length);
	if (!pending) {
		peer->counters.tx_dropped += packets_in(length, segment);
		return;
	}
	*pending = (struct tunnel_pending){.length = length, .segment = segment};
	memcpy(pending->data, data, length);
	*batch->pending_tail = pending;
	batch->pending_tail = &pending->next;
	batch->pending_bytes += length;
	loop_modify(tunnel->loop, tunnel->fd, EPOLLIN | EPOLLOUT);
}

static void flush_peer(struct tunnel *tunnel, struct tunnel_peer *peer)
{
	struct tunnel_batch *batch = peer->batch;

	if (!batch->packets)
		return;
	if (batch->pending || !try_send(tunnel, peer, batch->data, batch->used, batch->segment))
		keep_pending(tunnel, peer, batch->data, batch->used, batch->segment);
	batch->used = batch->packets = 0;
	batch->closed = false;
}

void tunnel_flush(struct tunnel *tunnel)
{
	while (tunnel->dirty) {
		struct tunnel_peer *peer = tunnel->dirty;

		tunnel->dirty = peer->next_dirty;
		peer->dirty = false;
		flush_peer(tunnel, peer);
	}
}

/* False when the socket is full again. */
static bool send_peer_pending(struct tunnel *tunnel, struct tunnel_peer *peer)
{
	struct tunnel_batch *batch = peer->batch;

	while (batch->pending) {
		struct tunnel_pending *first = batch->pending;

		if (!try_send(tunnel, peer, first->data, first->length, first->segment))
			return false;
		batch->pending = first->next;
		batch->pending_bytes -= first->length;
		free(first);
	}
	batch->pending_tail = &batch->pending;
	return true;
}

void tunnel_send_pending(struct tunnel *tunnel)
{
	for (size_t i = 0; i < TUNNEL_PEERS; i++)
		if (tunnel->peers[i] && !send_peer_pending(tunnel, tunnel->peers[i]))
			return;
	loop_modify(tunnel->loop, tunnel->fd, EPOLLIN);
}

void tunnel_send_packet(struct tunnel *tunnel, struct tunnel_peer *peer, uint8_t type, uint32_t network,
	const uint8_t *plain, size_t length)
{
	struct tunnel_batch *batch = peer->batch;
	size_t size = TUNNEL_HEADER + length + AEAD_TAG;
	struct tunnel_header header = {type, network, peer->seal_key_id, peer->counter};
	uint8_t nonce[AEAD_NONCE], *at;

	if (batch->packets && (batch->closed || size > batch->segment || batch->used + size > TUNNEL_BATCH ||
				      batch->packets == TUNNEL_SEGMENTS))
		flush_peer(tunnel, peer);
	if (!batch->packets)
		batch->segment = size;
	at = batch->data + batch->used;
	tunnel_header_put(at, &header);
	tunnel_nonce(nonce, peer->counter++);
	aead_seal(peer->seal, nonce, at, TUNNEL_HEADER, plain, length, at + TUNNEL_HEADER);
	batch->used += size;
	batch->packets++;
	batch->closed = size < batch->segment;
	if (!peer->dirty) {
		peer->dirty = true;
		peer->next_dirty = tunnel->dirty;
		tunnel->dirty = peer;
	}
}

void tunnel_send(struct tunnel *tunnel, struct tunnel_peer *peer, enum tunnel_kind kind, uint32_t network,
	const uint8_t *plain, size_t length)
{
	if (!peer->seal || tunnel->fd < 0 || length > TUNNEL_PLAIN_MAX) {
		peer->counters.tx_dropped++;
		return;
	}
	if (TUNNEL_HEADER + length + AEAD_TAG <= peer->payload)
		tunnel_send_packet(tunnel, peer, (uint8_t)kind, network, plain, length);
	else
		tunnel_send_fragments(tunnel, peer, kind, network, plain, length);
}
