/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_FUZZ_H
#define MOBI_FUZZ_H

/*
 * What the targets of libFuzzer share. A target is LLVMFuzzerTestOneInput(): it gives one input to a parser as the
 * parser's real caller would and returns; the sanitizers, and check(), end the process when something is wrong. What is
 * static in a source is reached by including the source. Each input begins with the same state, so that a finding
 * can be replayed by itself.
 */
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

/* What must hold whatever the input is. */
#define check(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);                 \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

/* What is left of an input. Numbers are little-endian, and 0 where the input has ended. */
struct input {
	const uint8_t *at;
	size_t left;
};

static inline const uint8_t *input_take(struct input *input, size_t size)
{
	const uint8_t *at = input->at;

	input->at += size;
	input->left -= size;
	return at;
}

static inline uint16_t input_number(struct input *input, size_t bytes)
{
	uint16_t number = 0;

	for (size_t i = 0; i < bytes && input->left; i++)
		number |= (uint16_t)(*input_take(input, 1) << (8 * i));
	return number;
}

/* The next [length 2 | bytes], as much of it as there is, in memory of just that size for the caller to free. */
static inline uint8_t *input_piece(struct input *input, size_t *size)
{
	size_t length = input_number(input, 2);
	uint8_t *piece;

	*size = length < input->left ? length : input->left;
	piece = malloc(*size + (*size == 0));
	check(piece);
	memcpy(piece, input_take(input, *size), *size);
	return piece;
}

/* A file of its own in memory, with the given bytes at its begin. */
static inline int memory_file(const void *data, size_t size, size_t length)
{
	int fd = memfd_create("fuzz", MFD_CLOEXEC);

	check(fd >= 0 && ftruncate(fd, (off_t)length) == 0);
	check(pwrite(fd, data, size < length ? size : length, 0) >= 0);
	return fd;
}

enum { FUZZ_PATH = 100 };

/* A path for a socket or file of this process. */
static inline const char *fuzz_path(char path[FUZZ_PATH], const char *name)
{
	const char *room = getenv("TMPDIR");

	snprintf(path, FUZZ_PATH, "%s/%d-%s", room ? room : "/tmp", (int)getpid(), name);
	return path;
}

#endif
