/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a switch learns that a guest has moved, and what it says about it. There are three ways to learn, and the first
 * one counts: the new place announces the guest, the guest's first frame comes from the new place, or mobid tells the
 * new entry. The first two are believed only while mobid has said that a handover to that peer is open. The order of
 * frames around it is in handover.h.
 */
#include "switch.h"

#include <string.h>

void move_send_marker(
	struct switch_state *sw, struct tunnel_peer *peer, uint32_t network, const struct tunnel_marker *marker)
{
	uint8_t plain[TUNNEL_META + TUNNEL_MARKER] = {0};

	tunnel_marker_put(plain + TUNNEL_META, marker);
	for (int copy = 0; copy < 2; copy++)
		tunnel_send(sw->tunnel, peer, TUNNEL_MARK, network, plain, sizeof(plain));
}

static void mark_old_path(
	struct switch_state *sw, const struct table_entry *entry, uint32_t old, struct tunnel_marker *marker)
{
	struct tunnel_peer *peer = tunnel_find(sw->tunnel, old);

	marker->what = MARKER_OLD_PATH;
	if (old == 0 && entry->port)
		handover_old_path(entry->port, sw->identity, marker->epoch);
	else if (peer)
		move_send_marker(sw, peer, entry->network, marker);
}

static void mark_new_path(struct switch_state *sw, const struct table_entry *entry, struct tunnel_marker *marker)
{
	struct tunnel_peer *peer = tunnel_find(sw->tunnel, entry->peer);

	marker->what = MARKER_NEW_PATH;
	if (entry->peer == 0 && entry->port)
		handover_new_path(entry->port, sw->identity);
	else if (peer)
		move_send_marker(sw, peer, entry->network, marker);
}

static void shift(struct switch_state *sw, struct table_entry *entry, uint32_t peer, uint64_t epoch, bool handover)
{
	struct tunnel_marker marker = {.epoch = epoch, .sender = sw->identity};
	uint32_t old = entry->peer;

	memcpy(marker.mac, entry->mac, sizeof(marker.mac));
	entry->peer = peer;
	entry->epoch = epoch;
	entry->next_peer = 0;
	entry->next_epoch = 0;
	if (old == peer)
		return;
	entry->previous_peer = old;
	entry->previous_until_ns = handover ? loop_now() + HANDOVER_SETTLE : 0;
	if (!handover)
		return;
	mark_old_path(sw, entry, old, &marker);
	mark_new_path(sw, entry, &marker);
}

void move_entry(struct switch_state *sw, struct table_entry *entry, uint32_t peer, uint64_t epoch)
{
	/* A larger step is a failover back to the source of a handover. */
	shift(sw, entry, peer, epoch, epoch == entry->epoch + 1);
}

void move_fail_over(struct switch_state *sw, struct table_entry *entry, uint32_t peer, uint64_t epoch)
{
	shift(sw, entry, peer, epoch, false);
}

void move_announce(struct switch_port *port)
{
	struct switch_state *sw = port->sw;
	struct table_entry *entry = table_find(&sw->table, port->network->id, port->mac);
	struct tunnel_marker marker = {.what = MARKER_ANNOUNCE, .epoch = port->epoch, .sender = sw->identity};

	memcpy(marker.mac, port->mac, sizeof(marker.mac));
	port->state = PORT_RUNNING;
	if (entry && entry->epoch < port->epoch) {
		if (entry->peer) {
			move_entry(sw, entry, 0, port->epoch);
		} else { /* no old place is known, so frames of this host have no old path */
			entry->epoch = port->epoch;
			handover_new_path(port, sw->identity);
			handover_forwarded(port, sw->identity);
		}
	}
	handover_announced(port);
	for (size_t i = 0; i < port->network->peer_count; i++) {
		struct tunnel_peer *peer = tunnel_find(sw->tunnel, port->network->peers[i]);

		if (peer)
			move_send_marker(sw, peer, port->network->id, &marker);
	}
}

void move_marker(struct switch_state *sw, struct tunnel_peer *peer, const struct switch_network *network,
	const struct tunnel_marker *marker)
{
	struct table_entry *entry = table_find(&sw->table, network->id, marker->mac);
	struct switch_port *port = entry ? entry->port : NULL;

	if (!entry || !entry->told) {
		sw->strays++;
		return;
	}
	if (marker->what == MARKER_ANNOUNCE) {
		if (entry->next_epoch && entry->next_peer == peer->handle && entry->next_epoch == marker->epoch)
			move_entry(sw, entry, peer->handle, marker->epoch);
		else if (entry->peer != peer->handle)
			sw->strays++;
	} else if (marker->what == MARKER_OLD_PATH && port && marker->epoch > port->epoch) {
		handover_old_path(port, peer->identity, marker->epoch);
	} else if (marker->what == MARKER_NEW_PATH && port && marker->epoch == port->epoch) {
		handover_new_path(port, peer->identity);
	} else if (marker->what == MARKER_FORWARDED && port && marker->epoch == port->epoch &&
		   port->handover.from == peer->handle) {
		handover_forwarded(port, marker->sender);
	} else {
		sw->strays++;
	}
}
