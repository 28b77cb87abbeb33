/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_CONTROL_INTERNAL_H
#define MOBI_CONTROL_INTERNAL_H

/* What the three files of the control socket share with one another and with nobody else. */
#include "control.h"

struct control_queued {
	struct control_queued *next;
	size_t fd_count;
	int fds[CONTROL_FDS_MAX];
	size_t size;
	char data[];
};

struct control {
	struct control_config config;
	int listener_fd;
	int connection_fd;
	bool connection_broken;
	uint64_t connection; /* counts the controllers, so that a late answer never reaches the next one */
	struct control_queued *queue_head, *queue_tail;
	size_t queue_length;
	char buffer[CONTROL_MESSAGE_MAX];
};

struct control_request {
	struct control *control;
	struct control_ticket ticket;
	msgpack_zone zone;
	msgpack_object root;
	size_t fd_count;
	int fds[CONTROL_FDS_MAX];
	bool answered;
};

struct control_message {
	struct control *control;
	struct control_ticket ticket; /* id 0: an event, or a mistake without id */
	msgpack_sbuffer buffer;
	msgpack_packer packer;
	uint32_t keys;
	size_t fd_count;
	int fds[CONTROL_FDS_MAX];
	bool overflow;
};

void control_transmit(struct control *control, const void *data, size_t size, const int *fds, size_t fd_count);
const msgpack_object *control_find(const msgpack_object_map *map, const char *key); /* NULL: absent */
bool control_check_keys(const struct control_args *args, const char *keys);
bool control_plausible(const char *data, size_t size); /* one MessagePack object, of nothing it does not hold */

#endif
