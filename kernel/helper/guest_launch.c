/* SPDX-License-Identifier: Apache-2.0 */
/* One run of the guest's kernel: connects its devices, composes its command line, hands over its descriptors. */
#include "guest.h"

#include "unix_socket.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MEMORY_FD 100
#define CONTROL_FD 101
#define AGENT_FD 102
#define DEVICE_FD 110

#define ARGUMENTS_MAX 96
#define TEXT_MAX 8192
#define FILE_SLACK (UINT64_C(64) << 20)

struct command_line {
	char *argv[ARGUMENTS_MAX + 1];
	size_t count;
	char text[TEXT_MAX];
	size_t used;
	size_t initrd_argument; /* 0: none */
	bool overflow;
};

static void __attribute__((format(printf, 2, 3))) add(struct command_line *line, const char *format, ...)
{
	size_t room = sizeof(line->text) - line->used;
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(line->text + line->used, room, format, arguments);
	va_end(arguments);
	if (line->count == ARGUMENTS_MAX || length < 0 || (size_t)length >= room) {
		line->overflow = true;
		return;
	}
	line->argv[line->count++] = line->text + line->used;
	line->used += (size_t)length + 1;
}

static void add_words(struct command_line *line, const char *words)
{
	while (words && *words) {
		size_t length = strcspn(words, " ");

		if (length)
			add(line, "%.*s", (int)length, words);
		words += length;
		words += *words == ' ';
	}
}

/* Virtio's number for the kind of a `--device KIND:SOCKET`; 0: no such kind. */
static unsigned int device_kind(const char *device, const char **socket)
{
	static const char *const kinds[] = {NULL, "net:", "blk:"};

	for (unsigned int kind = 1; kind < 3; kind++)
		if (strncmp(device, kinds[kind], strlen(kinds[kind])) == 0) {
			*socket = device + strlen(kinds[kind]);
			return kind;
		}
	return 0;
}

static bool compose(struct guest *guest, bool resume, struct command_line *line)
{
	const struct guest_options *options = &guest->options;
	const char *socket;

	memset(line, 0, sizeof(*line));
	add(line, "linux");
	add(line, "mem=%" PRIu64, options->memory);
	add(line, "seccomp=%s", strcmp(options->mode, "seccomp") == 0 ? "on" : "off");
	add(line, "freeze_memory=%d", MEMORY_FD);
	add(line, "freeze_control=%d", CONTROL_FD);
	for (size_t i = 0; i < options->devices.count; i++) {
		add(line, "freeze_device=%zu", DEVICE_FD + i);
		add(line, "virtio_uml.device=/dev%zu:%u", i, device_kind(options->devices.items[i], &socket));
	}
	if (options->cpus > 1)
		add(line, "ncpus=%" PRIu64, options->cpus);
	add_words(line, "con=null con0=fd:0,fd:1 ssl=null ssl0=fd:102 noreboot quiet");
	if (options->initrd && !resume) {
		line->initrd_argument = line->count;
		add(line, "initrd=%s", options->initrd);
	}
	if (resume)
		add(line, "freeze_resume");
	add_words(line, options->append);
	return !line->overflow;
}

bool guest_connect_devices(struct guest *guest, const char *const *sockets, size_t count, int *fds, char *message)
{
	const struct option_list *devices = &guest->options.devices;

	if (count != devices->count) {
		snprintf(message, GUEST_MESSAGE_MAX, "the guest has %zu devices, not %zu", devices->count, count);
		return false;
	}
	for (size_t i = 0; i < count; i++) {
		fds[i] = unix_connect(sockets[i], SOCK_STREAM);
		if (fds[i] >= 0)
			continue;
		snprintf(message, GUEST_MESSAGE_MAX, "device %zu at %.100s: %s", i, sockets[i], strerror(errno));
		while (i--)
			close(fds[i]);
		return false;
	}
	return true;
}

static bool start_process(struct guest *guest, bool resume, int inner, char *message)
{
	int sources[GUEST_DEVICES_MAX + 6] = {guest->console.stream.inner_fd, guest->console.stream.inner_fd,
		guest->console.stream.inner_fd, guest->memory_fd, inner, guest->agent.inner_fd};
	int targets[GUEST_DEVICES_MAX + 6] = {0, 1, 2, MEMORY_FD, CONTROL_FD, AGENT_FD};
	static struct command_line line;
	struct process_spec spec = {
		.kernel = guest->options.kernel,
		.initrd = resume ? NULL : guest->options.initrd,
		.argv = line.argv,
		.sources = sources,
		.targets = targets,
		.fd_count = 6 + guest->device_count,
		.sandboxed = !guest->options.no_sandbox,
		.traced = strcmp(guest->options.mode, "ptrace") == 0,
		.file_max = guest->options.memory + FILE_SLACK,
	};

	for (size_t i = 0; i < guest->device_count; i++) {
		sources[6 + i] = guest->device_fds[i];
		targets[6 + i] = DEVICE_FD + (int)i;
	}
	if (!compose(guest, resume, &line)) {
		snprintf(message, GUEST_MESSAGE_MAX, "the kernel's command line is too long");
		return false;
	}
	spec.initrd_argument = line.initrd_argument;
	return process_start(&guest->process, &spec, message);
}

bool guest_launch(struct guest *guest, bool resume, char *message)
{
	int pair[2];
	bool started;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
		snprintf(message, GUEST_MESSAGE_MAX, "no socket for the kernel: %s", strerror(errno));
		return false;
	}
	started = start_process(guest, resume, pair[1], message);
	close(pair[1]);
	for (size_t i = 0; i < guest->device_count; i++)
		close(guest->device_fds[i]);
	guest->device_count = 0;
	if (started && loop_add(guest->loop, pair[0], EPOLLIN, guest_report_ready, guest) == 0) {
		guest->report_fd = pair[0];
		return true;
	}
	if (started)
		process_kill(&guest->process);
	close(pair[0]);
	return false;
}
