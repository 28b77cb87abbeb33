/* SPDX-License-Identifier: Apache-2.0 */
#include "switch_table.h"

#include "loop.h"

#include <stdlib.h>
#include <string.h>

#define LEARNED_LIFE (300 * LOOP_SECOND)

static struct table_entry **bucket(struct switch_table *table, uint32_t network, const uint8_t *mac)
{
	uint64_t key = (uint64_t)network << 40;

	/* The upper bytes of a MAC are a vendor's; the lower ones tell guests apart. */
	for (int i = 0; i < 6; i++)
		key ^= (uint64_t)mac[i] << (8 * (5 - i));
	key *= UINT64_C(0x9e3779b97f4a7c15);
	return &table->buckets[key >> 50]; /* 14 bits: TABLE_BUCKETS */
}

struct table_entry *table_find(struct switch_table *table, uint32_t network, const uint8_t *mac)
{
	struct table_entry *entry = *bucket(table, network, mac);

	while (entry && (entry->network != network || memcmp(entry->mac, mac, 6) != 0))
		entry = entry->next;
	return entry;
}

static struct table_entry *entry_new(struct switch_table *table, uint32_t network, const uint8_t *mac)
{
	struct table_entry *entry = calloc(1, sizeof(*entry)), **at = bucket(table, network, mac);

	if (!entry)
		return NULL;
	entry->network = network;
	memcpy(entry->mac, mac, 6);
	entry->next = *at;
	*at = entry;
	return entry;
}

struct table_entry *table_tell(struct switch_table *table, uint32_t network, const uint8_t *mac)
{
	struct table_entry *entry = table_find(table, network, mac);

	if (entry && entry->told)
		return entry;
	if (table->told >= TABLE_TOLD_MAX)
		return NULL;
	if (entry) {
		table->learned--;
		entry->port = NULL;
	} else {
		entry = entry_new(table, network, mac);
	}
	if (entry) {
		entry->told = true;
		table->told++;
	}
	return entry;
}

void table_learn(struct switch_table *table, struct table_entry *entry, uint32_t network, const uint8_t *mac,
	uint32_t peer, struct switch_port *port, uint64_t now_ns)
{
	if (!entry) {
		/* Not for every frame: a guest that makes up addresses must not keep the switch busy. */
		if (table->learned >= TABLE_LEARNED_MAX && table->swept_ns + LOOP_SECOND < now_ns) {
			table->swept_ns = now_ns;
			table_forget(table, NULL, 0, now_ns);
		}
		if (table->learned >= TABLE_LEARNED_MAX || !(entry = entry_new(table, network, mac)))
			return;
		table->learned++;
	}
	entry->peer = peer;
	entry->port = port;
	entry->seen_ns = now_ns;
}

void table_remove(struct switch_table *table, struct table_entry *entry)
{
	struct table_entry **at = bucket(table, entry->network, entry->mac);

	while (*at != entry)
		at = &(*at)->next;
	*at = entry->next;
	if (entry->told)
		table->told--;
	else
		table->learned--;
	free(entry);
}

void table_forget(struct switch_table *table, const struct switch_port *port, uint32_t peer, uint64_t now_ns)
{
	for (size_t i = 0; i < TABLE_BUCKETS; i++)
		for (struct table_entry *entry = table->buckets[i], *next; entry; entry = next) {
			bool gone = (port && entry->port == port) || (peer && entry->peer == peer) ||
				    entry->seen_ns + LEARNED_LIFE < now_ns;

			next = entry->next;
			if (!entry->told && gone)
				table_remove(table, entry);
		}
}

void table_free(struct switch_table *table)
{
	for (size_t i = 0; i < TABLE_BUCKETS; i++)
		while (table->buckets[i])
			table_remove(table, table->buckets[i]);
}
