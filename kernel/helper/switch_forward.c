/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where a frame goes. Frames from other hosts are never sent on to a third one, so networks have no loops: every switch
 * reaches every other one of a network directly.
 */
#include "switch.h"

#include <time.h>

static uint64_t boottime_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return (uint64_t)now.tv_sec * LOOP_SECOND + (uint64_t)now.tv_nsec;
}

bool forward_expired(const struct switch_port *port)
{
	const struct switch_state *sw = port->sw;

	return port->lease_bound && sw->lease_deadline_ns && boottime_ns() >= sw->lease_deadline_ns;
}

/* Whether nothing of this guest may leave: its right to run has ended, or it runs elsewhere. */
static bool fenced(const struct switch_port *port)
{
	return port->state == PORT_GONE || forward_expired(port);
}

static void to_ports(
	const struct switch_network *network, const struct switch_port *except, uint64_t sender, struct frame *frame)
{
	for (struct switch_port *port = network->ports; port; port = port->next_in_network)
		if (port != except)
			handover_input(port, sender, frame);
}

static void to_peer(struct switch_state *sw, uint32_t handle, uint32_t network, const struct frame *frame)
{
	struct tunnel_peer *peer = tunnel_find(sw->tunnel, handle);
	uint8_t *plain = frame->data - TUNNEL_META;

	if (!peer)
		return;
	tunnel_meta_put(plain, frame->meta);
	tunnel_send(sw->tunnel, peer, TUNNEL_DATA, network, plain, TUNNEL_META + frame->length);
}

static void flood(struct switch_port *port, struct frame *frame)
{
	const struct switch_network *network = port->network;

	frame->meta.flags |= META_FLOODED;
	for (size_t i = 0; i < network->peer_count; i++)
		to_peer(port->sw, network->peers[i], network->id, frame);
	to_ports(network, port, port->sw->identity, frame);
}

void forward_output(struct switch_port *port, struct frame *frame)
{
	struct switch_state *sw = port->sw;
	const uint8_t *to = frame_destination(frame);
	const struct table_entry *entry = mac_is_group(to) ? NULL : table_find(&sw->table, port->network->id, to);

	if (!entry)
		flood(port, frame);
	else if (entry->peer)
		to_peer(sw, entry->peer, port->network->id, frame);
	else if (!entry->port)
		sw->strays++;
	else if (entry->port != port)
		handover_input(entry->port, sw->identity, frame);
}

static bool source_is_right(struct switch_port *port, const struct frame *frame, uint64_t now_ns)
{
	struct switch_state *sw = port->sw;
	const uint8_t *source = frame_source(frame);
	struct table_entry *entry;

	if (mac_is_group(source))
		return false;
	entry = table_find(&sw->table, port->network->id, source);
	if (entry && entry->told)
		return entry->peer == 0 && entry->port == port;
	table_learn(&sw->table, entry, port->network->id, source, 0, port, now_ns);
	return true;
}

void forward_from_port(struct switch_port *port, struct frame *frame, uint64_t now_ns)
{
	if (fenced(port)) {
		port->counters.tx_fenced++;
		return;
	}
	if (!frame_valid(frame)) {
		port->counters.tx_malformed++;
		return;
	}
	if (port->state == PORT_INCOMING)
		move_announce(port); /* a guest that sends runs */
	if (!source_is_right(port, frame, now_ns)) {
		port->counters.spoofed++;
		return;
	}
	port->counters.tx_frames++;
	port->counters.tx_bytes += frame->length;
	if (!impair_active(&port->impair)) {
		forward_output(port, frame);
		return;
	}
	impair_offer(&port->impair, frame, now_ns);
	port_impair_arm(port);
}

static bool peer_source_is_right(
	struct switch_state *sw, const struct tunnel_peer *peer, uint32_t network, const struct frame *frame)
{
	const uint8_t *source = frame_source(frame);
	struct table_entry *entry;

	if (mac_is_group(source))
		return false;
	entry = table_find(&sw->table, network, source);
	if (!entry || !entry->told) {
		table_learn(&sw->table, entry, network, source, peer->handle, NULL, loop_now());
		return true;
	}
	if (entry->peer == peer->handle)
		return true;
	if (entry->next_epoch && entry->next_peer == peer->handle) {
		move_entry(sw, entry, peer->handle, entry->next_epoch);
		return true;
	}
	return entry->previous_peer == peer->handle && loop_now() < entry->previous_until_ns;
}

static void data_from_peer(
	struct switch_state *sw, struct tunnel_peer *peer, const struct switch_network *network, struct frame *frame)
{
	const uint8_t *to = frame_destination(frame);
	const struct table_entry *entry;

	if (!peer_source_is_right(sw, peer, network->id, frame)) {
		peer->spoofed++;
		return;
	}
	entry = mac_is_group(to) ? NULL : table_find(&sw->table, network->id, to);
	if (!entry)
		to_ports(network, NULL, peer->identity, frame);
	else if (entry->port)
		handover_input(entry->port, peer->identity, frame);
	else if (!(frame->meta.flags & META_FLOODED))
		sw->strays++; /* that peer's table is behind: the guest is not here any more */
}

static void redirected_from_peer(struct switch_state *sw, struct tunnel_peer *peer,
	const struct switch_network *network, uint8_t *plain, struct frame *frame)
{
	const struct table_entry *entry = table_find(&sw->table, network->id, plain + TUNNEL_META);

	if (entry && entry->port && entry->port->handover.from == peer->handle)
		handover_redirected(entry->port, frame);
	else
		sw->strays++;
}

void forward_from_peer(void *context, struct tunnel_peer *peer, const struct tunnel_message *message)
{
	struct switch_state *sw = context;
	const struct switch_network *network;
	size_t before = TUNNEL_META;
	struct frame frame;

	if (!message) {
		switch_flush(sw);
		return;
	}
	network = switch_network_find(sw, message->network);
	if (!network || !switch_network_has(network, peer->handle)) {
		peer->foreign++;
		return;
	}
	if (message->kind == TUNNEL_MARK && message->length == TUNNEL_META + TUNNEL_MARKER) {
		struct tunnel_marker marker = tunnel_marker_get(message->plain + TUNNEL_META);

		move_marker(sw, peer, network, &marker);
		return;
	}
	if (message->kind == TUNNEL_REDIRECTED)
		before += TUNNEL_TARGET;
	if (message->kind == TUNNEL_MARK || message->length < before) {
		peer->counters.malformed++;
		return;
	}
	frame.meta = tunnel_meta_get(message->plain);
	frame.data = message->plain + before;
	frame.length = (uint32_t)(message->length - before);
	if (!frame_valid(&frame))
		peer->counters.malformed++;
	else if (message->kind == TUNNEL_REDIRECTED)
		redirected_from_peer(sw, peer, network, message->plain, &frame);
	else
		data_from_peer(sw, peer, network, &frame);
}
