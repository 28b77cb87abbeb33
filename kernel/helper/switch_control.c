/* SPDX-License-Identifier: Apache-2.0 */
/* The operations of the role `switch`: arguments checked, then the other files' functions. */
#include "switch.h"

#include "log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { ADDRESS_MAX = 64, SOCKET_MAX = 107, MTU_MIN = 68, MTU_MAX = 65000 - FRAME_HEADROOM };
#define NETWORK_MAX ((1u << 24) - 1)
#define PPM 1000000u

static bool get_u32(const struct control_args *args, const char *key, uint64_t min, uint64_t max, uint32_t *value)
{
	uint64_t wide = *value;

	if (!control_u64(args, key, min, max, &wide))
		return false;
	*value = (uint32_t)wide;
	return true;
}

static bool get_u32_optional(const struct control_args *args, const char *key, uint64_t max, uint32_t *value)
{
	uint64_t wide = *value;

	if (!control_u64_optional(args, key, 0, max, &wide))
		return false;
	*value = (uint32_t)wide;
	return true;
}

static struct switch_port *get_port(struct switch_state *sw, const struct control_args *args)
{
	uint32_t handle = 0;

	if (!get_u32(args, "port", 0, SWITCH_PORTS - 1, &handle))
		return NULL;
	if (!sw->ports[handle])
		control_error(args->request, CONTROL_NOT_FOUND, "there is no port %u", handle);
	return sw->ports[handle];
}

static struct tunnel_peer *get_peer(struct switch_state *sw, const struct control_args *args, const char *key)
{
	uint32_t handle = 0;
	struct tunnel_peer *peer;

	if (!get_u32(args, key, 1, TUNNEL_PEERS - 1, &handle))
		return NULL;
	peer = tunnel_find(sw->tunnel, handle);
	if (!peer)
		control_error(args->request, CONTROL_NOT_FOUND, "there is no peer %u", handle);
	return peer;
}

static struct switch_network *get_network(struct switch_state *sw, const struct control_args *args)
{
	uint32_t id = 0;
	struct switch_network *network;

	if (!get_u32(args, "network", 0, NETWORK_MAX, &id))
		return NULL;
	network = switch_network_find(sw, id);
	if (!network)
		control_error(args->request, CONTROL_NOT_FOUND, "there is no network %u", id);
	return network;
}

/* ---- tunnels ---- */

static void op_listen(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	const char *address;
	uint64_t port, identity;
	int bound;
	struct control_message *reply;

	if (!control_str(args, "address", ADDRESS_MAX, &address) || !control_u64(args, "port", 0, UINT16_MAX, &port) ||
		!control_u64(args, "identity", 1, UINT64_MAX, &identity))
		return;
	bound = tunnel_listen(sw->tunnel, address, (uint16_t)port);
	if (bound < 0) {
		control_error(request, errno == EINVAL ? CONTROL_BAD_ARGUMENT : CONTROL_IO,
			"cannot listen on %s, UDP port %u: %s", address, (unsigned)port, strerror(errno));
		return;
	}
	sw->identity = identity;
	reply = control_reply(request);
	control_put_u64(reply, "port", (uint64_t)bound);
	control_send(reply);
}

static const char *peer_error(void)
{
	switch (errno) {
	case EINVAL:
	case EAFNOSUPPORT:
		return CONTROL_BAD_ARGUMENT;
	case ENOTCONN:
		return CONTROL_BAD_STATE;
	case EEXIST:
		return CONTROL_EXISTS;
	default:
		return CONTROL_INTERNAL;
	}
}

static void op_peer_set(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct tunnel_destination to = {.mtu = 1500};
	uint8_t key[AEAD_KEY];
	uint64_t port;

	if (!get_u32(args, "peer", 1, TUNNEL_PEERS - 1, &to.handle) ||
		!control_u64(args, "identity", 1, UINT64_MAX, &to.identity) ||
		!control_str(args, "address", ADDRESS_MAX, &to.address) ||
		!control_u64(args, "port", 1, UINT16_MAX, &port) ||
		!get_u32(args, "key_id", 0, UINT32_MAX, &to.key_id) ||
		!get_u32_optional(args, "mtu", UINT16_MAX, &to.mtu) || !control_bytes(args, "key", key, sizeof(key)))
		return;
	to.port = (uint16_t)port;
	to.key = key;
	if (tunnel_peer_set(sw->tunnel, &to))
		control_error(request, peer_error(), "cannot send to %s: %s", to.address,
			errno == ENOTCONN ? "the switch does not listen yet" : strerror(errno));
	else
		control_ok(request);
	aead_wipe(key, sizeof(key));
}

static void op_peer_receive_key(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	uint32_t peer = 0, key_id = 0;
	uint64_t identity;
	uint8_t key[AEAD_KEY];

	if (!get_u32(args, "peer", 1, TUNNEL_PEERS - 1, &peer) ||
		!control_u64(args, "identity", 1, UINT64_MAX, &identity) ||
		!get_u32(args, "key_id", 0, UINT32_MAX, &key_id) || !control_bytes(args, "key", key, sizeof(key)))
		return;
	if (tunnel_receive_key(sw->tunnel, peer, identity, key_id, key))
		control_error(request, peer_error(), "key %u of peer %u: %s", key_id, peer,
			errno == EEXIST ? "the number is taken" : strerror(errno));
	else
		control_ok(request);
	aead_wipe(key, sizeof(key));
}

static void network_forget_peer(struct switch_network *network, uint32_t peer)
{
	size_t kept = 0;

	for (size_t i = 0; i < network->peer_count; i++)
		if (network->peers[i] != peer)
			network->peers[kept++] = network->peers[i];
	network->peer_count = kept;
}

static void op_peer_remove(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct tunnel_peer *peer = get_peer(sw, args, "peer");
	uint32_t handle;

	if (!peer)
		return;
	handle = peer->handle;
	for (size_t i = 0; i < SWITCH_NETWORK_BUCKETS; i++)
		for (struct switch_network *network = sw->networks[i]; network; network = network->next)
			network_forget_peer(network, handle);
	table_forget(&sw->table, NULL, handle, loop_now());
	tunnel_peer_remove(sw->tunnel, handle);
	control_ok(request);
}

static void op_rtt(void *context, struct control_request *request, const struct control_args *args)
{
	struct tunnel_peer *peer = get_peer(context, args, "peer");

	if (peer && control_u64(args, "rtt_us", 0, 60000000, &peer->rtt_us))
		control_ok(request);
}

static void op_lease(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;

	if (control_u64(args, "deadline_ns", 0, UINT64_MAX, &sw->lease_deadline_ns))
		control_ok(request);
}

/* ---- networks ---- */

static struct switch_network *network_make(struct switch_state *sw, uint32_t id)
{
	struct switch_network *network = switch_network_find(sw, id), **bucket;

	if (network || sw->network_count >= SWITCH_NETWORKS)
		return network;
	network = calloc(1, sizeof(*network));
	if (!network)
		return NULL;
	bucket = &sw->networks[id % SWITCH_NETWORK_BUCKETS];
	network->id = id;
	network->next = *bucket;
	*bucket = network;
	sw->network_count++;
	return network;
}

static void op_network_set(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	const msgpack_object_array *list;
	uint32_t id = 0, peers[SWITCH_NETWORK_PEERS];
	struct switch_network *network;

	if (!get_u32(args, "network", 0, NETWORK_MAX, &id) || !control_list(args, "peers", SWITCH_NETWORK_PEERS, &list))
		return;
	for (size_t i = 0; i < list->size; i++) {
		uint64_t peer;

		if (!control_list_u64(args, "peers", list, i, 1, TUNNEL_PEERS - 1, &peer))
			return;
		if (!tunnel_find(sw->tunnel, (uint32_t)peer)) {
			control_error(request, CONTROL_NOT_FOUND, "there is no peer %u", (unsigned)peer);
			return;
		}
		peers[i] = (uint32_t)peer;
	}
	network = network_make(sw, id);
	if (!network) {
		control_error(request, CONTROL_LIMIT, "too many networks");
		return;
	}
	memcpy(network->peers, peers, list->size * sizeof(peers[0]));
	network->peer_count = list->size;
	control_ok(request);
}

static void op_network_remove(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct switch_network *network = get_network(sw, args), **at;

	if (!network)
		return;
	if (network->ports) {
		control_error(request, CONTROL_BAD_STATE, "network %u still has ports", network->id);
		return;
	}
	for (size_t i = 0; i < TABLE_BUCKETS; i++)
		for (struct table_entry *entry = sw->table.buckets[i], *next; entry; entry = next) {
			next = entry->next;
			if (entry->network == network->id)
				table_remove(&sw->table, entry);
		}
	at = &sw->networks[network->id % SWITCH_NETWORK_BUCKETS];
	while (*at != network)
		at = &(*at)->next;
	*at = network->next;
	sw->network_count--;
	free(network);
	control_ok(request);
}

/* ---- ports ---- */

static bool get_setup(struct switch_state *sw, const struct control_args *args, struct port_setup *setup)
{
	static const char *const states[] = {"incoming", "running", NULL};
	uint64_t mtu;
	size_t state;

	setup->network = get_network(sw, args);
	if (!setup->network || !get_u32(args, "port", 0, SWITCH_PORTS - 1, &setup->handle) ||
		!control_bytes(args, "mac", setup->mac, sizeof(setup->mac)) ||
		!control_str(args, "socket", SOCKET_MAX, &setup->socket) ||
		!control_u64(args, "mtu", MTU_MIN, MTU_MAX, &mtu) ||
		!control_u64(args, "epoch", 1, UINT64_MAX, &setup->epoch) ||
		!control_choice(args, "state", states, &state) ||
		!control_bool_optional(args, "lease_bound", &setup->lease_bound))
		return false;
	setup->mtu = (uint16_t)mtu;
	setup->state = state ? PORT_RUNNING : PORT_INCOMING;
	if (mac_is_group(setup->mac)) {
		control_error(args->request, CONTROL_BAD_ARGUMENT, "mac: a guest's address is not a group's");
		return false;
	}
	return true;
}

static void op_port_add(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct port_setup setup = {0};
	struct table_entry *entry;
	struct switch_port *port;
	bool told;

	if (!get_setup(sw, args, &setup))
		return;
	entry = table_find(&sw->table, setup.network->id, setup.mac);
	told = entry && entry->told;
	if (sw->ports[setup.handle] || (told && entry->port)) {
		control_error(request, CONTROL_EXISTS, "port %u or its address is there already", setup.handle);
		return;
	}
	if (told && entry->epoch > setup.epoch) {
		control_error(request, CONTROL_MISMATCH, "the guest has a newer epoch, %llu, elsewhere",
			(unsigned long long)entry->epoch);
		return;
	}
	entry = table_tell(&sw->table, setup.network->id, setup.mac);
	port = entry ? port_new(sw, &setup) : NULL;
	if (!port) {
		control_error(request, entry ? CONTROL_IO : CONTROL_LIMIT, "%s: %s", setup.socket,
			entry ? strerror(errno) : "the table of addresses is full");
		if (entry && !told)
			table_remove(&sw->table, entry);
		return;
	}
	entry->port = port;
	if (setup.state == PORT_RUNNING || !told) {
		entry->peer = 0;
		entry->epoch = setup.state == PORT_RUNNING ? setup.epoch : 0;
	}
	control_ok(request);
}

static void op_port_remove(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct switch_port *port = get_port(sw, args);
	struct table_entry *entry;

	if (!port)
		return;
	entry = table_find(&sw->table, port->network->id, port->mac);
	if (entry && entry->port == port) {
		entry->port = NULL;
		if (entry->peer == 0)
			table_remove(&sw->table, entry);
	}
	table_forget(&sw->table, port, 0, loop_now());
	port_free(port);
	control_ok(request);
}

static void op_impair(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_port *port = get_port(context, args);
	struct impair_config config = {0};

	if (!port || !control_u64_optional(args, "delay_us", 0, IMPAIR_DELAY_MAX_US, &config.delay_us) ||
		!control_u64_optional(args, "jitter_us", 0, IMPAIR_DELAY_MAX_US, &config.jitter_us) ||
		!control_u64_optional(args, "rate", 0, UINT64_C(1) << 40, &config.rate) ||
		!control_u64_optional(args, "limit_bytes", 0, IMPAIR_QUEUE_MAX, &config.limit_bytes) ||
		!get_u32_optional(args, "loss_ppm", PPM, &config.loss_ppm) ||
		!get_u32_optional(args, "reorder_ppm", PPM, &config.reorder_ppm) ||
		!get_u32_optional(args, "duplicate_ppm", PPM, &config.duplicate_ppm))
		return;
	impair_set(&port->impair, &config);
	control_ok(request);
}

/* ---- addresses ---- */

static bool get_address(
	struct switch_state *sw, const struct control_args *args, struct switch_network **network, uint8_t mac[6])
{
	*network = get_network(sw, args);
	return *network && control_bytes(args, "mac", mac, 6);
}

static void op_mac_set(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct switch_network *network;
	struct table_entry *entry;
	uint32_t peer = 0;
	uint64_t epoch;
	uint8_t mac[6];
	bool known, failover = false;

	if (!get_address(sw, args, &network, mac) || !get_u32(args, "peer", 0, TUNNEL_PEERS - 1, &peer) ||
		!control_u64(args, "epoch", 1, UINT64_MAX, &epoch) ||
		!control_bool_optional(args, "failover", &failover))
		return;
	if (peer && !tunnel_find(sw->tunnel, peer)) {
		control_error(request, CONTROL_NOT_FOUND, "there is no peer %u", peer);
		return;
	}
	entry = table_find(&sw->table, network->id, mac);
	known = entry && entry->told;
	if (known && epoch == entry->epoch && peer != entry->peer && entry->port && entry->peer == 0) {
		control_error(request, CONTROL_MISMATCH, "the guest runs here with this epoch");
		return;
	}
	entry = table_tell(&sw->table, network->id, mac);
	if (!entry) {
		control_error(request, CONTROL_LIMIT, "the table of addresses is full");
		return;
	}
	if (known && epoch > entry->epoch) {
		(failover ? move_fail_over : move_entry)(sw, entry, peer, epoch);
		switch_flush(sw);
	} else if (!known || epoch == entry->epoch) {
		entry->peer = peer;
		entry->epoch = epoch;
	}
	control_ok(request);
}

static struct table_entry *get_told(struct switch_state *sw, const struct control_args *args)
{
	struct switch_network *network;
	struct table_entry *entry;
	uint8_t mac[6];

	if (!get_address(sw, args, &network, mac))
		return NULL;
	entry = table_find(&sw->table, network->id, mac);
	if (entry && entry->told)
		return entry;
	control_error(args->request, CONTROL_NOT_FOUND, "nothing was told about this address");
	return NULL;
}

static void op_mac_next(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct table_entry *entry = get_told(sw, args);
	uint32_t peer = 0;
	uint64_t epoch;

	if (!entry || !get_u32(args, "peer", 0, TUNNEL_PEERS - 1, &peer) ||
		!control_u64(args, "epoch", 0, UINT64_MAX, &epoch))
		return;
	if (epoch == 0 || epoch > entry->epoch) {
		entry->next_peer = epoch ? peer : 0;
		entry->next_epoch = epoch;
	}
	control_ok(request);
}

static void op_mac_remove(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct table_entry *entry = get_told(sw, args);

	if (!entry)
		return;
	if (entry->port) {
		control_error(request, CONTROL_BAD_STATE, "port %u has this address", entry->port->handle);
		return;
	}
	table_remove(&sw->table, entry);
	control_ok(request);
}

/* ---- moves ---- */

static void op_hold(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_port *port = get_port(context, args);

	if (!port)
		return;
	handover_hold(port);
	control_ok(request);
}

static void op_unhold(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct switch_port *port = get_port(sw, args);

	if (!port)
		return;
	if (port->handover.output == HANDOVER_REDIRECT) {
		control_error(request, CONTROL_BAD_STATE, "the port's frames were redirected already");
		return;
	}
	handover_unhold(port);
	switch_flush(sw);
	control_ok(request);
}

static void op_redirect(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct switch_port *port = get_port(sw, args);
	struct tunnel_peer *peer = port ? get_peer(sw, args, "peer") : NULL;
	struct table_entry *entry;
	uint64_t epoch;

	if (!peer || !control_u64(args, "epoch", port->epoch + 1, UINT64_MAX, &epoch))
		return;
	handover_redirect(port, peer->handle, epoch);
	port->state = PORT_GONE;
	entry = table_find(&sw->table, port->network->id, port->mac);
	if (entry && entry->epoch < epoch)
		move_entry(sw, entry, peer->handle, epoch);
	switch_flush(sw);
	control_ok(request);
}

static void op_expect(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct switch_port *port = get_port(sw, args);
	struct tunnel_peer *from = port ? get_peer(sw, args, "from") : NULL;
	uint64_t epoch;

	if (!from || !control_u64(args, "epoch", 1, UINT64_MAX, &epoch))
		return;
	if (port->state != PORT_INCOMING || epoch != port->epoch) {
		control_error(request, CONTROL_BAD_STATE, "port %u does not wait for epoch %llu", port->handle,
			(unsigned long long)epoch);
		return;
	}
	if (handover_expect(port, from->handle))
		control_ok(request);
	else
		control_error(request, CONTROL_INTERNAL, "no memory");
}

static void op_announce(void *context, struct control_request *request, const struct control_args *args)
{
	struct switch_state *sw = context;
	struct switch_port *port = get_port(sw, args);

	if (!port)
		return;
	if (port->state == PORT_GONE) {
		control_error(request, CONTROL_BAD_STATE, "the guest of port %u runs elsewhere", port->handle);
		return;
	}
	move_announce(port);
	switch_flush(sw);
	control_ok(request);
}

const struct control_op switch_ops[] = {
	{"listen", op_listen, "address port identity"},
	{"peer_set", op_peer_set, "peer identity address port mtu key_id key"},
	{"peer_receive_key", op_peer_receive_key, "peer identity key_id key"},
	{"peer_remove", op_peer_remove, "peer"},
	{"rtt", op_rtt, "peer rtt_us"},
	{"lease", op_lease, "deadline_ns"},
	{"network_set", op_network_set, "network peers"},
	{"network_remove", op_network_remove, "network"},
	{"port_add", op_port_add, "port network mac socket mtu epoch state lease_bound"},
	{"port_remove", op_port_remove, "port"},
	{"impair", op_impair, "port delay_us jitter_us loss_ppm rate limit_bytes reorder_ppm duplicate_ppm"},
	{"mac_set", op_mac_set, "network mac peer epoch failover"},
	{"mac_next", op_mac_next, "network mac peer epoch"},
	{"mac_remove", op_mac_remove, "network mac"},
	{"hold", op_hold, "port"},
	{"unhold", op_unhold, "port"},
	{"redirect", op_redirect, "port peer epoch"},
	{"expect", op_expect, "port epoch from"},
	{"announce", op_announce, "port"},
	{"counters", switch_op_counters, "first"},
	{"status", switch_op_status, ""},
	{0},
};
