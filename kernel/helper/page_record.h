/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_PAGE_RECORD_H
#define MOBI_PAGE_RECORD_H

/*
 * What is inside the sealed records of a migration stream. All numbers are little-endian; a record starts with
 *
 *   u8 type | u8 detail | u16 count | u32 region or pass number
 *
 *   HELLO     S→D  detail = protocol version, count regions of {u32 region, u32 disk, u64 size, u32 block size, u32 0}
 *   PAGES     S→D  detail = encoding, count page numbers (u32, ascending), then the pages, raw or as one zstd frame
 *   ZEROS     S→D  count runs {u32 first page, u32 pages}, ascending
 *   PASS      S→D  number of the pass, u64 pages and u64 zero pages sent in it
 *   ROOT      S→D  number of the pass, 16 bytes of root: nothing changes any more
 *   RELEASE   S→D  16 bytes of migration id: the sender gives up the right to run; the last record of a stream
 *   ACCEPTED  D→S  the regions are the receiver's too
 *   REFUSED   D→S  count bytes of text; the stream is over
 *   PASSED    D→S  number of the pass: all of it is applied
 *   MATCHED   D→S  detail = 1 if the receiver's root is the same
 *   RELEASED  D→S  the release arrived
 */
#include <stdint.h>
#include <string.h>

enum page_record_type {
	RECORD_HELLO = 1,
	RECORD_PAGES = 2,
	RECORD_ZEROS = 3,
	RECORD_PASS = 4,
	RECORD_ROOT = 5,
	RECORD_RELEASE = 6,
	RECORD_ACCEPTED = 0x81,
	RECORD_REFUSED = 0x82,
	RECORD_PASSED = 0x84,
	RECORD_MATCHED = 0x85,
	RECORD_RELEASED = 0x86,
};

enum {
	RECORD_VERSION = 1,
	RECORD_HEADER_BYTES = 8,
	RECORD_REGION_BYTES = 24,
	RECORD_PAGES_MAX = 64,
	RECORD_RUNS_MAX = 512,
	ENCODING_RAW = 0,
	ENCODING_ZSTD = 1,
	MIGRATION_ID_BYTES = 16,
};

static inline void put_u16(uint8_t *at, uint16_t value)
{
	at[0] = (uint8_t)value;
	at[1] = (uint8_t)(value >> 8);
}

static inline void put_u32(uint8_t *at, uint32_t value)
{
	put_u16(at, (uint16_t)value);
	put_u16(at + 2, (uint16_t)(value >> 16));
}

static inline void put_u64(uint8_t *at, uint64_t value)
{
	put_u32(at, (uint32_t)value);
	put_u32(at + 4, (uint32_t)(value >> 32));
}

static inline uint16_t get_u16(const uint8_t *at)
{
	return (uint16_t)(at[0] | at[1] << 8);
}

static inline uint32_t get_u32(const uint8_t *at)
{
	return get_u16(at) | (uint32_t)get_u16(at + 2) << 16;
}

static inline uint64_t get_u64(const uint8_t *at)
{
	return get_u32(at) | (uint64_t)get_u32(at + 4) << 32;
}

static inline void put_header(uint8_t *record, uint8_t type, uint8_t detail, uint16_t count, uint32_t number)
{
	record[0] = type;
	record[1] = detail;
	put_u16(record + 2, count);
	put_u32(record + 4, number);
}

#endif
