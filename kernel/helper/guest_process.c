/* SPDX-License-Identifier: Apache-2.0 */
#include "guest_process.h"

#include "log.h"
#include "loop.h"
#include "sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Descriptors of the child's own, above all that the kernel gets. They vanish at exec. */
#define READY_FD 600
#define KERNEL_FD 601
#define SPARE_FD 610

#define START_TIMEOUT_MS 10000
#define BURY_TRIES 2000

/* What the child says before exec: its layers, or what went wrong. Its pid comes as credentials. */
struct ready_note {
	unsigned int layers;
	char message[GUEST_MESSAGE_MAX];
};

static _Noreturn void give_up(int ready, const char *what)
{
	struct ready_note note = {0};

	snprintf(note.message, sizeof(note.message), "%s: %s", what, strerror(errno));
	(void)!send(ready, &note, sizeof(note), MSG_NOSIGNAL);
	_exit(127);
}

/* First out of the way, then to the wanted numbers; everything between them is closed. */
static void place_descriptors(const struct process_spec *spec, int ready, int kernel)
{
	int spare[GUEST_DEVICES_MAX + 8];
	unsigned int next = 0;

	for (size_t i = 0; i < spec->fd_count; i++) {
		spare[i] = fcntl(spec->sources[i], F_DUPFD_CLOEXEC, SPARE_FD);
		if (spare[i] < 0)
			give_up(ready, "too few descriptors");
	}
	if (dup3(ready, READY_FD, O_CLOEXEC) < 0 || dup3(kernel, KERNEL_FD, O_CLOEXEC) < 0)
		give_up(ready, "too few descriptors");
	for (size_t i = 0; i < spec->fd_count; i++) {
		unsigned int target = (unsigned int)spec->targets[i];

		if (next < target)
			syscall(SYS_close_range, next, target - 1, 0);
		if (dup2(spare[i], (int)target) < 0)
			give_up(READY_FD, "too few descriptors");
		next = target + 1;
	}
	syscall(SYS_close_range, next, READY_FD - 1, 0);
	syscall(SYS_close_range, KERNEL_FD + 1, ~0u, 0);
}

/* A process that lost its parent before it could ask to be told of that. */
static bool parent_gone(int ready)
{
	struct pollfd peer = {.fd = ready, .events = POLLIN};

	return poll(&peer, 1, 0) != 0;
}

static _Noreturn void run_kernel(const struct process_spec *spec, int ready, int kernel, unsigned int layers)
{
	char *const environment[] = {"HOME=/", "PATH=/", NULL};
	const char *initrd = spec->initrd && layers & SANDBOX_ROOT ? SANDBOX_INITRD : spec->initrd;
	struct ready_note note = {0};

	if (spec->initrd_argument && layers & SANDBOX_ROOT)
		spec->argv[spec->initrd_argument] = "initrd=" SANDBOX_INITRD;
	if (setsid() < 0)
		give_up(ready, "no session of its own");
	place_descriptors(spec, ready, kernel);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || parent_gone(READY_FD))
		_exit(127);
	if (personality(ADDR_NO_RANDOMIZE) < 0)
		give_up(READY_FD, "address space randomization cannot be switched off");
	if (spec->sandboxed)
		layers |= sandbox_restrict(KERNEL_FD, initrd, spec->traced, spec->file_max);
	note.layers = layers;
	if (send(READY_FD, &note, sizeof(note), MSG_NOSIGNAL) < 0)
		_exit(127);
	syscall(SYS_execveat, KERNEL_FD, "", spec->argv, environment, AT_EMPTY_PATH);
	give_up(READY_FD, "the kernel cannot be executed");
}

/* Pid 1 of the guest's namespaces: buries whatever is orphaned there, and ends when the kernel does. */
static _Noreturn void run_init(
	const struct process_spec *spec, int ready, int kernel, int status_fd, unsigned int layers)
{
	int status = 0, init_status = 0;
	pid_t child, ended;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (parent_gone(ready))
		_exit(127);
	child = fork();
	if (child == 0)
		run_kernel(spec, ready, kernel, layers);
	if (child < 0)
		give_up(ready, "no process for the kernel");
	if (dup2(status_fd, 0) < 0)
		_exit(127);
	syscall(SYS_close_range, 1, ~0u, 0);
	while ((ended = waitpid(-1, &status, __WALL)) >= 0 || errno == EINTR)
		if (ended == child) {
			init_status = status;
			break;
		}
	(void)!write(0, &init_status, sizeof(init_status));
	_exit(0);
}

/* The pid is what the kernel of the host says it is, in our pid namespace. */
static bool receive_note(int ready, struct ready_note *note, pid_t *pid)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(struct ucred))];
	} ancillary;
	struct iovec part = {note, sizeof(*note)};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof(ancillary)};
	struct pollfd readable = {.fd = ready, .events = POLLIN};
	struct ucred credentials;

	if (poll(&readable, 1, START_TIMEOUT_MS) <= 0)
		return false;
	if (recvmsg(ready, &message, MSG_CMSG_CLOEXEC) != (ssize_t)sizeof(*note))
		return false;
	note->message[sizeof(note->message) - 1] = 0;
	if (!CMSG_FIRSTHDR(&message) || ancillary.header.cmsg_type != SCM_CREDENTIALS)
		return false;
	memcpy(&credentials, CMSG_DATA(&ancillary.header), sizeof(credentials));
	*pid = credentials.pid;
	return true;
}

struct channels {
	int ready[2];
	int status[2];
	int kernel;
};

static void close_channels(struct channels *channels)
{
	int fds[] = {
		channels->ready[0], channels->ready[1], channels->status[0], channels->status[1], channels->kernel};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
}

static bool open_channels(struct channels *channels, const char *kernel, char *message)
{
	int on = 1;

	*channels = (struct channels){{-1, -1}, {-1, -1}, -1};
	channels->kernel = open(kernel, O_RDONLY | O_CLOEXEC);
	if (channels->kernel < 0) {
		snprintf(message, GUEST_MESSAGE_MAX, "kernel %.80s: %s", kernel, strerror(errno));
		return false;
	}
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channels->ready) < 0 ||
		setsockopt(channels->ready[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) < 0 ||
		pipe2(channels->status, O_CLOEXEC | O_NONBLOCK) < 0) {
		snprintf(message, GUEST_MESSAGE_MAX, "no channel to the kernel: %s", strerror(errno));
		close_channels(channels);
		return false;
	}
	return true;
}

static pid_t spawn(const struct process_spec *spec, struct channels *channels, bool namespaces)
{
	uid_t uid = getuid();
	gid_t gid = getgid();
	pid_t child = namespaces ? sandbox_clone() : fork();
	unsigned int layers = 0;

	if (child != 0)
		return child;
	loop_signals_unblock();
	signal(SIGPIPE, SIG_DFL);
	close(channels->ready[0]);
	if (!namespaces)
		run_kernel(spec, channels->ready[1], channels->kernel, 0);
	layers = sandbox_enter(uid, gid, spec->initrd);
	if (!layers)
		_exit(127);
	run_init(spec, channels->ready[1], channels->kernel, channels->status[1], layers);
}

/* One attempt; `mute`: it failed before the kernel's own process could say why. The second note, if it comes, says why
 * exec failed; otherwise the socket closes at exec. */
static bool attempt(
	struct guest_process *process, const struct process_spec *spec, bool namespaces, char *message, bool *mute)
{
	struct channels channels;
	struct ready_note note = {0};
	bool started;
	pid_t failed;

	*mute = false;
	if (!open_channels(&channels, spec->kernel, message))
		return false;
	*process = (struct guest_process){.status_fd = -1};
	snprintf(message, GUEST_MESSAGE_MAX, "the kernel's process ended before it could be started");
	process->waited = spawn(spec, &channels, namespaces);
	close(channels.ready[1]);
	channels.ready[1] = -1;
	started = process->waited > 0 && receive_note(channels.ready[0], &note, &process->pid) && !note.message[0];
	process->layers = note.layers;
	if (started && receive_note(channels.ready[0], &note, &process->pid))
		started = false;
	if (started && namespaces) {
		process->status_fd = channels.status[0];
		channels.status[0] = -1;
	}
	close_channels(&channels);
	if (started)
		return true;
	*mute = !note.message[0];
	if (note.message[0])
		memcpy(message, note.message, GUEST_MESSAGE_MAX);
	if (process->waited > 0) {
		kill(process->waited, SIGKILL);
		do
			failed = waitpid(process->waited, NULL, __WALL);
		while (failed < 0 && errno == EINTR);
	}
	*process = (struct guest_process){.status_fd = -1};
	return false;
}

bool process_start(struct guest_process *process, const struct process_spec *spec, char *message)
{
	bool mute;

	if (spec->sandboxed) {
		if (attempt(process, spec, true, message, &mute))
			return true;
		if (!mute)
			return false;
		log_warning("this host allows the guest no namespaces, its sandbox goes without");
	}
	return attempt(process, spec, false, message, &mute);
}

/*
 * Without an init the stubs of a dead kernel are orphans, which come to us as their subreaper. One may just be forking
 * another, so the signal is repeated until the group is empty.
 */
static void bury_group(pid_t group)
{
	const struct timespec pause = {.tv_nsec = 1000000};

	for (int tries = 0; tries < BURY_TRIES && kill(-group, SIGKILL) == 0; tries++)
		if (waitpid(-group, NULL, WNOHANG | __WALL) <= 0)
			nanosleep(&pause, NULL);
}

bool process_reaped(struct guest_process *process, pid_t pid, int *status)
{
	if (pid != process->waited || pid == 0)
		return false;
	if (process->status_fd >= 0) {
		/* an init that was killed says nothing; then its own status counts */
		(void)!read(process->status_fd, status, sizeof(*status));
		close(process->status_fd);
	} else {
		bury_group(process->pid);
	}
	*process = (struct guest_process){.status_fd = -1};
	return true;
}

void process_signal(const struct guest_process *process, int number)
{
	if (process->pid > 0)
		kill(-process->pid, number);
}

void process_kill(const struct guest_process *process)
{
	if (process->waited <= 0)
		return;
	process_signal(process, SIGKILL);
	if (process->status_fd >= 0 && kill(process->waited, SIGKILL) < 0)
		log_warning("the guest's init cannot be killed: %s", strerror(errno));
}
