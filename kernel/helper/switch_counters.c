/* SPDX-License-Identifier: Apache-2.0 */
/* What the switch has seen, for mobid and for people. */
#include "switch.h"

#include <assert.h>

static_assert((int)SWITCH_PORTS == (int)TUNNEL_PEERS, "counters walk both with one index");

struct number {
	const char *key;
	uint64_t value;
};

static void pack_numbers(msgpack_packer *packer, const struct number *numbers, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		pack_str(packer, numbers[i].key);
		msgpack_pack_uint64(packer, numbers[i].value);
	}
}

static void pack_mac(msgpack_packer *packer, const uint8_t mac[6])
{
	msgpack_pack_bin(packer, 6);
	msgpack_pack_bin_body(packer, mac, 6);
}

static void pack_port(msgpack_packer *packer, const struct switch_port *port)
{
	static const char *const states[] = {"incoming", "running", "gone"};
	static const char *const outputs[] = {"deliver", "hold", "redirect"};
	const struct port_counters *c = &port->counters;
	const struct handover *h = &port->handover;
	const struct impair *i = &port->impair;
	const struct number numbers[] = {
		{"port", port->handle},
		{"network", port->network->id},
		{"epoch", port->epoch},
		{"rx_frames", c->rx_frames},
		{"rx_bytes", c->rx_bytes},
		{"rx_dropped", c->rx_dropped},
		{"tx_frames", c->tx_frames},
		{"tx_bytes", c->tx_bytes},
		{"tx_malformed", c->tx_malformed},
		{"tx_fenced", c->tx_fenced},
		{"spoofed", c->spoofed},
		{"backlog", port->backlog.frames},
		{"held", h->held_frames},
		{"held_now", h->held.frames},
		{"waiting_bytes", h->waiting_bytes},
		{"lost_held", h->lost_held},
		{"redirected", h->redirected},
		{"redirected_rx", h->received},
		{"markers_missing", h->markers_missing},
		{"impaired_lost", i->lost},
		{"impaired_over_rate", i->over_rate},
		{"impaired_over_limit", i->over_limit},
		{"impaired_reordered", i->reordered},
		{"impaired_duplicated", i->duplicated},
		{"impaired_now", i->count},
	};
	const size_t count = sizeof(numbers) / sizeof(numbers[0]);

	msgpack_pack_map(packer, count + 5);
	pack_numbers(packer, numbers, count);
	pack_str(packer, "mac");
	pack_mac(packer, port->mac);
	pack_str(packer, "state");
	pack_str(packer, states[port->state]);
	pack_str(packer, "output");
	pack_str(packer, outputs[h->output]);
	pack_str(packer, "connected");
	(vhost_user_connected(port->device) ? msgpack_pack_true : msgpack_pack_false)(packer);
	pack_str(packer, "expecting");
	(h->expecting ? msgpack_pack_true : msgpack_pack_false)(packer);
}

static void pack_peer(msgpack_packer *packer, const struct tunnel_peer *peer)
{
	const struct tunnel_counters *c = &peer->counters;
	const struct number numbers[] = {
		{"peer", peer->handle},
		{"identity", peer->identity},
		{"mtu", peer->mtu},
		{"rtt_us", peer->rtt_us},
		{"rx_packets", c->rx_packets},
		{"rx_bytes", c->rx_bytes},
		{"tx_packets", c->tx_packets},
		{"tx_bytes", c->tx_bytes},
		{"tx_dropped", c->tx_dropped},
		{"tx_errors", c->tx_errors},
		{"bad_auth", c->bad_auth},
		{"replayed", c->replayed},
		{"malformed", c->malformed},
		{"fragments_rx", c->fragments_rx},
		{"fragments_tx", c->fragments_tx},
		{"reassembly_failed", c->reassembly_failed},
		{"spoofed", peer->spoofed},
		{"foreign", peer->foreign},
	};
	const size_t count = sizeof(numbers) / sizeof(numbers[0]);

	msgpack_pack_map(packer, count);
	pack_numbers(packer, numbers, count);
}

static void pack_entry(msgpack_packer *packer, const struct table_entry *entry)
{
	const struct number numbers[] = {
		{"network", entry->network}, {"peer", entry->peer}, {"epoch", entry->epoch}, {"told", entry->told}};

	msgpack_pack_map(packer, 5);
	pack_numbers(packer, numbers, 4);
	pack_str(packer, "mac");
	pack_mac(packer, entry->mac);
}

/* A datagram has 64 KiB, so a list is given in pages: `first` is where to begin, `more` says that there is a next. */
enum { PORTS_PER_PAGE = 64, PEERS_PER_PAGE = 64, MACS_PER_PAGE = 256 };

static void put_macs(struct switch_state *sw, struct control_message *reply)
{
	size_t total = sw->table.told + sw->table.learned, count = total < MACS_PER_PAGE ? total : MACS_PER_PAGE;
	msgpack_packer *packer;

	control_put_u64(reply, "macs_total", total);
	packer = control_put(reply, "macs");
	msgpack_pack_array(packer, count);
	for (size_t i = 0; i < TABLE_BUCKETS && count; i++)
		for (const struct table_entry *e = sw->table.buckets[i]; e && count; e = e->next, count--)
			pack_entry(packer, e);
}

void switch_op_counters(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct control_message *reply;
	const struct tunnel_peer *peers[PEERS_PER_PAGE];
	const struct switch_port *ports[PORTS_PER_PAGE];
	size_t peer_count = 0, port_count = 0;
	uint64_t first = 0;
	bool more = false;
	msgpack_packer *packer;

	if (!control_u64_optional(args, "first", 0, SWITCH_PORTS - 1, &first))
		return;
	for (uint32_t i = (uint32_t)first; i < SWITCH_PORTS; i++) { /* as many ports as peers are possible */
		const struct tunnel_peer *peer = tunnel_find(sw->tunnel, i);

		if ((peer && peer_count == PEERS_PER_PAGE) || (sw->ports[i] && port_count == PORTS_PER_PAGE)) {
			more = true;
			first = i;
			break;
		}
		if (peer)
			peers[peer_count++] = peer;
		if (sw->ports[i])
			ports[port_count++] = sw->ports[i];
	}
	reply = control_reply(request);
	packer = control_put(reply, "ports");
	msgpack_pack_array(packer, port_count);
	for (size_t i = 0; i < port_count; i++)
		pack_port(packer, ports[i]);
	packer = control_put(reply, "peers");
	msgpack_pack_array(packer, peer_count);
	for (size_t i = 0; i < peer_count; i++)
		pack_peer(packer, peers[i]);
	if (more)
		control_put_u64(reply, "more", first);
	else
		control_put_nil(reply, "more");
	put_macs(sw, reply);
	control_put_u64(reply, "strangers", tunnel_strangers(sw->tunnel));
	control_put_u64(reply, "strays", sw->strays);
	control_send(reply);
}

void switch_op_status(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct control_message *reply = control_reply(request);
	size_t peers = 0, ports = 0;

	(void)args;
	for (uint32_t i = 0; i < TUNNEL_PEERS; i++)
		peers += tunnel_find(sw->tunnel, i) != NULL;
	for (size_t i = 0; i < SWITCH_PORTS; i++)
		ports += sw->ports[i] != NULL;
	control_put_u64(reply, "port", (uint64_t)tunnel_port(sw->tunnel));
	control_put_u64(reply, "identity", sw->identity);
	control_put_u64(reply, "ports", ports);
	control_put_u64(reply, "peers", peers);
	control_put_u64(reply, "networks", sw->network_count);
	control_put_str(reply, "aead", aead_implementation());
	control_send(reply);
}
