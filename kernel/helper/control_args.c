/* SPDX-License-Identifier: Apache-2.0 */
/* Reading the arguments of a request: every value is checked for type and range before a role sees it. */
#include "control_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static bool is_string(const msgpack_object *object, const char *text)
{
	return object->type == MSGPACK_OBJECT_STR && object->via.str.size == strlen(text) &&
	       memcmp(object->via.str.ptr, text, object->via.str.size) == 0;
}

const msgpack_object *control_find(const msgpack_object_map *map, const char *key)
{
	for (uint32_t i = 0; i < map->size; i++)
		if (is_string(&map->ptr[i].key, key))
			return &map->ptr[i].val;
	return NULL;
}

static const msgpack_object *find_value(const struct control_args *args, const char *key)
{
	const msgpack_object *value = control_find(args->map, key);

	return value && value->type != MSGPACK_OBJECT_NIL ? value : NULL;
}

bool control_has(const struct control_args *args, const char *key)
{
	return find_value(args, key) != NULL;
}

static bool refuse(const struct control_args *args, const char *key, const char *wanted)
{
	control_error(args->request, CONTROL_BAD_ARGUMENT, "argument '%s%s' %s", args->where, key, wanted);
	return false;
}

static const msgpack_object *require(const struct control_args *args, const char *key)
{
	const msgpack_object *value = find_value(args, key);

	if (!value)
		refuse(args, key, "is missing");
	return value;
}

/* Is the key one of the space-separated words? */
static bool listed(const msgpack_object_str *key, const char *words)
{
	while (words && *words) {
		size_t length = strcspn(words, " ");

		if (length == key->size && memcmp(words, key->ptr, length) == 0)
			return true;
		words += length;
		words += *words == ' ';
	}
	return false;
}

bool control_check_keys(const struct control_args *args, const char *keys)
{
	bool top = args->where[0] == 0;

	for (uint32_t i = 0; i < args->map->size; i++) {
		const msgpack_object *key = &args->map->ptr[i].key;

		if (top && (is_string(key, "id") || is_string(key, "op")))
			continue;
		if (key->type != MSGPACK_OBJECT_STR) {
			control_error(args->request, CONTROL_BAD_ARGUMENT, "names of arguments are strings");
			return false;
		}
		if (!listed(&key->via.str, keys)) {
			control_error(args->request, CONTROL_BAD_ARGUMENT, "argument '%s%.*s' is unknown", args->where,
				(int)(key->via.str.size > 64 ? 64 : key->via.str.size), key->via.str.ptr);
			return false;
		}
	}
	return true;
}

static bool read_u64(const struct control_args *args, const char *key, const msgpack_object *object, uint64_t min,
	uint64_t max, uint64_t *value)
{
	char wanted[96];

	if (object->type == MSGPACK_OBJECT_POSITIVE_INTEGER && object->via.u64 >= min && object->via.u64 <= max) {
		*value = object->via.u64;
		return true;
	}
	snprintf(wanted, sizeof(wanted), "must be a number from %" PRIu64 " to %" PRIu64, min, max);
	return refuse(args, key, wanted);
}

bool control_u64(const struct control_args *args, const char *key, uint64_t min, uint64_t max, uint64_t *value)
{
	const msgpack_object *object = require(args, key);

	return object && read_u64(args, key, object, min, max, value);
}

bool control_u64_optional(const struct control_args *args, const char *key, uint64_t min, uint64_t max, uint64_t *value)
{
	return !control_has(args, key) || control_u64(args, key, min, max, value);
}

bool control_bool(const struct control_args *args, const char *key, bool *value)
{
	const msgpack_object *object = require(args, key);

	if (!object)
		return false;
	if (object->type != MSGPACK_OBJECT_BOOLEAN)
		return refuse(args, key, "must be true or false");
	*value = object->via.boolean;
	return true;
}

bool control_bool_optional(const struct control_args *args, const char *key, bool *value)
{
	return !control_has(args, key) || control_bool(args, key, value);
}

static bool read_str(
	const struct control_args *args, const char *key, const msgpack_object *object, size_t max, const char **value)
{
	char wanted[64], *copy;

	if (object->type != MSGPACK_OBJECT_STR || object->via.str.size > max ||
		memchr(object->via.str.ptr, 0, object->via.str.size)) {
		snprintf(wanted, sizeof(wanted), "must be a string of at most %zu bytes", max);
		return refuse(args, key, wanted);
	}
	copy = msgpack_zone_malloc(&args->request->zone, object->via.str.size + 1);
	if (!copy) {
		control_error(args->request, CONTROL_INTERNAL, "no memory");
		return false;
	}
	memcpy(copy, object->via.str.ptr, object->via.str.size);
	copy[object->via.str.size] = 0;
	*value = copy;
	return true;
}

bool control_str(const struct control_args *args, const char *key, size_t max, const char **value)
{
	const msgpack_object *object = require(args, key);

	return object && read_str(args, key, object, max, value);
}

bool control_choice(const struct control_args *args, const char *key, const char *const *choices, size_t *index)
{
	const msgpack_object *object = require(args, key);
	char wanted[128];
	int length = snprintf(wanted, sizeof(wanted), "must be one of");

	if (!object)
		return false;
	for (size_t i = 0; choices[i]; i++) {
		if (is_string(object, choices[i])) {
			*index = i;
			return true;
		}
		if ((size_t)length < sizeof(wanted))
			length += snprintf(wanted + length, sizeof(wanted) - (size_t)length, " %s", choices[i]);
	}
	return refuse(args, key, wanted);
}

bool control_bytes(const struct control_args *args, const char *key, void *bytes, size_t size)
{
	const msgpack_object *object = require(args, key);
	char wanted[64];

	if (!object)
		return false;
	if (object->type != MSGPACK_OBJECT_BIN || object->via.bin.size != size) {
		snprintf(wanted, sizeof(wanted), "must be %zu bytes", size);
		return refuse(args, key, wanted);
	}
	memcpy(bytes, object->via.bin.ptr, size);
	return true;
}

bool control_list(const struct control_args *args, const char *key, size_t max, const msgpack_object_array **list)
{
	const msgpack_object *object = require(args, key);
	char wanted[64];

	if (!object)
		return false;
	if (object->type != MSGPACK_OBJECT_ARRAY || object->via.array.size > max) {
		snprintf(wanted, sizeof(wanted), "must be a list of at most %zu elements", max);
		return refuse(args, key, wanted);
	}
	*list = &object->via.array;
	return true;
}

static const char *element_name(char *name, size_t size, const char *key, size_t index)
{
	snprintf(name, size, "%.40s[%zu]", key, index);
	return name;
}

bool control_list_map(const struct control_args *args, const char *key, const msgpack_object_array *list, size_t index,
	const char *keys, struct control_args *element)
{
	const msgpack_object *object = &list->ptr[index];
	char name[64];

	if (object->type != MSGPACK_OBJECT_MAP)
		return refuse(args, element_name(name, sizeof(name), key, index), "must be a map");
	element->request = args->request;
	element->map = &object->via.map;
	snprintf(element->where, sizeof(element->where), "%.40s[%zu].", key, index);
	return control_check_keys(element, keys);
}

bool control_list_u64(const struct control_args *args, const char *key, const msgpack_object_array *list, size_t index,
	uint64_t min, uint64_t max, uint64_t *value)
{
	char name[64];

	return read_u64(args, element_name(name, sizeof(name), key, index), &list->ptr[index], min, max, value);
}

bool control_list_str(const struct control_args *args, const char *key, const msgpack_object_array *list, size_t index,
	size_t max, const char **value)
{
	char name[64];

	return read_str(args, element_name(name, sizeof(name), key, index), &list->ptr[index], max, value);
}

size_t control_fd_count(const struct control_request *request)
{
	return request->fd_count;
}

int control_take_fd(struct control_request *request, size_t index)
{
	int fd = -1;

	if (index < request->fd_count) {
		fd = request->fds[index];
		request->fds[index] = -1;
	}
	return fd;
}
