/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Receiving. Anybody can send to the socket, so a packet first has to name a key, then have a counter that was not seen
 * yet, then open; only then is a byte of it believed, and only then does the replay window move.
 */
#include "tunnel_internal.h"

#include <netinet/udp.h>
#include <sys/epoll.h>

static void deliver(struct tunnel *tunnel, struct tunnel_peer *peer, bool fragment, struct tunnel_message *message)
{
	struct tunnel_message whole;

	if (!fragment) {
		tunnel->receiver(tunnel->context, peer, message);
	} else if (tunnel_reassemble(peer, message, loop_now(), &whole)) {
		tunnel->receiver(tunnel->context, peer, &whole);
		tunnel_reassembly_release(&whole);
	}
}

/* One packet, all of it untrusted until aead_open() says otherwise. */
static void receive_packet(struct tunnel *tunnel, const uint8_t *packet, size_t length)
{
	struct tunnel_header header;
	const struct tunnel_index_slot *slot;
	struct tunnel_peer *peer;
	struct tunnel_message message;
	uint8_t nonce[AEAD_NONCE];

	if (length < TUNNEL_HEADER + TUNNEL_META + AEAD_TAG) {
		tunnel->strangers++;
		return;
	}
	header = tunnel_header_get(packet);
	slot = tunnel_index_slot(tunnel, header.key_id);
	if (!slot->key) {
		tunnel->strangers++;
		return;
	}
	peer = slot->peer;
	if (!replay_fresh(&slot->key->replay, header.counter)) {
		peer->counters.replayed++;
		return;
	}
	tunnel_nonce(nonce, header.counter);
	message.plain = tunnel->plain + FRAME_HEADROOM;
	message.length = length - TUNNEL_HEADER - AEAD_TAG;
	if (!aead_open(slot->key->open, nonce, packet, TUNNEL_HEADER, packet + TUNNEL_HEADER, length - TUNNEL_HEADER,
		    message.plain)) {
		peer->counters.bad_auth++;
		return;
	}
	replay_commit(&slot->key->replay, header.counter);
	if (!slot->key->used)
		tunnel_first_use(tunnel, peer, slot->key);
	peer->counters.rx_packets++;
	peer->counters.rx_bytes += length;
	message.kind = header.type & TUNNEL_KIND_MASK;
	message.network = header.network;
	if ((header.type & TUNNEL_RESERVED) || message.kind >= TUNNEL_PROBE) {
		peer->counters.malformed++;
		return;
	}
	deliver(tunnel, peer, header.type & TUNNEL_FRAGMENT, &message);
}

/* How long each of the packets in a message joined by UDP_GRO is; the last may be shorter. */
static size_t segment_size(struct msghdr *header, size_t length)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c))
		if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO) {
			int size;

			memcpy(&size, CMSG_DATA(c), sizeof(size));
			if (size > 0)
				return (size_t)size;
		}
	return length;
}

static int receive_batch(struct tunnel *tunnel)
{
	int count;

	for (size_t i = 0; i < TUNNEL_RECEIVES; i++) {
		tunnel->vectors[i] = (struct iovec){tunnel->datagrams + i * TUNNEL_DATAGRAM, TUNNEL_DATAGRAM};
		tunnel->messages[i].msg_hdr = (struct msghdr){
			.msg_iov = &tunnel->vectors[i],
			.msg_iovlen = 1,
			.msg_control = tunnel->controls[i].bytes,
			.msg_controllen = sizeof(tunnel->controls[i].bytes),
		};
	}
	count = recvmmsg(tunnel->fd, tunnel->messages, TUNNEL_RECEIVES, MSG_DONTWAIT, NULL);
	for (int i = 0; i < count; i++) {
		size_t length = tunnel->messages[i].msg_len, at = 0;
		size_t segment = segment_size(&tunnel->messages[i].msg_hdr, length);
		const uint8_t *data = tunnel->vectors[i].iov_base;

		for (; at < length; at += segment)
			receive_packet(tunnel, data + at, length - at < segment ? length - at : segment);
		if (length == 0)
			tunnel->strangers++;
	}
	return count;
}

void tunnel_readable(void *context, int fd, uint32_t events)
{
	struct tunnel *tunnel = context;

	(void)fd;
	if (events & EPOLLOUT)
		tunnel_send_pending(tunnel);
	/* A few batches, then the guests' turn; the loop comes back while the socket is readable. */
	for (int i = 0; i < 4; i++)
		if (receive_batch(tunnel) < TUNNEL_RECEIVES)
			break;
	tunnel->receiver(tunnel->context, NULL, NULL);
	tunnel_flush(tunnel);
}
