// SPDX-License-Identifier: Apache-2.0
#include "message.h"

#include "channel.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool request_open(struct request *request, uint32_t session, const void *payload, size_t length)
{
	size_t offset = 0;

	request->session = session;
	request->map = NULL;
	msgpack_unpacked_init(&request->unpacked);
	if (msgpack_unpack_next(&request->unpacked, payload, length, &offset) != MSGPACK_UNPACK_SUCCESS)
		return false;
	if (request->unpacked.data.type != MSGPACK_OBJECT_MAP)
		return false;
	request->map = &request->unpacked.data.via.map;
	return true;
}

void request_done(struct request *request)
{
	msgpack_unpacked_destroy(&request->unpacked);
}

const msgpack_object *map_get(const msgpack_object_map *map, const char *key)
{
	for (uint32_t i = 0; i < map->size; i++) {
		const msgpack_object *k = &map->ptr[i].key;

		if (k->type == MSGPACK_OBJECT_STR && k->via.str.size == strlen(key) &&
			memcmp(k->via.str.ptr, key, k->via.str.size) == 0)
			return &map->ptr[i].val;
	}
	return NULL;
}

char *object_string(const msgpack_object *object)
{
	if (!object || object->type != MSGPACK_OBJECT_STR)
		return NULL;
	return strndup(object->via.str.ptr, object->via.str.size);
}

char *map_string(const msgpack_object_map *map, const char *key)
{
	return object_string(map_get(map, key));
}

int64_t map_int(const msgpack_object_map *map, const char *key, int64_t otherwise)
{
	const msgpack_object *value = map_get(map, key);

	if (!value ||
		(value->type != MSGPACK_OBJECT_POSITIVE_INTEGER && value->type != MSGPACK_OBJECT_NEGATIVE_INTEGER))
		return otherwise;
	return value->via.i64;
}

bool map_bool(const msgpack_object_map *map, const char *key, bool otherwise)
{
	const msgpack_object *value = map_get(map, key);

	return value && value->type == MSGPACK_OBJECT_BOOLEAN ? value->via.boolean : otherwise;
}

char **map_strings(const msgpack_object_map *map, const char *key)
{
	const msgpack_object *value = map_get(map, key);
	char **list;

	if (!value || value->type != MSGPACK_OBJECT_ARRAY)
		return NULL;
	list = calloc((size_t)value->via.array.size + 1, sizeof *list);
	for (uint32_t i = 0; list && i < value->via.array.size; i++) {
		list[i] = object_string(&value->via.array.ptr[i]);
		if (!list[i]) {
			strings_free(list);
			return NULL;
		}
	}
	return list;
}

void strings_free(char **strings)
{
	for (char **s = strings; s && *s; s++)
		free(*s);
	free(strings);
}

void reply_open(struct reply *reply, uint32_t session, size_t keys)
{
	reply->session = session;
	msgpack_sbuffer_init(&reply->buffer);
	msgpack_packer_init(&reply->packer, &reply->buffer, msgpack_sbuffer_write);
	msgpack_pack_map(&reply->packer, keys);
}

void reply_key(struct reply *reply, const char *key)
{
	msgpack_pack_str_with_body(&reply->packer, key, strlen(key));
}

void reply_string(struct reply *reply, const char *key, const char *value)
{
	reply_key(reply, key);
	msgpack_pack_str_with_body(&reply->packer, value, strlen(value));
}

void reply_int(struct reply *reply, const char *key, int64_t value)
{
	reply_key(reply, key);
	msgpack_pack_int64(&reply->packer, value);
}

void reply_bool(struct reply *reply, const char *key, bool value)
{
	reply_key(reply, key);
	if (value)
		msgpack_pack_true(&reply->packer);
	else
		msgpack_pack_false(&reply->packer);
}

void reply_send(struct reply *reply, uint8_t type)
{
	if (!channel_send(type, reply->session, reply->buffer.data, reply->buffer.size))
		fprintf(stderr, "mobi-agent: the host does not read; a result of %zu bytes is lost\n",
			reply->buffer.size);
	msgpack_sbuffer_destroy(&reply->buffer);
}

void result_ok(uint32_t session)
{
	struct reply reply;

	reply_open(&reply, session, 1);
	reply_bool(&reply, "ok", true);
	reply_send(&reply, FRAME_RESULT);
}

void result_error(uint32_t session, const char *error, const char *format, ...)
{
	struct reply reply;
	char text[512];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	reply_open(&reply, session, 3);
	reply_bool(&reply, "ok", false);
	reply_string(&reply, "error", error);
	reply_string(&reply, "message", text);
	reply_send(&reply, FRAME_RESULT);
}
