/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_SWITCH_TABLE_H
#define MOBI_SWITCH_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct switch_port;

/*
 * Which MAC address of which network is where. Entries that mobid *told* are authority: a frame with that source from
 * anywhere else is dropped. Other addresses (of containers in a guest, say) are *learned* from the frames they send, as
 * in any switch, and forgotten after five minutes.
 */
enum { TABLE_TOLD_MAX = 65536, TABLE_LEARNED_MAX = 8192, TABLE_BUCKETS = 16384 };

struct table_entry {
	struct table_entry *next;
	uint32_t network;
	uint8_t mac[6];
	bool told;
	uint32_t peer;            /* where the guest is; 0 = here */
	uint64_t epoch;           /* of a told entry: the right to run that this place has; 0 if not known */
	struct switch_port *port; /* the port here that has this address, also while the guest runs elsewhere */

	/* While a handover is open: the peer that may take the address over. next_epoch 0 = none. */
	uint32_t next_peer;
	uint64_t next_epoch;
	/* After a handover: frames that the guest had sent before may still come from there. */
	uint32_t previous_peer;
	uint64_t previous_until_ns;
	uint64_t seen_ns; /* of a learned entry */
};

struct switch_table {
	struct table_entry *buckets[TABLE_BUCKETS];
	size_t told, learned;
	uint64_t swept_ns; /* when a full table was last searched for what may be forgotten */
};

struct table_entry *table_find(struct switch_table *table, uint32_t network, const uint8_t *mac);

/* The told entry of this address, made if need be (a learned one becomes told). NULL: the table is full. */
struct table_entry *table_tell(struct switch_table *table, uint32_t network, const uint8_t *mac);

/* Notes where a frame with this source came from; `entry` is what table_find() gave, or NULL. */
void table_learn(struct switch_table *table, struct table_entry *entry, uint32_t network, const uint8_t *mac,
	uint32_t peer, struct switch_port *port, uint64_t now_ns);

void table_remove(struct switch_table *table, struct table_entry *entry);

/* Forgets what was learned at a port or peer that goes (NULL and 0: nothing), and what was not seen for long. */
void table_forget(struct switch_table *table, const struct switch_port *port, uint32_t peer, uint64_t now_ns);
void table_free(struct switch_table *table);

#endif
