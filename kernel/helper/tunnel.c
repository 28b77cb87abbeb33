/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Peers, keys and the socket of the tunnels.
 *
 * A rekey never interrupts traffic: the receiver makes a new key and keeps the old ones, tells the sender, and lets the
 * old ones go once packets under the new one arrive. A sender's counter goes on through rekeys, and through a peer's
 * removal, so no order of calls makes a nonce repeat with a key in one process; between processes the rule is that a
 * new process gets new keys.
 */
#include "tunnel.h"

#include "log.h"
#include "tunnel_internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#define KEY_LIFE (60 * LOOP_SECOND)
#define KEY_GRACE (2 * LOOP_SECOND)

struct tunnel_index_slot *tunnel_index_slot(struct tunnel *tunnel, uint32_t id)
{
	uint32_t at = (id * UINT32_C(2654435769)) >> 19; /* multiplicative hash, 13 bits: TUNNEL_INDEX slots */

	while (tunnel->index[at].key && tunnel->index[at].key->id != id)
		at = (at + 1) & (TUNNEL_INDEX - 1);
	return &tunnel->index[at];
}

/* Keys change seldom, packets come often: the index is made anew at each change. */
static void index_rebuild(struct tunnel *tunnel)
{
	memset(tunnel->index, 0, sizeof(tunnel->index));
	for (size_t i = 0; i < TUNNEL_PEERS; i++) {
		struct tunnel_peer *peer = tunnel->peers[i];

		for (size_t k = 0; peer && k < TUNNEL_RECEIVE_KEYS && peer->receive[k]; k++)
			*tunnel_index_slot(tunnel, peer->receive[k]->id) =
				(struct tunnel_index_slot){peer->receive[k], peer};
	}
}

static void receive_key_free(struct tunnel_receive_key *key)
{
	if (!key)
		return;
	aead_free(key->open);
	free(key);
}

static void expire_peer(struct tunnel_peer *peer, uint64_t now, uint64_t *next)
{
	size_t kept = 0;

	for (size_t k = 0; k < TUNNEL_RECEIVE_KEYS; k++) {
		struct tunnel_receive_key *key = peer->receive[k];

		peer->receive[k] = NULL;
		if (key && key->expires_ns && key->expires_ns <= now) {
			receive_key_free(key);
			continue;
		}
		if (key && key->expires_ns && key->expires_ns < *next)
			*next = key->expires_ns;
		if (key)
			peer->receive[kept++] = key;
	}
}

static void expire(void *context)
{
	struct tunnel *tunnel = context;
	uint64_t now = loop_now(), next = UINT64_MAX;

	for (size_t i = 0; i < TUNNEL_PEERS; i++)
		if (tunnel->peers[i])
			expire_peer(tunnel->peers[i], now, &next);
	index_rebuild(tunnel);
	if (next != UINT64_MAX)
		loop_timer_set(tunnel->loop, &tunnel->expiry, next);
}

/* The keys after the first `newer` of a peer end at `deadline`, if not sooner. */
static void end_older_keys(struct tunnel *tunnel, struct tunnel_peer *peer, size_t newer, uint64_t deadline)
{
	bool any = false;

	for (size_t k = newer; k < TUNNEL_RECEIVE_KEYS && peer->receive[k]; k++) {
		struct tunnel_receive_key *key = peer->receive[k];

		if (!key->expires_ns || key->expires_ns > deadline)
			key->expires_ns = deadline;
		any = true;
	}
	if (any && (!tunnel->expiry.armed || tunnel->expiry.deadline_ns > deadline))
		loop_timer_set(tunnel->loop, &tunnel->expiry, deadline);
}

void tunnel_first_use(struct tunnel *tunnel, struct tunnel_peer *peer, struct tunnel_receive_key *key)
{
	size_t k = 0;

	key->used = true;
	while (k < TUNNEL_RECEIVE_KEYS && peer->receive[k] != key)
		k++;
	end_older_keys(tunnel, peer, k + 1, loop_now() + KEY_GRACE);
}

struct tunnel *tunnel_new(struct loop *loop, tunnel_receiver receiver, void *context)
{
	struct tunnel *tunnel = calloc(1, sizeof(*tunnel));

	if (!tunnel)
		return NULL;
	tunnel->datagrams = malloc((size_t)TUNNEL_RECEIVES * TUNNEL_DATAGRAM);
	if (!tunnel->datagrams) {
		free(tunnel);
		return NULL;
	}
	tunnel->loop = loop;
	tunnel->receiver = receiver;
	tunnel->context = context;
	tunnel->fd = -1;
	tunnel->expiry = (struct loop_timer){.run = expire, .context = tunnel};
	return tunnel;
}

static void close_socket(struct tunnel *tunnel)
{
	if (tunnel->fd < 0)
		return;
	loop_remove(tunnel->loop, tunnel->fd);
	close(tunnel->fd);
	tunnel->fd = -1;
}

void tunnel_free(struct tunnel *tunnel)
{
	if (!tunnel)
		return;
	for (uint32_t i = 0; i < TUNNEL_PEERS; i++)
		tunnel_peer_remove(tunnel, i);
	loop_timer_cancel(tunnel->loop, &tunnel->expiry);
	close_socket(tunnel);
	free(tunnel->datagrams);
	free(tunnel);
}

/* Fills a struct sockaddr_in or sockaddr_in6 from text. The family, or 0. */
static int parse_address(const char *text, uint16_t port, struct sockaddr_in6 *out, socklen_t *length)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)out;

	memset(out, 0, sizeof(*out));
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		*length = sizeof(*v4);
		return AF_INET;
	}
	if (inet_pton(AF_INET6, text, &out->sin6_addr) != 1)
		return 0;
	out->sin6_family = AF_INET6;
	out->sin6_port = htons(port);
	*length = sizeof(*out);
	return AF_INET6;
}

static void socket_options(int fd, int family)
{
	int on = 1, off = 0, size = 16 << 20, no_ip_fragments = IP_PMTUDISC_DO;

	/* Beyond rmem_max only with privilege; without, the largest that is allowed. */
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)))
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)))
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	if (setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on)))
		log_info("this kernel does not join received UDP packets (UDP_GRO): slower");
	if (family == AF_INET6) {
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
		setsockopt(fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, &no_ip_fragments, sizeof(no_ip_fragments));
	}
	setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &no_ip_fragments, sizeof(no_ip_fragments));
}

int tunnel_listen(struct tunnel *tunnel, const char *address, uint16_t port)
{
	struct sockaddr_in6 local;
	socklen_t length;
	int family = parse_address(address, port, &local, &length);
	int fd;

	if (!family) {
		errno = EINVAL;
		return -1;
	}
	fd = socket(family, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -1;
	socket_options(fd, family);
	if (bind(fd, (struct sockaddr *)&local, length) || getsockname(fd, (struct sockaddr *)&local, &length) ||
		loop_add(tunnel->loop, fd, EPOLLIN, tunnel_readable, tunnel)) {
		int error = errno;

		close(fd);
		errno = error;
		return -1;
	}
	close_socket(tunnel);
	tunnel->fd = fd;
	tunnel->family = family;
	tunnel->port = ntohs(local.sin6_port); /* at the same place in both kinds of address */
	return tunnel->port;
}

int tunnel_port(const struct tunnel *tunnel)
{
	return tunnel->port;
}

struct tunnel_peer *tunnel_find(struct tunnel *tunnel, uint32_t handle)
{
	return handle < TUNNEL_PEERS ? tunnel->peers[handle] : NULL;
}

static struct tunnel_peer *peer_make(struct tunnel *tunnel, uint32_t handle)
{
	struct tunnel_peer *peer = tunnel_find(tunnel, handle);

	if (peer)
		return peer;
	if (handle == 0 || handle >= TUNNEL_PEERS) {
		errno = ERANGE;
		return NULL;
	}
	peer = calloc(1, sizeof(*peer));
	if (!peer)
		return NULL;
	peer->batch = malloc(sizeof(*peer->batch));
	if (!peer->batch) {
		free(peer);
		return NULL;
	}
	memset(peer->batch, 0, offsetof(struct tunnel_batch, data));
	peer->batch->pending_tail = &peer->batch->pending;
	peer->handle = handle;
	peer->counter = tunnel->counter_floor;
	tunnel->peers[handle] = peer;
	return peer;
}

void tunnel_set_mtu(struct tunnel *tunnel, struct tunnel_peer *peer, uint32_t mtu)
{
	bool v4 = tunnel->family == AF_INET || IN6_IS_ADDR_V4MAPPED(&peer->address.sin6_addr);

	peer->mtu = mtu < TUNNEL_MTU_MIN ? TUNNEL_MTU_MIN : mtu > TUNNEL_MTU_MAX ? TUNNEL_MTU_MAX : mtu;
	peer->payload = peer->mtu - (v4 ? 28 : 48); /* IP and UDP headers */
}

/* A peer with an IPv4 address behind a socket for both families is written as ::ffff:a.b.c.d. */
static bool peer_address(
	const struct tunnel *tunnel, const char *text, uint16_t port, struct sockaddr_in6 *out, socklen_t *length)
{
	char mapped[64];
	int family = parse_address(text, port, out, length);

	if (!family) {
		errno = EINVAL;
		return false;
	}
	if (family == AF_INET && tunnel->family == AF_INET6) {
		snprintf(mapped, sizeof(mapped), "::ffff:%s", text);
		family = parse_address(mapped, port, out, length);
	}
	if (family != tunnel->family)
		errno = EAFNOSUPPORT;
	return family == tunnel->family;
}

int tunnel_peer_set(struct tunnel *tunnel, const struct tunnel_destination *to)
{
	struct sockaddr_in6 address;
	socklen_t length;
	struct tunnel_peer *peer;
	struct aead *seal = NULL;

	if (tunnel->fd < 0) {
		errno = ENOTCONN;
		return -1;
	}
	if (!peer_address(tunnel, to->address, to->port, &address, &length) || !(peer = peer_make(tunnel, to->handle)))
		return -1;
	if (!peer->seal || peer->seal_key_id != to->key_id || memcmp(peer->seal_key, to->key, AEAD_KEY) != 0) {
		seal = aead_new(to->key);
		if (!seal) {
			errno = ENOMEM;
			return -1;
		}
		aead_free(peer->seal);
		peer->seal = seal;
		peer->seal_key_id = to->key_id;
		memcpy(peer->seal_key, to->key, AEAD_KEY);
	}
	peer->address = address;
	peer->address_length = length;
	peer->identity = to->identity;
	peer->batch->no_offload = false;
	tunnel_set_mtu(tunnel, peer, to->mtu);
	return 0;
}

int tunnel_receive_key(
	struct tunnel *tunnel, uint32_t handle, uint64_t identity, uint32_t key_id, const uint8_t key[AEAD_KEY])
{
	struct tunnel_peer *peer = peer_make(tunnel, handle);
	struct tunnel_receive_key *made;

	if (!peer)
		return -1;
	if (tunnel_index_slot(tunnel, key_id)->key) {
		errno = EEXIST;
		return -1;
	}
	made = calloc(1, sizeof(*made));
	if (!made || !(made->open = aead_new(key))) {
		free(made);
		errno = ENOMEM;
		return -1;
	}
	made->id = key_id;
	peer->identity = identity;
	receive_key_free(peer->receive[TUNNEL_RECEIVE_KEYS - 1]);
	memmove(peer->receive + 1, peer->receive, (TUNNEL_RECEIVE_KEYS - 1) * sizeof(peer->receive[0]));
	peer->receive[0] = made;
	end_older_keys(tunnel, peer, 1, loop_now() + KEY_LIFE);
	index_rebuild(tunnel);
	return 0;
}

static void unlink_dirty(struct tunnel *tunnel, struct tunnel_peer *peer)
{
	for (struct tunnel_peer **at = &tunnel->dirty; *at; at = &(*at)->next_dirty)
		if (*at == peer) {
			*at = peer->next_dirty;
			return;
		}
}

bool tunnel_peer_remove(struct tunnel *tunnel, uint32_t handle)
{
	struct tunnel_peer *peer = tunnel_find(tunnel, handle);

	if (!peer)
		return false;
	if (peer->counter > tunnel->counter_floor)
		tunnel->counter_floor = peer->counter;
	unlink_dirty(tunnel, peer);
	tunnel->peers[handle] = NULL;
	for (size_t k = 0; k < TUNNEL_RECEIVE_KEYS; k++)
		receive_key_free(peer->receive[k]);
	for (struct tunnel_pending *pending = peer->batch->pending; pending;) {
		struct tunnel_pending *next = pending->next;

		free(pending);
		pending = next;
	}
	free(peer->batch);
	tunnel_reassembly_free(peer);
	aead_free(peer->seal);
	aead_wipe(peer->seal_key, sizeof(peer->seal_key));
	free(peer);
	index_rebuild(tunnel);
	return true;
}

uint64_t tunnel_strangers(const struct tunnel *tunnel)
{
	return tunnel->strangers;
}
