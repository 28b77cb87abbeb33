/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A first look at a datagram, before msgpack-c: it allocates what a container's header claims, and five bytes can claim
 * four billion elements. Here every announced element must have at least one byte left to stand in.
 */
#include "control_internal.h"

static uint64_t big_endian(const uint8_t *bytes, size_t size)
{
	uint64_t value = 0;

	for (size_t i = 0; i < size; i++)
		value = value << 8 | bytes[i];
	return value;
}

struct shape {
	uint8_t length_size;  /* bytes of the length field after the tag */
	uint8_t payload;      /* bytes after it, besides what the field says */
	uint8_t elements_per; /* objects for each one counted (1 array, 2 map); 0: the field counts bytes */
};

/* Tags 0xc0 to 0xdf, in order. */
static const struct shape shapes[32] = {
	{0}, {0}, {0}, {0},                                     /* nil, never used, false, true */
	{1, 0, 0}, {2, 0, 0}, {4, 0, 0},                        /* bin */
	{1, 1, 0}, {2, 1, 0}, {4, 1, 0},                        /* ext */
	{0, 4, 0}, {0, 8, 0},                                   /* float */
	{0, 1, 0}, {0, 2, 0}, {0, 4, 0}, {0, 8, 0},             /* uint */
	{0, 1, 0}, {0, 2, 0}, {0, 4, 0}, {0, 8, 0},             /* int */
	{0, 2, 0}, {0, 3, 0}, {0, 5, 0}, {0, 9, 0}, {0, 17, 0}, /* fixext */
	{1, 0, 0}, {2, 0, 0}, {4, 0, 0},                        /* str */
	{2, 0, 1}, {4, 0, 1},                                   /* array */
	{2, 0, 2}, {4, 0, 2},                                   /* map */
};

bool control_plausible(const char *data, size_t size)
{
	const uint8_t *at = (const uint8_t *)data, *end = at + size;
	uint64_t wanted = 1;

	while (wanted) {
		uint64_t bytes = 0, count = 0;
		struct shape shape = {0};
		uint8_t tag;

		if (wanted > (uint64_t)(end - at))
			return false;
		tag = *at++;
		wanted--;
		if (tag >= 0xc0 && tag <= 0xdf) {
			shape = shapes[tag - 0xc0];
			if (shape.length_size > end - at)
				return false;
			count = big_endian(at, shape.length_size);
			bytes = shape.payload + (shape.elements_per ? 0 : count);
			at += shape.length_size;
		} else if (tag >= 0xa0 && tag < 0xc0) {
			bytes = tag & 0x1f;
		} else if (tag >= 0x80 && tag < 0xa0) {
			count = tag & 0x0f;
			shape.elements_per = tag < 0x90 ? 2 : 1;
		}
		if (bytes > (uint64_t)(end - at))
			return false;
		at += bytes;
		wanted += count * shape.elements_per;
	}
	return at == end;
}
