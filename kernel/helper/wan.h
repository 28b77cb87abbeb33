/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_WAN_H
#define MOBI_WAN_H

#include "impair.h"
#include "loop.h"

#include <linux/if_ether.h>
#include <net/if.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

/*
 * A wide-area network in a process. *Sites* are joined by *lanes*, one per ordered pair: what leaves site a for site b
 * is delayed, paced, lost, reordered, doubled (impair.h) or, when the lane is cut, dropped. A *port* is the near end of
 * a veth pair whose far end is in a network namespace of that site; its frames are read and written through a packet
 * socket. Who is behind which port is learnt from source addresses, as a switch does.
 *
 * The packet sockets carry virtio headers, so that a TCP segment of 64 KiB that was never cut into packets, and a
 * checksum that was never computed, pass as they are; the rate counts bytes, so it does not matter.
 */
enum {
	WAN_MAX_SITES = 64,
	WAN_MAX_PORTS = 64,
	WAN_MAX_ADDRESSES = 512,
	WAN_NAME_MAX = 63,
};

enum {
	BLOCK_TCP = 1,
	BLOCK_UDP = 2,
	BLOCK_ICMP = 4,
};

struct wan;

struct wan_port {
	struct wan *wan;
	uint32_t id; /* never used twice; 0 = this place is free */
	unsigned site;
	int fd;
	char interface[IF_NAMESIZE];
	uint64_t rx_frames, rx_bytes, tx_frames, tx_bytes, tx_dropped, blocked;
};

struct wan_lane {
	struct wan *wan;
	unsigned from, to;
	bool cut;
	struct impair impair;
	struct loop_timer timer;
	uint64_t frames, bytes, cut_frames;
};

struct wan_site {
	char name[WAN_NAME_MAX + 1];
	unsigned block; /* bits of BLOCK_ */
};

struct wan_address {
	uint8_t mac[ETH_ALEN];
	uint32_t port;
};

struct wan {
	struct loop *loop;
	uint64_t seed;
	uint32_t last_port;
	unsigned site_count, address_count, address_next;
	struct wan_site sites[WAN_MAX_SITES];
	struct wan_port ports[WAN_MAX_PORTS];
	struct wan_lane *lanes[WAN_MAX_SITES][WAN_MAX_SITES];
	struct wan_address addresses[WAN_MAX_ADDRESSES];
	struct wan_buffers *buffers;
};

/* Attaches an interface of this network namespace. NULL and errno: ENODEV, ENOSPC (too many), … */
struct wan_port *wan_attach(struct wan *wan, unsigned site, const char *interface);
void wan_detach(struct wan_port *port);
struct wan_port *wan_find_port(struct wan *wan, const char *interface);

/* The lane from one site to another, made when it is first asked for; NULL without memory. */
struct wan_lane *wan_lane(struct wan *wan, unsigned from, unsigned to);

bool wan_init(struct wan *wan, struct loop *loop, uint64_t seed);
void wan_free(struct wan *wan);

#endif
