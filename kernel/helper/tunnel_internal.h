/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_TUNNEL_INTERNAL_H
#define MOBI_TUNNEL_INTERNAL_H

/* Shared by tunnel.c (peers, keys, socket), tunnel_send.c, tunnel_receive.c and tunnel_fragment.c. */
#include "replay.h"
#include "tunnel.h"

#include <sys/uio.h>

enum {
	TUNNEL_DATAGRAM = 65536,
	TUNNEL_BATCH = 65000,     /* bytes in one UDP_SEGMENT message */
	TUNNEL_SEGMENTS = 64,     /* packets in it; the kernel's own limit */
	TUNNEL_RECEIVES = 16,     /* messages per recvmmsg */
	TUNNEL_PENDING = 1 << 20, /* bytes per peer that may wait for a full socket */
	TUNNEL_MTU_MIN = 576,
	TUNNEL_MTU_MAX = 65535,
	TUNNEL_INDEX = 8192, /* slots; a power of two, at least twice the keys */
};

struct tunnel_receive_key {
	uint32_t id;
	bool used;
	uint64_t expires_ns; /* 0 = not yet */
	struct aead *open;
	struct replay replay;
};

struct tunnel_index_slot {
	struct tunnel_receive_key *key; /* NULL = free */
	struct tunnel_peer *peer;
};

/* A message that the socket did not take. */
struct tunnel_pending {
	struct tunnel_pending *next;
	size_t length, segment;
	uint8_t data[];
};

struct tunnel_batch {
	size_t used, segment; /* bytes; size of each packet but the last */
	unsigned packets;
	bool closed;     /* the last one was shorter: none may follow */
	bool no_offload; /* the path's device cannot do UDP_SEGMENT */
	struct tunnel_pending *pending, **pending_tail;
	size_t pending_bytes;
	uint8_t data[TUNNEL_BATCH];
};

struct tunnel_reassembly {
	uint8_t *data; /* FRAME_HEADROOM, then count × piece bytes; NULL = free */
	uint32_t id, network;
	enum tunnel_kind kind;
	unsigned count, missing;
	uint16_t piece;
	size_t last_length;
	uint64_t begun_ns;
	uint64_t seen[4]; /* a bit per piece */
};

struct tunnel {
	struct loop *loop;
	tunnel_receiver receiver;
	void *context;
	int fd;
	int family;
	int port;
	struct tunnel_peer *peers[TUNNEL_PEERS];
	struct tunnel_peer *dirty;
	uint64_t counter_floor; /* a peer removed and set again goes on from here: no counter repeats */
	uint64_t strangers;
	struct loop_timer expiry;
	struct tunnel_index_slot index[TUNNEL_INDEX];
	struct mmsghdr messages[TUNNEL_RECEIVES];
	struct iovec vectors[TUNNEL_RECEIVES];
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} controls[TUNNEL_RECEIVES];
	uint8_t *datagrams; /* TUNNEL_RECEIVES × TUNNEL_DATAGRAM */
	uint8_t plain[FRAME_HEADROOM + TUNNEL_DATAGRAM];
};

/* The slot of the receive key with this id, or the free one where it would be. */
struct tunnel_index_slot *tunnel_index_slot(struct tunnel *tunnel, uint32_t id);
/* The first packet under this key came: older ones of the peer are not needed for long any more. */
void tunnel_first_use(struct tunnel *tunnel, struct tunnel_peer *peer, struct tunnel_receive_key *key);

void tunnel_readable(void *context, int fd, uint32_t events);
void tunnel_send_pending(struct tunnel *tunnel);
void tunnel_set_mtu(struct tunnel *tunnel, struct tunnel_peer *peer, uint32_t mtu);

/* Sends in pieces what is longer than the path takes. */
void tunnel_send_fragments(struct tunnel *tunnel, struct tunnel_peer *peer, enum tunnel_kind kind, uint32_t network,
	const uint8_t *plain, size_t length);
void tunnel_send_packet(struct tunnel *tunnel, struct tunnel_peer *peer, uint8_t type, uint32_t network,
	const uint8_t *plain, size_t length);

/*
 * Takes one piece. True when it completes a message: `whole` is filled, and its bytes live until
 * tunnel_reassembly_release().
 */
bool tunnel_reassemble(
	struct tunnel_peer *peer, const struct tunnel_message *piece, uint64_t now_ns, struct tunnel_message *whole);
void tunnel_reassembly_release(struct tunnel_message *whole);
void tunnel_reassembly_free(struct tunnel_peer *peer);

#endif
