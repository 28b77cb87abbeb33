/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_SWITCH_H
#define MOBI_SWITCH_H

/*
 * The switch: frames between guests of this host, and to and from the switches of other hosts.
 *
 *	guest ⇄ switch_port.c (vhost-user-net) ─ impair.c ─▶ switch_forward.c ─▶ tunnel*.c ─▶ other switches
 *	              ▲                                          │     ▲              │
 *	              └───────────────── handover.c ◀────────────┘     └──────────────┘
 *
 * switch_table.c says where an address is; handover.c sits before a guest's port and keeps order while the guest moves;
 * switch_control.c is mobid's side. All in one thread: a callback takes a batch of frames, and switch_flush() at its
 * end sends and shows what the batch left behind.
 */
#include "control.h"
#include "frame.h"
#include "handover.h"
#include "impair.h"
#include "loop.h"
#include "switch_table.h"
#include "tunnel.h"
#include "vhost_user.h"

enum { SWITCH_PORTS = 1024, SWITCH_NETWORK_PEERS = 256, SWITCH_NETWORK_BUCKETS = 1024, SWITCH_NETWORKS = 65536 };

struct switch_state;

struct switch_network {
	struct switch_network *next; /* in its bucket */
	uint32_t id;
	uint32_t peers[SWITCH_NETWORK_PEERS];
	size_t peer_count;
	struct switch_port *ports; /* by next_in_network */
};

struct port_counters {
	uint64_t rx_frames, rx_bytes, tx_frames, tx_bytes; /* as the guest sees it: rx is what it receives */
	uint64_t rx_dropped;                               /* its queue was full */
	uint64_t tx_malformed, spoofed;                    /* frames of the guest that were refused */
	uint64_t tx_fenced;                                /* sent after the lease's end or after the guest went away */
};

enum port_state {
	PORT_INCOMING, /* the guest is expected, with its frames */
	PORT_RUNNING,
	PORT_GONE, /* redirected: it runs elsewhere and must not send here */
};

/* The configuration space of a virtio network device. */
struct port_config {
	uint8_t mac[6];
	uint16_t status, queue_pairs, mtu;
} __attribute__((packed));

struct switch_port {
	struct switch_state *sw;
	uint32_t handle;
	struct switch_network *network;
	struct switch_port *next_in_network;
	uint8_t mac[6];
	uint16_t mtu;
	uint64_t epoch;
	enum port_state state;
	bool lease_bound;
	struct vhost_user_device description;
	struct port_config config;
	struct vhost_user *device;
	struct frame_queue backlog; /* frames that wait for room in the guest's receive queue */
	bool generous;              /* the backlog may be large until it was empty once */
	struct handover handover;
	struct impair impair;
	struct loop_timer impair_timer;
	struct port_counters counters;
	struct switch_port *next_dirty; /* something was put into its receive queue */
	bool dirty;
};

struct switch_state {
	struct loop *loop;
	struct control *control;
	struct tunnel *tunnel;
	uint64_t identity;          /* of this peer, in the whole mesh */
	uint64_t lease_deadline_ns; /* CLOCK_BOOTTIME; 0 = none */
	struct switch_port *ports[SWITCH_PORTS];
	struct switch_network *networks[SWITCH_NETWORK_BUCKETS];
	size_t network_count;
	struct switch_table table;
	struct switch_port *dirty;
	uint64_t strays; /* messages of other switches about guests that are not here */
	uint8_t scratch[FRAME_HEADROOM + FRAME_MAX];
};

/* switch.c */
struct switch_network *switch_network_find(struct switch_state *sw, uint32_t id);
bool switch_network_has(const struct switch_network *network, uint32_t peer);
void switch_flush(struct switch_state *sw);

/* switch_control.c: the operations of kernel/README.md, section 7. */
extern const struct control_op switch_ops[];

/* switch_counters.c */
void switch_op_counters(void *context, struct control_request *request, const struct control_args *args);
void switch_op_status(void *context, struct control_request *request, const struct control_args *args);

/* switch_port.c */
struct port_setup {
	uint32_t handle;
	struct switch_network *network;
	uint8_t mac[6];
	uint16_t mtu;
	uint64_t epoch;
	enum port_state state;
	bool lease_bound;
	const char *socket;
};

/* NULL and errno. The caller has checked that handle and address are free. */
struct switch_port *port_new(struct switch_state *sw, const struct port_setup *setup);
void port_free(struct switch_port *port);
/* Into the guest's receive queue, or the backlog. */
void port_deliver(struct switch_port *port, struct frame *frame);
void port_publish(struct switch_port *port);
/* Starts what waits in the impairment queue. */
void port_impair_arm(struct switch_port *port);

/* switch_forward.c */
/* A frame that the guest of `port` sends: source check, impairments, then onwards. */
void forward_from_port(struct switch_port *port, struct frame *frame, uint64_t now_ns);
/* Whether the lease that this port's guest runs by has ended. */
bool forward_expired(const struct switch_port *port);
/* Onwards: to a port here, to a peer, or to all. */
void forward_output(struct switch_port *port, struct frame *frame);
/* The tunnel's receiver. */
void forward_from_peer(void *context, struct tunnel_peer *peer, const struct tunnel_message *message);

/* switch_move.c */
/*
 * The guest with this address is at `peer` (0 = here) from now on, with this epoch: changes the entry and puts markers
 * on the old and the new path.
 */
void move_entry(struct switch_state *sw, struct table_entry *entry, uint32_t peer, uint64_t epoch);
/* The same without a handover: the old place is dead or fenced, and nothing of it may be believed or waited for. */
void move_fail_over(struct switch_state *sw, struct table_entry *entry, uint32_t peer, uint64_t epoch);
/* The guest of the port runs here: takes over the address and tells the network's peers. */
void move_announce(struct switch_port *port);
/* What another switch says about a move. */
void move_marker(struct switch_state *sw, struct tunnel_peer *peer, const struct switch_network *network,
	const struct tunnel_marker *marker);
/* Sends a marker twice: a lost one costs a wait, and a second copy right behind means the same. */
void move_send_marker(
	struct switch_state *sw, struct tunnel_peer *peer, uint32_t network, const struct tunnel_marker *marker);

#endif
