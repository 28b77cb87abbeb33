/* SPDX-License-Identifier: Apache-2.0 */
#include "guest.h"

#include "log.h"
#include "role.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define MEMORY_MIN (UINT64_C(16) << 20)
#define CPUS_MAX 64
#define QUIT_TIMEOUT (5 * LOOP_SECOND)

static void quit_timeout(void *context)
{
	struct guest *guest = context;

	log_error("the guest's processes do not end, left behind");
	loop_stop(guest->loop, 1);
}

static void quit(void *context)
{
	struct guest *guest = context;

	guest->quitting = true;
	if (guest->state == GUEST_EXITED) {
		loop_stop(guest->loop, 0);
		return;
	}
	guest_kill(guest);
	guest->end_timer.run = quit_timeout;
	guest->end_timer.context = guest;
	loop_timer_set(guest->loop, &guest->end_timer, loop_now() + QUIT_TIMEOUT);
}

static void terminated(void *context, const struct signalfd_siginfo *info)
{
	(void)info;
	quit(context);
}

static int parse(struct guest_options *options, int argc, char **argv)
{
	const struct option_spec specs[] = {
		{"control", OPTION_STRING, &options->control, "PATH", "control socket", true},
		{"kernel", OPTION_STRING, &options->kernel, "FILE", "the guest's kernel, a static UML linux", true},
		{"memory", OPTION_SIZE, &options->memory, "SIZE", "of the guest, such as 256M", true},
		{"device", OPTION_LIST, &options->devices, "KIND:SOCKET",
			"a vhost-user backend, KIND is net or blk; may be given again", false},
		{"console", OPTION_STRING, &options->console, "FILE",
			"log of what the guest prints (8 MiB, and FILE.1)", false},
		{"initrd", OPTION_STRING, &options->initrd, "FILE", "initial RAM disk", false},
		{"append", OPTION_STRING, &options->append, "OPTIONS", "more kernel options, separated by spaces",
			false},
		{"mode", OPTION_STRING, &options->mode, "MODE", "seccomp (default) or ptrace", false},
		{"cpus", OPTION_NUMBER, &options->cpus, "N", "of the guest, default 1", false},
		{"lease", OPTION_NUMBER, &options->lease_ns, "NS",
			"CLOCK_BOOTTIME until which the guest may run; 0, the default, for ever", false},
		{"resume", OPTION_FLAG, &options->resume, NULL,
			"do not boot: wait for the memory of a frozen guest and for `go`", false},
		{"no-sandbox", OPTION_FLAG, &options->no_sandbox, NULL,
			"let the guest's processes do what this one may", false},
		{0},
	};
	int status = options_parse("guest", "The parent of one guest.", argc, argv, specs);

	if (status >= 0)
		return status;
	if (options->memory < MEMORY_MIN)
		return options_error("guest", "--memory must be at least 16M");
	if (options->cpus < 1 || options->cpus > CPUS_MAX)
		return options_error("guest", "--cpus must be from 1 to %d", CPUS_MAX);
	if (strcmp(options->mode, "seccomp") != 0 && strcmp(options->mode, "ptrace") != 0)
		return options_error("guest", "--mode: '%s' is neither seccomp nor ptrace", options->mode);
	if (options->lease_ns > INT64_MAX)
		return options_error("guest", "--lease is out of range");
	if (options->devices.count > GUEST_DEVICES_MAX)
		return options_error("guest", "--device: at most %d are possible", GUEST_DEVICES_MAX);
	for (size_t i = 0; i < options->devices.count; i++)
		if (strncmp(options->devices.items[i], "net:", 4) != 0 &&
			strncmp(options->devices.items[i], "blk:", 4) != 0)
			return options_error("guest", "--device: '%s' is neither net:SOCKET nor blk:SOCKET",
				options->devices.items[i]);
	return -1;
}

static bool start(struct guest *guest)
{
	const struct option_list *devices = &guest->options.devices;
	const char *sockets[GUEST_DEVICES_MAX];
	char message[GUEST_MESSAGE_MAX];

	lease_set(guest, guest->options.lease_ns);
	if (!guest->options.resume && !lease_valid(guest)) {
		log_error("the lease has expired, the guest must not run");
		return false;
	}
	for (size_t i = 0; i < devices->count; i++)
		sockets[i] = devices->items[i] + strlen("net:");
	if (!guest_connect_devices(guest, sockets, devices->count, guest->device_fds, message)) {
		log_error("%s", message);
		return false;
	}
	guest->device_count = devices->count;
	if (guest_launch(guest, guest->options.resume, message))
		return true;
	log_error("%s", message);
	return false;
}

static bool open_all(struct guest *guest)
{
	guest->loop = loop_new();
	if (!guest->loop || prctl(PR_SET_CHILD_SUBREAPER, 1) < 0) {
		log_error("cannot start: %s", strerror(errno));
		return false;
	}
	guest->control = control_new(&(struct control_config){.loop = guest->loop,
		.path = guest->options.control,
		.role = "guest",
		.ops = guest_ops,
		.context = guest,
		.quit = quit});
	if (!guest->control || !console_open(&guest->console, guest->loop, guest->options.console))
		return false;
	guest->agent.lossless = true;
	guest->memory_fd = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (guest->memory_fd < 0 || !stream_open(&guest->agent, guest->loop) || !lease_open(guest) ||
		loop_signal(guest->loop, SIGCHLD, guest_child_ended, guest) < 0 ||
		loop_signal(guest->loop, SIGTERM, terminated, guest) < 0 ||
		loop_signal(guest->loop, SIGINT, terminated, guest) < 0) {
		log_error("cannot start: %s", strerror(errno));
		return false;
	}
	return true;
}

/* Also of a guest that was opened halfway. Descriptors go with the process. */
static void close_all(struct guest *guest)
{
	if (guest->control)
		control_free(guest->control);
	loop_free(guest->loop);
}

static int run(int argc, char **argv)
{
	struct guest *guest = calloc(1, sizeof(*guest));
	int status = 1;

	if (!guest)
		return 1;
	guest->options.mode = "seccomp";
	guest->options.cpus = 1;
	guest->report_fd = -1;
	guest->process.status_fd = -1;
	guest->since_ns = loop_now();
	status = parse(&guest->options, argc, argv);
	if (status < 0) {
		log_open("guest");
		status = open_all(guest) && start(guest) ? loop_run(guest->loop) : 1;
		close_all(guest);
	}
	free(guest);
	return status;
}

const struct role role_guest = {"guest", "parent of one guest: memory, console, freeze, lease, sandbox", run};
