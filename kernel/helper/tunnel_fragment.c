/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pieces of messages too long for a path. A guest's MTU never changes while it lives, so when it comes to stand behind
 * a path with a smaller one, its frames are cut *inside* the tunnel: every piece is sealed by itself, and IP never
 * fragments. Reassembly keeps a few messages per peer; a message whose pieces do not all come gives its place to a
 * newer one.
 */
#include "tunnel_internal.h"

#include <stdlib.h>

void tunnel_send_fragments(struct tunnel *tunnel, struct tunnel_peer *peer, enum tunnel_kind kind, uint32_t network,
	const uint8_t *plain, size_t length)
{
	size_t room = peer->payload - TUNNEL_HEADER - AEAD_TAG - TUNNEL_FRAGMENT_HEADER;
	size_t count = (length + room - 1) / room, piece = (length + count - 1) / count;
	uint8_t part[TUNNEL_FRAGMENT_HEADER + TUNNEL_PLAIN_MAX];
	uint32_t id = peer->fragment_id++;

	for (size_t i = 0; i < count; i++) {
		size_t at = i * piece, bytes = length - at < piece ? length - at : piece;

		put_be32(part, id);
		part[4] = (uint8_t)i;
		part[5] = (uint8_t)count;
		put_be16(part + 6, (uint16_t)piece);
		memcpy(part + TUNNEL_FRAGMENT_HEADER, plain + at, bytes);
		tunnel_send_packet(
			tunnel, peer, (uint8_t)(kind | TUNNEL_FRAGMENT), network, part, TUNNEL_FRAGMENT_HEADER + bytes);
		peer->counters.fragments_tx++;
	}
}

static void slot_clear(struct tunnel_reassembly *slot)
{
	free(slot->data);
	memset(slot, 0, sizeof(*slot));
}

/* The slot of this message; or an empty or the oldest one, begun for it. NULL without memory. */
static struct tunnel_reassembly *slot_for(struct tunnel_peer *peer, const struct tunnel_reassembly *want)
{
	struct tunnel_reassembly *oldest = NULL;

	if (!peer->reassembly)
		peer->reassembly = calloc(TUNNEL_REASSEMBLIES, sizeof(*peer->reassembly));
	if (!peer->reassembly)
		return NULL;
	for (size_t i = 0; i < TUNNEL_REASSEMBLIES; i++) {
		struct tunnel_reassembly *slot = &peer->reassembly[i];

		if (slot->data && slot->id == want->id)
			return slot;
		if (!oldest || (oldest->data && (!slot->data || slot->begun_ns < oldest->begun_ns)))
			oldest = slot;
	}
	if (oldest->data) {
		peer->counters.reassembly_failed++;
		slot_clear(oldest);
	}
	*oldest = *want;
	oldest->missing = want->count;
	oldest->data = malloc(FRAME_HEADROOM + (size_t)want->count * want->piece);
	return oldest->data ? oldest : NULL;
}

/* Whether the piece's own numbers and length agree. */
static bool piece_valid(const struct tunnel_reassembly *want, unsigned index, size_t bytes)
{
	if (want->count < 2 || index >= want->count || want->piece == 0 || bytes == 0)
		return false;
	if ((size_t)want->count * want->piece > TUNNEL_PLAIN_MAX + 2 * (size_t)UINT8_MAX)
		return false;
	return index + 1 < want->count ? bytes == want->piece : bytes <= want->piece;
}

bool tunnel_reassemble(
	struct tunnel_peer *peer, const struct tunnel_message *piece, uint64_t now_ns, struct tunnel_message *whole)
{
	struct tunnel_reassembly want = {.network = piece->network, .kind = piece->kind, .begun_ns = now_ns};
	struct tunnel_reassembly *slot;
	unsigned index;
	size_t bytes;

	peer->counters.fragments_rx++;
	if (piece->length <= TUNNEL_FRAGMENT_HEADER) {
		peer->counters.malformed++;
		return false;
	}
	bytes = piece->length - TUNNEL_FRAGMENT_HEADER;
	want.id = get_be32(piece->plain);
	index = piece->plain[4];
	want.count = piece->plain[5];
	want.piece = get_be16(piece->plain + 6);
	if (!piece_valid(&want, index, bytes) || !(slot = slot_for(peer, &want))) {
		peer->counters.malformed++;
		return false;
	}
	if (slot->count != want.count || slot->piece != want.piece || slot->network != want.network ||
		slot->kind != want.kind || (slot->seen[index / 64] >> (index % 64) & 1)) {
		peer->counters.malformed++;
		return false;
	}
	slot->seen[index / 64] |= UINT64_C(1) << (index % 64);
	memcpy(slot->data + FRAME_HEADROOM + (size_t)index * slot->piece, piece->plain + TUNNEL_FRAGMENT_HEADER, bytes);
	if (index + 1 == slot->count)
		slot->last_length = bytes;
	if (--slot->missing)
		return false;
	*whole = (struct tunnel_message){slot->kind, slot->network, slot->data + FRAME_HEADROOM,
		(size_t)(slot->count - 1) * slot->piece + slot->last_length};
	slot->data = NULL; /* belongs to `whole` now */
	slot_clear(slot);
	return true;
}

void tunnel_reassembly_release(struct tunnel_message *whole)
{
	free(whole->plain - FRAME_HEADROOM);
}

void tunnel_reassembly_free(struct tunnel_peer *peer)
{
	for (size_t i = 0; peer->reassembly && i < TUNNEL_REASSEMBLIES; i++)
		slot_clear(&peer->reassembly[i]);
	free(peer->reassembly);
	peer->reassembly = NULL;
}
