/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The only program of a test guest: it keeps a pattern in memory that a second process rewrites and checks all the
 * time, and takes commands, one per line, on the console. What comes in on /dev/ttyS0 goes back in capitals.
 *
 *	count		-> count N bad M	rounds so far, wrong words seen
 *	disk		-> disk N		a byte written to /dev/vda and read back, past the cache; -1: it failed
 *	poweroff, reboot, panic
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

#define WORDS ((8 << 20) / 8)

struct shared {
	volatile uint64_t rounds, bad;
};

static void set_raw(int fd)
{
	struct termios mode;

	if (tcgetattr(fd, &mode) == 0) {
		cfmakeraw(&mode);
		tcsetattr(fd, TCSANOW, &mode);
	}
}

static void check_pattern(struct shared *shared)
{
	volatile uint64_t *words = malloc(WORDS * sizeof(uint64_t));

	for (uint64_t i = 0; i < WORDS; i++)
		words[i] = i;
	for (uint64_t round = 1;; round++) {
		for (uint64_t i = 0; i < WORDS; i++) {
			if (words[i] != i + round - 1)
				shared->bad++;
			words[i] = i + round;
		}
		shared->rounds = round;
	}
}

static void echo_serial(int fd)
{
	char data[256];
	ssize_t size;

	while ((size = read(fd, data, sizeof(data))) > 0) {
		for (ssize_t i = 0; i < size; i++)
			data[i] = (char)toupper((unsigned char)data[i]);
		if (write(fd, data, (size_t)size) < 0)
			exit(1);
	}
	exit(0);
}

static int try_disk(void)
{
	static unsigned char block[4096] __attribute__((aligned(4096)));
	static unsigned char value;
	int fd = open("/dev/vda", O_RDWR | O_DIRECT), found = -1;

	block[0] = ++value;
	if (fd < 0 || pwrite(fd, block, sizeof(block), 0) != sizeof(block) || fsync(fd) < 0)
		return -1;
	block[0] = 0;
	if (pread(fd, block, sizeof(block), 0) == sizeof(block))
		found = block[0];
	close(fd);
	return found;
}

int main(void)
{
	struct shared *shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char line[64];
	int serial;

	mount("dev", "/dev", "devtmpfs", 0, NULL);
	set_raw(0);
	/* a serial line that nobody has opened loses what comes in, so this is done before "ready" */
	serial = open("/dev/ttyS0", O_RDWR);
	if (serial < 0)
		return 1;
	set_raw(serial);
	if (fork() == 0)
		check_pattern(shared);
	if (fork() == 0)
		echo_serial(serial);
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (strcmp(line, "count\n") == 0)
			printf("count %llu bad %llu\n", (unsigned long long)shared->rounds,
				(unsigned long long)shared->bad);
		else if (strcmp(line, "disk\n") == 0)
			printf("disk %d\n", try_disk());
		else if (strcmp(line, "poweroff\n") == 0)
			reboot(RB_POWER_OFF);
		else if (strcmp(line, "reboot\n") == 0)
			reboot(RB_AUTOBOOT);
		else if (strcmp(line, "panic\n") == 0)
			exit(1);
		fflush(stdout);
	}
	return 1;
}
