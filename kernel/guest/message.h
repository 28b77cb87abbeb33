// SPDX-License-Identifier: Apache-2.0
/*
 * Requests and results of the agent are MessagePack maps. Reading: a request is unpacked once and asked for keys.
 * Writing: a result is packed into a buffer and sent as one frame. Nothing here trusts the other side's types.
 */
#ifndef MOBI_MESSAGE_H
#define MOBI_MESSAGE_H

#include <msgpack.h>
#include <stdbool.h>
#include <stdint.h>

struct request {
	uint32_t session;
	msgpack_unpacked unpacked;
	const msgpack_object_map *map;
};

/* Unpacks a payload; false when it is no map. Free with request_done() in either case. */
bool request_open(struct request *request, uint32_t session, const void *payload, size_t length);
void request_done(struct request *request);

/* The value of a key, or NULL. */
const msgpack_object *map_get(const msgpack_object_map *map, const char *key);
/* A NUL-terminated copy (to be freed), or NULL when the value is absent or no string. */
char *map_string(const msgpack_object_map *map, const char *key);
char *object_string(const msgpack_object *object);
int64_t map_int(const msgpack_object_map *map, const char *key, int64_t otherwise);
bool map_bool(const msgpack_object_map *map, const char *key, bool otherwise);
/* A NULL-terminated list of copies of an array of strings (free with strings_free()), or NULL. */
char **map_strings(const msgpack_object_map *map, const char *key);
void strings_free(char **strings);

struct reply {
	uint32_t session;
	msgpack_sbuffer buffer;
	msgpack_packer packer;
};

/* A map of `keys` entries in all is begun; pairs are added with the functions below. */
void reply_open(struct reply *reply, uint32_t session, size_t keys);
void reply_string(struct reply *reply, const char *key, const char *value);
void reply_int(struct reply *reply, const char *key, int64_t value);
void reply_bool(struct reply *reply, const char *key, bool value);
void reply_key(struct reply *reply, const char *key);
/* Sends the map as a frame of this type and frees it. */
void reply_send(struct reply *reply, uint8_t type);

/* {ok: true} and {ok: false, error, message}. */
void result_ok(uint32_t session);
void result_error(uint32_t session, const char *error, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
