/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_FUZZ_NET_H
#define MOBI_FUZZ_NET_H

/*
 * A switch with one network, 7: the guests 02:…:01 (running), 02:…:02 (leased, its lease over) and 02:…:03 (expected
 * from peer 1) are here; 02:…:04 is at peer 1 and may go to peer 2. Peers 1 and 2 seal with a key of zeros.
 */
#include "../log.h"
#include "../switch.h"
#include "fuzz.h"

enum { NETWORK = 7 };

static inline struct switch_port *net_port(struct switch_state *sw, uint8_t number, enum port_state state)
{
	char name[8], path[FUZZ_PATH];
	struct port_setup setup = {.handle = number,
		.network = switch_network_find(sw, NETWORK),
		.mac = {2, 0, 0, 0, 0, number},
		.mtu = 1400,
		.epoch = state == PORT_INCOMING ? 2 : 1,
		.state = state,
		.lease_bound = number == 2};
	struct table_entry *entry = table_tell(&sw->table, NETWORK, setup.mac);

	snprintf(name, sizeof(name), "net%u", number);
	setup.socket = fuzz_path(path, name);
	check(entry);
	entry->port = port_new(sw, &setup);
	check(entry->port);
	entry->peer = state == PORT_INCOMING;
	entry->epoch = 1;
	return entry->port;
}

/* Done once: what is large and keeps nothing of an input. */
static inline struct switch_state *net_open(void)
{
	struct switch_state *sw = calloc(1, sizeof(*sw));

	setenv("MOBI_LOG", "error", 1);
	log_open("fuzz");
	check(sw);
	sw->loop = loop_new();
	sw->tunnel = tunnel_new(sw->loop, forward_from_peer, sw);
	sw->networks[NETWORK] = calloc(1, sizeof(*sw->networks[NETWORK]));
	check(sw->loop && sw->tunnel && sw->networks[NETWORK]);
	sw->identity = 100;
	sw->lease_deadline_ns = 1;
	return sw;
}

static inline void net_fill(struct switch_state *sw)
{
	static const uint8_t key[AEAD_KEY], far[6] = {2, 0, 0, 0, 0, 4};
	struct table_entry *entry;

	*sw->networks[NETWORK] = (struct switch_network){.id = NETWORK, .peers = {1, 2}, .peer_count = 2};
	for (uint32_t peer = 1; peer <= 2; peer++)
		check(tunnel_receive_key(sw->tunnel, peer, 100 + peer, 10 + peer, key) == 0);
	net_port(sw, 1, PORT_RUNNING);
	net_port(sw, 2, PORT_RUNNING);
	check(handover_expect(net_port(sw, 3, PORT_INCOMING), 1));
	entry = table_tell(&sw->table, NETWORK, far);
	check(entry);
	entry->peer = 1;
	entry->epoch = 1;
	entry->next_peer = 2;
	entry->next_epoch = 2;
}

static inline void net_empty(struct switch_state *sw)
{
	for (size_t i = 1; i <= 3; i++)
		port_free(sw->ports[i]);
	for (uint8_t number = 1; number <= 4; number++)
		table_remove(&sw->table, table_find(&sw->table, NETWORK, (uint8_t[6]){2, 0, 0, 0, 0, number}));
	if (sw->table.learned)
		table_free(&sw->table); /* looks into every bucket, which takes as long as all the rest */
	check(sw->table.told == 0 && sw->table.learned == 0);
	for (uint32_t peer = 1; peer <= 2; peer++)
		tunnel_peer_remove(sw->tunnel, peer);
	check(!sw->dirty);
}

#endif
