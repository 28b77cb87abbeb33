/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_TUNNEL_PACKET_H
#define MOBI_TUNNEL_PACKET_H

#include "aead.h"
#include "frame.h"

#include <endian.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/*
 * The layout of a tunnel packet, which is the payload of one UDP datagram. All numbers are big-endian.
 *
 *	 0       1              4           8                16
 *	+-------+--------------+-----------+----------------+------------------------------------+--------+
 *	| type  | network (24) | key id    | counter (64)   | ciphertext of [meta 4 | frame …]   | tag 16 |
 *	+-------+--------------+-----------+----------------+------------------------------------+--------+
 *
 * The first 16 bytes are associated data. The key id is the receiver's name for its key. The nonce is "TUN\0" and the
 * counter, which the sender never repeats with a key.
 *
 * What is in the ciphertext after the meta depends on the kind: of data an Ethernet frame; of redirected the MAC of
 * the guest it is for, then the frame; of a marker a struct tunnel_marker. With the fragment bit the ciphertext is
 * [id 4 | index 1 | count 1 | piece 2 | bytes] instead, a piece of the [meta | …] above: all pieces have `piece` bytes,
 * only the last may be shorter.
 */
enum {
	TUNNEL_HEADER = 16,
	TUNNEL_META = 4,
	TUNNEL_TARGET = 6,
	TUNNEL_MARKER = 24,
	TUNNEL_FRAGMENT_HEADER = 8,
	TUNNEL_PLAIN_MAX = 65000, /* meta and what follows it, fragmented or not */
};

enum tunnel_kind {
	TUNNEL_DATA = 0,
	TUNNEL_REDIRECTED = 1,
	TUNNEL_MARK = 2,
	TUNNEL_PROBE = 3, /* not yet sent; dropped */
};

enum {
	TUNNEL_KIND_MASK = 0x07,
	TUNNEL_CONTINUES = 0x08, /* belongs to the super-frame of counter - 1: a hint, every packet is a whole frame */
	TUNNEL_FRAGMENT = 0x10,
	TUNNEL_COLOUR = 0x20,
	TUNNEL_RESERVED = 0xc0,
};

struct tunnel_header {
	uint8_t type;
	uint32_t network, key_id;
	uint64_t counter;
};

static inline void put_be16(uint8_t *at, uint16_t value)
{
	value = htobe16(value);
	memcpy(at, &value, sizeof(value));
}

static inline void put_be32(uint8_t *at, uint32_t value)
{
	value = htobe32(value);
	memcpy(at, &value, sizeof(value));
}

static inline void put_be64(uint8_t *at, uint64_t value)
{
	value = htobe64(value);
	memcpy(at, &value, sizeof(value));
}

static inline uint16_t get_be16(const uint8_t *at)
{
	uint16_t value;

	memcpy(&value, at, sizeof(value));
	return be16toh(value);
}

static inline uint32_t get_be32(const uint8_t *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof(value));
	return be32toh(value);
}

static inline uint64_t get_be64(const uint8_t *at)
{
	uint64_t value;

	memcpy(&value, at, sizeof(value));
	return be64toh(value);
}

static inline void tunnel_header_put(uint8_t *at, const struct tunnel_header *header)
{
	put_be32(at, (uint32_t)header->type << 24 | (header->network & 0xffffff));
	put_be32(at + 4, header->key_id);
	put_be64(at + 8, header->counter);
}

/* `at` has TUNNEL_HEADER bytes. */
static inline struct tunnel_header tunnel_header_get(const uint8_t *at)
{
	return (struct tunnel_header){at[0], get_be32(at) & 0xffffff, get_be32(at + 4), get_be64(at + 8)};
}

static inline void tunnel_nonce(uint8_t nonce[AEAD_NONCE], uint64_t counter)
{
	memcpy(nonce, "TUN", 4);
	put_be64(nonce + 4, counter);
}

static inline void tunnel_meta_put(uint8_t *at, struct frame_meta meta)
{
	at[0] = meta.flags;
	at[1] = meta.header_length;
	at[2] = meta.csum_start;
	at[3] = meta.csum_offset;
}

static inline struct frame_meta tunnel_meta_get(const uint8_t *at)
{
	return (struct frame_meta){at[0], at[1], at[2], at[3]};
}

/*
 * What the switches tell one another about a guest that moves; handover.c explains when.
 * Layout: [what 1 | 0 | mac 6 | epoch 8 | sender 8].
 */
enum tunnel_marker_kind {
	MARKER_ANNOUNCE = 1,  /* new place to all: the guest runs here now, with this epoch */
	MARKER_OLD_PATH = 2,  /* sender to the old place: nothing of mine for this guest comes after this */
	MARKER_NEW_PATH = 3,  /* sender to the new place: from here on I send this guest's frames to you */
	MARKER_FORWARDED = 4, /* old place to the new one: all that came before `sender`'s marker is sent */
};

struct tunnel_marker {
	uint8_t what;
	uint8_t mac[6];
	uint64_t epoch;
	uint64_t sender; /* identity of the peer whose frames it divides */
};

static inline void tunnel_marker_put(uint8_t *at, const struct tunnel_marker *marker)
{
	at[0] = marker->what;
	at[1] = 0;
	memcpy(at + 2, marker->mac, 6);
	put_be64(at + 8, marker->epoch);
	put_be64(at + 16, marker->sender);
}

/* `at` has TUNNEL_MARKER bytes. */
static inline struct tunnel_marker tunnel_marker_get(const uint8_t *at)
{
	struct tunnel_marker marker = {.what = at[0], .epoch = get_be64(at + 8), .sender = get_be64(at + 16)};

	memcpy(marker.mac, at + 2, 6);
	return marker;
}

#endif
