/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Speaks the freeze protocol like a guest's kernel, without a guest: for what a real one does too rarely to be waited
 * for. The option `standin=WORD` (given by `--append`) says which mistake it makes; `standin=none`: none.
 *
 *	silent		never says BOOTED
 *	mute		does not answer FREEZE
 *	late		answers FREEZE after half a second
 *	refuse		answers FREEZE with FAILED
 *	die		is killed by SIGSEGV when asked to freeze
 *	slow		answers GO after half a second
 *	stay		answers GO with FAILED
 *	linger		says POWEROFF at once, but does not end
 *	garbage		sends datagrams of wrong length and reports nobody asked for
 *	escape		tries to leave the sandbox, prints what it could do, powers off
 */
#define _GNU_SOURCE
#include "../kernel/uml/include/freeze_protocol.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MEMORY_FD 100
#define CONTROL_FD 101

static const char *mistake = "none";
static unsigned long long memory;
static bool resume;
static pid_t outside; /* `outside=PID`: a process of the host to attack */

static unsigned long long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (unsigned long long)time.tv_sec * 1000000000ull + (unsigned long long)time.tv_nsec;
}

static void report(unsigned int kind, unsigned int sequence, const char *text)
{
	struct freeze_report report = {.kind = kind, .sequence = sequence, .t_begin = now(), .t_done = now()};

	snprintf(report.text, sizeof(report.text), "%s", text);
	if (kind == FREEZE_KIND_FAILED)
		report.error = -EBUSY;
	if (send(CONTROL_FD, &report, sizeof(report), MSG_NOSIGNAL) < 0)
		exit(3);
}

static void answer_freeze(unsigned int sequence)
{
	if (strcmp(mistake, "mute") == 0)
		return;
	if (strcmp(mistake, "die") == 0)
		raise(SIGSEGV);
	if (strcmp(mistake, "late") == 0)
		nanosleep(&(struct timespec){.tv_nsec = 500000000}, NULL);
	if (strcmp(mistake, "refuse") == 0)
		report(FREEZE_KIND_FAILED, sequence, "devices\tbusy");
	else
		report(FREEZE_KIND_FROZEN, sequence, "");
}

static void answer_go(unsigned int sequence)
{
	if (strcmp(mistake, "slow") == 0)
		nanosleep(&(struct timespec){.tv_nsec = 500000000}, NULL);
	if (strcmp(mistake, "stay") == 0)
		report(FREEZE_KIND_FAILED, sequence, "devices busy");
	else
		report(FREEZE_KIND_RUNNING, sequence, "");
}

static int serve(void)
{
	struct freeze_request request;

	while (recv(CONTROL_FD, &request, sizeof(request), 0) == (ssize_t)sizeof(request)) {
		if (request.op == FREEZE_OP_EXIT)
			return 0;
		if (request.op == FREEZE_OP_FREEZE)
			answer_freeze(request.sequence);
		else
			answer_go(request.sequence);
	}
	return 1;
}

static void say(const char *what, bool done)
{
	printf("%s: %s\n", what, done ? "possible" : "refused");
	fflush(stdout);
}

static bool can_connect(int family, const struct sockaddr *address, socklen_t size)
{
	int fd = socket(family, SOCK_STREAM, 0);

	return fd >= 0 && (connect(fd, address, size) == 0 || errno == ECONNREFUSED);
}

static bool can_exec(const char *path)
{
	char *const argv[] = {"sh", "-c", "exit 0", NULL};
	int fd = open(path, O_PATH), status = 1;
	pid_t child = fork();

	if (child == 0) {
		syscall(SYS_execveat, fd, "", argv, NULL, AT_EMPTY_PATH);
		_exit(1);
	}
	return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

static bool can_clone(unsigned long flags)
{
	pid_t child = (pid_t)syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);

	if (child == 0)
		_exit(0);
	return child > 0;
}

/* Arguments that do no harm where the call is possible: then it fails with another error. */
static bool can_mount(void)
{
	return mount("none", "/nowhere", "tmpfs", 0, NULL) == 0 || errno != EPERM;
}

/* Whether it is killed is for the test to see: only the delivery is refused. */
static void kill_by_descriptor(pid_t victim)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0 || fcntl(pair[0], F_SETOWN, victim) < 0 ||
		fcntl(pair[0], F_SETSIG, SIGKILL) < 0 || fcntl(pair[0], F_SETFL, O_ASYNC) < 0)
		return;
	(void)!write(pair[1], "x", 1);
}

/* Everything that a guest which took over its kernel would try first. */
static void escape(void)
{
	struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = htons(22)};
	struct sockaddr_un unix_socket = {.sun_family = AF_UNIX, .sun_path = "/tmp/.X11-unix/X0"};
	pid_t shim = outside ? outside : getppid();

	local.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	say("read /etc/passwd", open("/etc/passwd", O_RDONLY) >= 0);
	say("read /proc/1/environ", open("/proc/1/environ", O_RDONLY) >= 0);
	say("list /", open("/", O_RDONLY | O_DIRECTORY) >= 0);
	say("write /tmp", open("/tmp", O_WRONLY | O_TMPFILE, 0600) >= 0);
	say("write cpuinfo", open("/proc/cpuinfo", O_WRONLY) >= 0);
	say("make a directory", mkdir("/tmp/mobi-escape", 0700) == 0 && rmdir("/tmp/mobi-escape") == 0);
	say("execute a program", can_exec("/bin/sh"));
	say("connect to TCP", can_connect(AF_INET, (struct sockaddr *)&local, sizeof(local)));
	say("connect to unix socket", can_connect(AF_UNIX, (struct sockaddr *)&unix_socket, sizeof(unix_socket)));
	say("bind a socket", socket(AF_UNIX, SOCK_DGRAM, 0) >= 0);
	say("raw socket", socket(AF_PACKET, SOCK_RAW, 0) >= 0);
	say("signal the parent", kill(shim, 0) == 0);
	say("trace the parent", ptrace(PTRACE_ATTACH, shim, 0, 0) == 0);
	say("unshare", unshare(CLONE_NEWUTS) == 0);
	say("clone into namespaces", can_clone(CLONE_NEWUSER));
	say("mount", can_mount());
	say("change the root", chroot("/") == 0);
	say("become another user", setuid(0) == 0);
	say("load a bpf program", syscall(SYS_bpf, 0, NULL, 0) >= 0 || errno != EPERM);
	say("use io_uring", syscall(SYS_io_uring_setup, 1, NULL) >= 0 || errno != EPERM);
	say("read kernel keys", syscall(SYS_keyctl, 0, -3, 1) >= 0);
	say("watch performance", syscall(SYS_perf_event_open, NULL, 0, -1, -1, 0) >= 0 || errno != EPERM);
	say("read other memory", syscall(SYS_process_vm_readv, shim, NULL, 0, NULL, 0, 0) >= 0);
	say("type into a terminal", ioctl(0, TIOCSTI, "x") == 0);
	kill_by_descriptor(shim);
	say("fill the host's memory", ftruncate(MEMORY_FD, (off_t)(memory + (1ull << 30))) == 0);
}

static void parse(char **argv)
{
	for (; *argv; argv++) {
		if (strncmp(*argv, "standin=", 8) == 0)
			mistake = *argv + 8;
		else if (strncmp(*argv, "mem=", 4) == 0)
			memory = strtoull(*argv + 4, NULL, 10);
		else if (strncmp(*argv, "outside=", 8) == 0)
			outside = atoi(*argv + 8);
		else if (strcmp(*argv, "freeze_resume") == 0)
			resume = true;
	}
}

int main(int argc, char **argv)
{
	(void)argc;
	signal(SIGXFSZ, SIG_IGN);
	parse(argv);
	if (!resume && ftruncate(MEMORY_FD, (off_t)memory) < 0)
		return 4;
	if (strcmp(mistake, "silent") != 0)
		report(resume ? FREEZE_KIND_WAITING : FREEZE_KIND_BOOTED, 0, "");
	if (strcmp(mistake, "garbage") == 0) {
		send(CONTROL_FD, "x", 1, 0);
		send(CONTROL_FD, (char[4096]){0}, 4096, 0);
		for (unsigned int kind = 0; kind < 12; kind++)
			if (kind < FREEZE_KIND_BOOTED || kind > FREEZE_KIND_PANIC)
				report(kind, 77, "nobody asked");
	}
	if (strcmp(mistake, "escape") == 0) {
		escape();
		report(FREEZE_KIND_POWEROFF, 0, "");
		return 0;
	}
	if (strcmp(mistake, "linger") == 0) {
		report(FREEZE_KIND_POWEROFF, 0, "");
		nanosleep(&(struct timespec){.tv_sec = 60}, NULL);
	}
	return serve();
}
