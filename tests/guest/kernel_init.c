// SPDX-License-Identifier: Apache-2.0
/*
 * The only program of the kernel tests' guests: it keeps memory, processes,
 * floating point registers and (if there is one) a disk busy, and checks all
 * of it. Every 100 ms a line on the console says how far it is and how much
 * was wrong. Commands come line by line on /dev/ttyS0, as from an agent.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, DISK_BLOCKS = 256 };

static atomic_ulong rounds, forks, blocks, bad;
static size_t pages;

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15;
	return x ^ (x >> 29);
}

/* Every page carries the number of the last round at three places. */
static void *check_memory(void *unused)
{
	uint64_t *memory = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (uint64_t round = 1;; round++) {
		for (size_t page = 0; page < pages; page++) {
			uint64_t *words = memory + page * WORDS, old = mix(page ^ (round - 1) << 24);

			if (round > 1 && (words[0] != old || words[WORDS / 2] != ~old || words[WORDS - 1] != old + 1))
				atomic_fetch_add(&bad, 1);
			old = mix(page ^ round << 24);
			words[0] = old;
			words[WORDS / 2] = ~old;
			words[WORDS - 1] = old + 1;
		}
		atomic_fetch_add(&rounds, 1);
	}
	return unused;
}

/* Values that live in vector registers while the guest is frozen. */
static void *check_registers(void *unused)
{
	typedef double vector __attribute__((vector_size(32)));
	vector base = {1, 2, 3, 4};

	for (;;) {
		vector sum = base;

		for (int i = 0; i < 1000000; i++)
			sum = sum * (vector){1, 1, 1, 1} + (vector){1, 2, 3, 4};
		for (int lane = 0; lane < 4; lane++)
			if (sum[lane] != 1000001.0 * (lane + 1))
				atomic_fetch_add(&bad, 1);
		atomic_fetch_add(&rounds, 1);
	}
	return unused;
}

static void *check_forks(void *unused)
{
	enum { BYTES = 32 * PAGE };
	unsigned char *memory = mmap(0, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (unsigned char value = 1;; value = value % 250 + 1) {
		int status = 0;
		pid_t child;

		memset(memory, value, BYTES);
		child = fork();
		if (child == 0) {
			int right = 1;

			for (int i = 0; i < BYTES; i++)
				right &= memory[i] == value;
			memset(memory, 255, BYTES);
			_exit(right ? value : 255);
		}
		if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) ||
			WEXITSTATUS(status) != value || memory[BYTES - 1] != value)
			atomic_fetch_add(&bad, 1);
		atomic_fetch_add(&forks, 1);
	}
	return unused;
}

static void *check_disk(void *unused)
{
	int disk = open("/dev/vda", O_RDWR | O_DIRECT);
	uint64_t *block;

	if (disk < 0 || posix_memalign((void **)&block, PAGE, PAGE))
		return unused;
	for (uint64_t round = 1;; round++) {
		for (off_t at = 0; at < DISK_BLOCKS; at++) {
			if (pread(disk, block, PAGE, at * PAGE) != PAGE)
				atomic_fetch_add(&bad, 1);
			for (int word = 0; round > 1 && word < WORDS; word++)
				if (block[word] != mix(at ^ (round - 1) << 24) + word)
					atomic_fetch_add(&bad, 1);
			for (int word = 0; word < WORDS; word++)
				block[word] = mix(at ^ round << 24) + word;
			if (pwrite(disk, block, PAGE, at * PAGE) != PAGE || (at % 64 == 0 && fsync(disk)))
				atomic_fetch_add(&bad, 1);
			atomic_fetch_add(&blocks, 1);
		}
	}
	return unused;
}

static void *serve(void *unused)
{
	int fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
	struct termios settings;
	FILE *file;
	char line[256];

	if (fd < 0 || tcgetattr(fd, &settings))
		return unused;
	cfmakeraw(&settings);
	tcsetattr(fd, TCSANOW, &settings);
	file = fdopen(fd, "r");
	dprintf(fd, "ready\n");
	while (fgets(line, sizeof line, file)) {
		line[strcspn(line, "\n")] = 0;
		if (!strcmp(line, "poweroff"))
			reboot(RB_POWER_OFF);
		if (!strcmp(line, "halt"))
			reboot(RB_HALT_SYSTEM);
		if (!strcmp(line, "reboot"))
			reboot(RB_AUTOBOOT);
		if (!strcmp(line, "panic"))
			_exit(7);
		if (!strcmp(line, "time")) {
			struct timespec real, monotonic;

			clock_gettime(CLOCK_REALTIME, &real);
			clock_gettime(CLOCK_MONOTONIC, &monotonic);
			dprintf(fd, "time %ld.%09ld %ld.%09ld\n", real.tv_sec, real.tv_nsec, monotonic.tv_sec,
				monotonic.tv_nsec);
			continue;
		}
		dprintf(fd, "echo %s\n", line);
	}
	return unused;
}

int main(void)
{
	const char *mode = getenv("work"), *size = getenv("pages");
	pthread_t thread;

	mount("proc", "/proc", "proc", 0, 0);
	mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
	pages = size ? atoi(size) : 256;
	mode = mode ? mode : "";
	if (strstr(mode, "memory"))
		for (int i = 0; i < 2; i++)
			pthread_create(&thread, 0, check_memory, 0);
	if (strstr(mode, "registers"))
		pthread_create(&thread, 0, check_registers, 0);
	if (strstr(mode, "forks"))
		pthread_create(&thread, 0, check_forks, 0);
	if (strstr(mode, "disk"))
		pthread_create(&thread, 0, check_disk, 0);
	/* "panic" must be the end of pid 1, so this one serves. */
	pthread_create(&thread, 0, serve, 0);
	for (unsigned long tick = 0;; tick++) {
		printf("CHECK tick=%lu rounds=%lu forks=%lu blocks=%lu bad=%lu\n", tick, rounds, forks, blocks, bad);
		fflush(stdout);
		usleep(100000);
	}
}
