/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_TUNNEL_H
#define MOBI_TUNNEL_H

#include "loop.h"
#include "tunnel_packet.h"

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

/*
 * Sealed tunnels to other peers' switches over one UDP socket. A packet says by key id which peer and key it belongs
 * to; nothing else about it is believed before it was opened. Each direction has keys of its own, made by the receiver.
 *
 * Sending gathers packets of equal size in one buffer per peer, which leaves as one UDP_SEGMENT message; call
 * tunnel_flush() at the end of every batch of work. Receiving takes up to 16 messages, each up to 64 KiB of packets of
 * equal size (UDP_GRO), in one call.
 */
enum { TUNNEL_PEERS = 1024, TUNNEL_RECEIVE_KEYS = 4, TUNNEL_REASSEMBLIES = 8 };

struct tunnel;
struct tunnel_batch;
struct tunnel_receive_key;
struct tunnel_reassembly;

struct tunnel_counters {
	uint64_t rx_packets, rx_bytes, tx_packets, tx_bytes; /* UDP payloads of authentic packets */
	uint64_t bad_auth, replayed, malformed;              /* refused, by reason */
	uint64_t tx_dropped, tx_errors;                      /* packets not sent: no key or queue full; socket error */
	uint64_t fragments_rx, fragments_tx, reassembly_failed;
};

/* One other peer. What the fields after `context` mean is tunnel.c's and tunnel_*.c's business. */
struct tunnel_peer {
	uint32_t handle;
	uint64_t identity;
	uint64_t rtt_us; /* 0 = not known */
	uint32_t mtu;    /* of the path, IP header included */
	struct tunnel_counters counters;
	uint64_t spoofed, foreign; /* counted by the switch: wrong source address; network it is not in */

	struct sockaddr_in6 address; /* or a struct sockaddr_in */
	socklen_t address_length;
	size_t payload; /* most bytes of a UDP payload on this path */
	struct aead *seal;
	uint8_t seal_key[AEAD_KEY];
	uint32_t seal_key_id;
	uint64_t counter; /* of the next packet */
	uint32_t fragment_id;
	struct tunnel_receive_key *receive[TUNNEL_RECEIVE_KEYS]; /* newest first */
	struct tunnel_reassembly *reassembly;                    /* of TUNNEL_REASSEMBLIES, or NULL */
	struct tunnel_batch *batch;
	struct tunnel_peer *next_dirty;
	bool dirty;
};

/* One authentic message: `plain` is [meta | …] as in tunnel_packet.h, writable, with FRAME_HEADROOM in front. */
struct tunnel_message {
	enum tunnel_kind kind;
	uint32_t network;
	uint8_t *plain;
	size_t length;
};

/* Called for each message; at the end of a batch with message NULL (and peer NULL). */
typedef void (*tunnel_receiver)(void *context, struct tunnel_peer *peer, const struct tunnel_message *message);

struct tunnel *tunnel_new(struct loop *loop, tunnel_receiver receiver, void *context); /* NULL and errno */
void tunnel_free(struct tunnel *tunnel);

/* Binds the socket; again = another address. Returns the port, or -1 and errno. */
int tunnel_listen(struct tunnel *tunnel, const char *address, uint16_t port);

int tunnel_port(const struct tunnel *tunnel); /* 0 = not listening */

struct tunnel_peer *tunnel_find(struct tunnel *tunnel, uint32_t handle);

struct tunnel_destination {
	uint32_t handle;
	uint64_t identity;
	const char *address;
	uint16_t port;
	uint32_t mtu;
	uint32_t key_id;
	const uint8_t *key; /* AEAD_KEY bytes */
};

/*
 * Where to send and how to seal; makes the peer if it is new. Returns 0, or -1 and errno: EINVAL address, ERANGE
 * handle, ENOTCONN not listening, EAFNOSUPPORT family of the address, ENOMEM.
 */
int tunnel_peer_set(struct tunnel *tunnel, const struct tunnel_destination *to);

/*
 * A key given to that peer. Older ones end 60 s later, or 2 s after the new one was used first. Makes the peer if it
 * is new. Returns 0, or -1 and errno: ERANGE handle, EEXIST another key has this id, ENOMEM.
 */
int tunnel_receive_key(
	struct tunnel *tunnel, uint32_t handle, uint64_t identity, uint32_t key_id, const uint8_t key[AEAD_KEY]);

bool tunnel_peer_remove(struct tunnel *tunnel, uint32_t handle); /* false: none there */

/* `plain` is [meta | …] of at most TUNNEL_PLAIN_MAX bytes. What cannot be sent is counted. */
void tunnel_send(struct tunnel *tunnel, struct tunnel_peer *peer, enum tunnel_kind kind, uint32_t network,
	const uint8_t *plain, size_t length);
void tunnel_flush(struct tunnel *tunnel);

/* Packets that no key fits: garbage, forged, too short, or of a key that has ended. */
uint64_t tunnel_strangers(const struct tunnel *tunnel);

#endif
