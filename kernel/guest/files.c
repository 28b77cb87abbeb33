// SPDX-License-Identifier: Apache-2.0
/*
 * mobi-files: files whose every byte is known, so that a reader far away can tell a wrong one without a checksum list.
 *
 *   mobi-files make DIRECTORY COUNT MIB      write file-0 … file-(COUNT-1), each of MIB mebibytes
 *   mobi-files read DIRECTORY [SECONDS]      read them in turn until the time is over (0 = for ever)
 *
 * Word w of file f is a mixed function of (f, w). `read` bypasses the page cache, so each byte crosses the network each
 * time; it prints one JSON object a line: {"t": seconds, "bytes": n} for every 100 ms, {"t", "file", "bytes",
 * "seconds", "wrong": words} for every file, and a last {"reads", "bad", "bytes"}. Times are CLOCK_REALTIME, to lay
 * them beside a migration's.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BLOCK (256 * 1024)
#define FILES_MAX 1024
#define TICK 0.1

static _Alignas(4096) uint64_t block[BLOCK / 8];
static double tick_start;
static uint64_t tick_bytes;
static volatile sig_atomic_t stopped;

static uint64_t word(uint64_t file, uint64_t index)
{
	uint64_t x = file << 40 ^ index;

	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9u;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void path_of(char path[4096], const char *directory, unsigned long file)
{
	snprintf(path, 4096, "%s/file-%lu", directory, file);
}

static int make(const char *directory, unsigned long count, unsigned long mebibytes)
{
	char path[4096];

	for (unsigned long f = 0; f < count; f++) {
		uint64_t blocks = mebibytes * 1048576 / BLOCK;
		int fd;

		path_of(path, directory, f);
		fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
		for (uint64_t b = 0; fd >= 0 && b < blocks; b++) {
			for (size_t i = 0; i < BLOCK / 8; i++)
				block[i] = word(f, b * (BLOCK / 8) + i);
			if (write(fd, block, BLOCK) != BLOCK) {
				fd = -1;
				break;
			}
		}
		if (fd < 0 || fsync(fd) || close(fd)) {
			fprintf(stderr, "mobi-files: cannot write %s: %s\n", path, strerror(errno));
			return 1;
		}
	}
	return 0;
}

static void count_bytes(uint64_t bytes, double at)
{
	while (at >= tick_start + TICK) {
		printf("{\"t\": %.3f, \"bytes\": %llu}\n", tick_start, (unsigned long long)tick_bytes);
		fflush(stdout);
		tick_bytes = 0;
		tick_start += TICK;
	}
	tick_bytes += bytes;
}

struct outcome {
	uint64_t bytes, wrong;
	bool whole;
};

/* Reads one file to its end, or until the deadline. */
static struct outcome read_file(const char *path, unsigned long file, double deadline)
{
	struct outcome outcome = {0};
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
	ssize_t n;

	if (fd < 0 && errno == EINVAL)
		fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0) {
		fprintf(stderr, "mobi-files: cannot read %s: %s\n", path, strerror(errno));
		outcome.wrong = 1;
		return outcome;
	}
	while ((n = read(fd, block, BLOCK)) > 0) {
		for (size_t i = 0; i < (size_t)n / 8; i++)
			outcome.wrong += block[i] != word(file, outcome.bytes / 8 + i);
		outcome.bytes += (uint64_t)n;
		count_bytes((uint64_t)n, now());
		if (stopped || (deadline > 0 && now() > deadline))
			break;
	}
	if (n < 0) {
		fprintf(stderr, "mobi-files: reading %s: %s\n", path, strerror(errno));
		outcome.wrong++;
	}
	outcome.whole = n == 0;
	close(fd);
	return outcome;
}

static void stop(int unused)
{
	(void)unused;
	stopped = 1;
}

static int read_all(const char *directory, double seconds)
{
	double deadline = seconds > 0 ? now() + seconds : 0;
	unsigned long reads = 0, bad = 0;
	uint64_t bytes = 0;
	char path[4096];
	struct stat st;

	tick_start = now();
	for (unsigned long f = 0; !stopped && (deadline == 0 || now() < deadline); f = (f + 1) % FILES_MAX) {
		struct outcome outcome;
		double start = now();

		path_of(path, directory, f);
		if (f > 0 && stat(path, &st) && errno == ENOENT) {
			f = FILES_MAX - 1;
			continue;
		}
		outcome = read_file(path, f, deadline);
		bytes += outcome.bytes;
		reads += outcome.whole || outcome.wrong;
		bad += outcome.wrong > 0;
		printf("{\"t\": %.3f, \"file\": %lu, \"bytes\": %llu, \"seconds\": %.3f, \"wrong\": %llu, \"whole\": "
		       "%s}\n",
			start, f, (unsigned long long)outcome.bytes, now() - start, (unsigned long long)outcome.wrong,
			outcome.whole ? "true" : "false");
		fflush(stdout);
		if (!outcome.bytes)
			sleep(1);
	}
	printf("{\"reads\": %lu, \"bad\": %lu, \"bytes\": %llu}\n", reads, bad, (unsigned long long)bytes);
	return bad ? 1 : 0;
}

int main(int argc, char **argv)
{
	signal(SIGTERM, stop);
	signal(SIGINT, stop);
	if (argc == 5 && strcmp(argv[1], "make") == 0)
		return make(argv[2], strtoul(argv[3], NULL, 10), strtoul(argv[4], NULL, 10));
	if ((argc == 3 || argc == 4) && strcmp(argv[1], "read") == 0)
		return read_all(argv[2], argc == 4 ? strtod(argv[3], NULL) : 0);
	fprintf(stderr, "usage: mobi-files make DIRECTORY COUNT MIB | mobi-files read DIRECTORY [SECONDS]\n");
	return 2;
}
