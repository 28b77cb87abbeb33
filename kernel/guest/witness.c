// SPDX-License-Identifier: Apache-2.0
/*
 * mobi-witness: a program that knows whether its machine was moved correctly.
 *
 *   mobi-witness run [--memory MIB] [--threads N] [--rate MB/S] [--disk FILE] [--listen PORT | --connect HOST:PORT]
 *                    [--socket PATH]
 *   mobi-witness report [--socket PATH]
 *
 * Every page of memory holds its own address, its round and a checksum over all of it: a stale, torn or exchanged page
 * cannot look right. `--rate` says how many megabytes all threads together write per second. The disk file is a ring of
 * records written with fsync and read back. The TCP stream carries numbered, checksummed records both ways over one
 * connection, which is never opened anew: a connection that breaks is an error. A clock loop keeps the largest hole in
 * CLOCK_MONOTONIC, the receiver the largest one between two records; both begin anew after every report. Each kind of
 * check counts what it did and what was wrong; `report` prints that as one JSON object and exits 1 if anything was.
 *
 * The idea of an increasing pattern checked from inside is that of QEMU's tests/qtest/migration-test.c.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

#define PAGE 4096
#define DISK_RECORDS 256
#define RECORD_WORDS 128
#define DEFAULT_SOCKET "/run/mobi-witness.sock"

struct page {
	uint64_t address, round, fill[PAGE / 8 - 3], sum;
};
_Static_assert(sizeof(struct page) == PAGE, "a page is a page");

struct record {
	uint64_t number, words[RECORD_WORDS], sum;
};

static struct {
	_Atomic uint64_t pages, page_errors, records, disk_errors, sent, received, tcp_errors, connected,
		largest_gap_ns, largest_tcp_gap_ns;
} count;
static char first_error[256];
static pthread_mutex_t error_lock = PTHREAD_MUTEX_INITIALIZER;

static struct {
	size_t memory;
	int threads;
	uint64_t rate; /* bytes/s, 0 = as fast as it goes */
	const char *disk, *connect, *socket;
	int listen;
} options = {.memory = 16 << 20, .threads = 2, .socket = DEFAULT_SOCKET};

static __attribute__((format(printf, 2, 3))) void wrong(_Atomic uint64_t *counter, const char *format, ...)
{
	va_list arguments;

	atomic_fetch_add(counter, 1);
	pthread_mutex_lock(&error_lock);
	if (!first_error[0]) {
		va_start(arguments, format);
		vsnprintf(first_error, sizeof first_error, format, arguments);
		va_end(arguments);
	}
	pthread_mutex_unlock(&error_lock);
}

static void pause_ms(long milliseconds)
{
	const struct timespec t = {.tv_sec = milliseconds / 1000, .tv_nsec = milliseconds % 1000 * 1000000};

	nanosleep(&t, NULL);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void keep_larger(_Atomic uint64_t *largest, uint64_t value)
{
	uint64_t seen = atomic_load(largest);

	while (value > seen && !atomic_compare_exchange_weak(largest, &seen, value))
		continue;
}

/* ---- memory ---- */

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9u;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static uint64_t page_fill(struct page *page, uint64_t round)
{
	uint64_t sum = 0, seed = mix((uint64_t)(uintptr_t)page + round);

	page->address = (uint64_t)(uintptr_t)page;
	page->round = round;
	for (size_t i = 0; i < sizeof page->fill / 8; i++) {
		page->fill[i] = mix(seed + i);
		sum += page->fill[i];
	}
	page->sum = sum ^ round;
	return round;
}

static bool page_right(const struct page *page, uint64_t round)
{
	uint64_t sum = 0, seed = mix((uint64_t)(uintptr_t)page + round);
	bool right = page->address == (uint64_t)(uintptr_t)page && page->round == round;

	for (size_t i = 0; right && i < sizeof page->fill / 8; i++) {
		right = page->fill[i] == mix(seed + i);
		sum += page->fill[i];
	}
	return right && page->sum == (sum ^ round);
}

/* Wait until the next page is due. A machine that was away does not catch up: that would be a burst. */
static void keep_pace(uint64_t *due)
{
	const uint64_t period = PAGE * UINT64_C(1000000000) * (uint64_t)options.threads / options.rate;
	const uint64_t now = now_ns();

	*due += period;
	if (*due > now + 1000000)
		pause_ms((long)((*due - now) / 1000000));
	else if (now > *due + 20000000)
		*due = now;
}

static void *check_memory(void *unused)
{
	uint64_t due = now_ns();
	size_t pages = options.memory / (size_t)options.threads / PAGE;
	struct page *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)unused;
	if (memory == MAP_FAILED) {
		wrong(&count.page_errors, "no memory for %zu pages", pages);
		return NULL;
	}
	for (uint64_t round = 0;; round++) {
		for (size_t i = 0; i < pages; i++) {
			if (round && !page_right(&memory[i], round - 1))
				wrong(&count.page_errors, "page %p is wrong in round %llu", (void *)&memory[i],
					(unsigned long long)round);
			page_fill(&memory[i], round);
			atomic_fetch_add(&count.pages, 1);
			if (options.rate)
				keep_pace(&due);
			else if (i % 256 == 255)
				pause_ms(1);
		}
		pause_ms(1);
	}
}

/* ---- disk ---- */

static void record_fill(struct record *record, uint64_t number)
{
	record->number = number;
	for (size_t i = 0; i < RECORD_WORDS; i++)
		record->words[i] = mix(number * RECORD_WORDS + i);
	record->sum = crc32(0, (const uint8_t *)record, offsetof(struct record, sum));
}

static bool record_right(const struct record *record, uint64_t number)
{
	struct record expected;

	record_fill(&expected, number);
	return memcmp(record, &expected, sizeof expected) == 0;
}

static void *check_disk(void *unused)
{
	int fd = open(options.disk, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	(void)unused;
	if (fd < 0) {
		wrong(&count.disk_errors, "cannot open %s: %s", options.disk, strerror(errno));
		return NULL;
	}
	for (uint64_t number = 0;; number++) {
		struct record record;
		uint64_t old = number >= DISK_RECORDS ? mix(number) % (DISK_RECORDS - 1) + 1 : number;

		record_fill(&record, number);
		if (pwrite(fd, &record, sizeof record, (off_t)(number % DISK_RECORDS * PAGE)) != sizeof record ||
			fsync(fd))
			wrong(&count.disk_errors, "cannot write record %llu: %s", (unsigned long long)number,
				strerror(errno));
		old = number - old;
		posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
		if (pread(fd, &record, sizeof record, (off_t)(old % DISK_RECORDS * PAGE)) != sizeof record ||
			!record_right(&record, old))
			wrong(&count.disk_errors, "record %llu on disk is wrong", (unsigned long long)old);
		atomic_fetch_add(&count.records, 1);
		pause_ms(5);
	}
}

/* ---- TCP ---- */

static bool transfer(int fd, void *data, size_t size, bool out)
{
	for (size_t done = 0; done < size;) {
		ssize_t n = out ? send(fd, (char *)data + done, size - done, MSG_NOSIGNAL)
				: recv(fd, (char *)data + done, size - done, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		done += (size_t)n;
	}
	return true;
}

static void *send_records(void *argument)
{
	int fd = (int)(intptr_t)argument;

	for (uint64_t number = 0;; number++) {
		struct record record;

		record_fill(&record, number);
		if (!transfer(fd, &record, sizeof record, true)) {
			wrong(&count.tcp_errors, "the connection broke while sending: %s", strerror(errno));
			return NULL;
		}
		atomic_fetch_add(&count.sent, 1);
		pause_ms(1);
	}
}

static void exchange(int fd)
{
	uint64_t before = now_ns(), after;
	pthread_t sender;
	int one = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	atomic_fetch_add(&count.connected, 1);
	if (pthread_create(&sender, NULL, send_records, (void *)(intptr_t)fd))
		return;
	for (uint64_t number = 0;; number++) {
		struct record record;

		if (!transfer(fd, &record, sizeof record, false)) {
			wrong(&count.tcp_errors, "the connection broke while receiving: %s", strerror(errno));
			return;
		}
		if (!record_right(&record, number))
			wrong(&count.tcp_errors, "record %llu of the stream is wrong", (unsigned long long)number);
		atomic_fetch_add(&count.received, 1);
		after = now_ns();
		keep_larger(&count.largest_tcp_gap_ns, after - before);
		before = after;
	}
}

static void *serve_tcp(void *unused)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)options.listen)};
	int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1, off = 0, fd;

	(void)unused;
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
	if (bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 1) ||
		(fd = accept(listener, NULL, NULL)) < 0) {
		wrong(&count.tcp_errors, "cannot listen on port %d: %s", options.listen, strerror(errno));
		return NULL;
	}
	exchange(fd);
	return NULL;
}

static void *connect_tcp(void *unused)
{
	char host[256];
	const char *colon = strrchr(options.connect, ':');
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
	int fd = -1;

	(void)unused;
	snprintf(host, sizeof host, "%.*s", (int)(colon ? colon - options.connect : 0), options.connect);
	if (!colon || getaddrinfo(host, colon + 1, &hints, &found)) {
		wrong(&count.tcp_errors, "%s is no HOST:PORT that resolves", options.connect);
		return NULL;
	}
	for (int try = 0; try < 600; try++) {
		fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (connect(fd, found->ai_addr, found->ai_addrlen) == 0)
			break;
		close(fd);
		fd = -1;
		pause_ms(100);
	}
	freeaddrinfo(found);
	if (fd < 0)
		wrong(&count.tcp_errors, "cannot connect to %s: %s", options.connect, strerror(errno));
	else
		exchange(fd);
	return NULL;
}

/* ---- clock ---- */

static void *check_clock(void *unused)
{
	uint64_t before = now_ns(), after;

	(void)unused;
	for (;;) {
		pause_ms(1);
		after = now_ns();
		if (after < before)
			wrong(&count.page_errors, "CLOCK_MONOTONIC went back by %llu ns",
				(unsigned long long)(before - after));
		else
			keep_larger(&count.largest_gap_ns, after - before);
		before = after;
	}
	return NULL;
}

/* ---- report ---- */

static void answer(int fd)
{
	uint64_t bad;
	FILE *out = fdopen(fd, "w");

	if (!out) {
		close(fd);
		return;
	}
	bad = atomic_load(&count.page_errors) + atomic_load(&count.disk_errors) + atomic_load(&count.tcp_errors);
	pthread_mutex_lock(&error_lock);
	fprintf(out,
		"{\"bad\": %llu, \"pages\": %llu, \"page_errors\": %llu, \"disk_records\": %llu, \"disk_errors\": "
		"%llu, "
		"\"tcp_sent\": %llu, \"tcp_received\": %llu, \"tcp_errors\": %llu, \"tcp_connections\": %llu, "
		"\"largest_gap_ms\": %.3f, \"largest_tcp_gap_ms\": %.3f, \"first_error\": \"%s\"}\n",
		(unsigned long long)bad, (unsigned long long)count.pages, (unsigned long long)count.page_errors,
		(unsigned long long)count.records, (unsigned long long)count.disk_errors,
		(unsigned long long)count.sent, (unsigned long long)count.received,
		(unsigned long long)count.tcp_errors, (unsigned long long)count.connected,
		(double)atomic_exchange(&count.largest_gap_ns, 0) / 1e6,
		(double)atomic_exchange(&count.largest_tcp_gap_ns, 0) / 1e6, first_error);
	pthread_mutex_unlock(&error_lock);
	fclose(out);
}

static int unix_address(struct sockaddr_un *address)
{
	address->sun_family = AF_UNIX;
	snprintf(address->sun_path, sizeof address->sun_path, "%s", options.socket);
	return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

static int run(void)
{
	struct sockaddr_un address = {0};
	int listener = unix_address(&address);
	pthread_t thread;

	signal(SIGPIPE, SIG_IGN);
	unlink(options.socket);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4)) {
		fprintf(stderr, "mobi-witness: cannot listen on %s: %s\n", options.socket, strerror(errno));
		return 1;
	}
	for (int i = 0; i < options.threads; i++)
		pthread_create(&thread, NULL, check_memory, NULL);
	pthread_create(&thread, NULL, check_clock, NULL);
	if (options.disk)
		pthread_create(&thread, NULL, check_disk, NULL);
	if (options.listen)
		pthread_create(&thread, NULL, serve_tcp, NULL);
	if (options.connect)
		pthread_create(&thread, NULL, connect_tcp, NULL);
	printf("mobi-witness: running\n");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		if (fd >= 0)
			answer(fd);
	}
}

static int report(void)
{
	struct sockaddr_un address = {0};
	int fd = unix_address(&address);
	char text[2048];
	size_t length = 0;
	ssize_t n;

	if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
		fprintf(stderr, "mobi-witness: none runs at %s: %s\n", options.socket, strerror(errno));
		return 2;
	}
	while ((n = read(fd, text + length, sizeof text - 1 - length)) > 0)
		length += (size_t)n;
	text[length] = 0;
	fputs(text, stdout);
	return strncmp(text, "{\"bad\": 0,", 10) == 0 ? 0 : 1;
}

static int usage(FILE *out)
{
	fprintf(out, "usage: mobi-witness run [--memory MIB] [--threads N] [--rate MB/S] [--disk FILE]\n"
		     "                        [--listen PORT | --connect HOST:PORT] [--socket PATH]\n"
		     "       mobi-witness report [--socket PATH]\n");
	return out == stdout ? 0 : 2;
}

int main(int argc, char **argv)
{
	static const struct option known[] = {{"memory", required_argument, NULL, 'm'},
		{"threads", required_argument, NULL, 't'}, {"rate", required_argument, NULL, 'r'},
		{"disk", required_argument, NULL, 'd'}, {"listen", required_argument, NULL, 'l'},
		{"connect", required_argument, NULL, 'c'}, {"socket", required_argument, NULL, 's'},
		{"help", no_argument, NULL, 'h'}, {0}};
	int option;

	while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (option) {
		case 'm':
			options.memory = strtoul(optarg, NULL, 10) << 20;
			break;
		case 't':
			options.threads = atoi(optarg);
			break;
		case 'r':
			options.rate = strtoull(optarg, NULL, 10) * 1000000;
			break;
		case 'd':
			options.disk = optarg;
			break;
		case 'l':
			options.listen = atoi(optarg);
			break;
		case 'c':
			options.connect = optarg;
			break;
		case 's':
			options.socket = optarg;
			break;
		default:
			return usage(option == 'h' ? stdout : stderr);
		}
	}
	if (optind == argc - 1 && strcmp(argv[optind], "report") == 0)
		return report();
	if (optind == argc - 1 && strcmp(argv[optind], "run") == 0 && options.threads >= 0)
		return run();
	return usage(stderr);
}
