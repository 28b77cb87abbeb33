// SPDX-License-Identifier: Apache-2.0
/*
 * mobi-agent: the peer's hand inside a guest. One loop, one serial line, no memory of its own across a `reset`: the
 * host may attach anew at any moment (its peer restarted, the guest moved), and then everything on the line starts
 * over while programs go on. What a frame means is in kernel/README.md, section 9.
 */
#include "channel.h"
#include "configure.h"
#include "message.h"
#include "probe.h"
#include "session.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <unistd.h>

#define LINE "/dev/ttyS0"

static void read_line(const char *path, char *text, int size)
{
	FILE *file = fopen(path, "re");

	text[0] = 0;
	if (file) {
		if (!fgets(text, size, file))
			text[0] = 0;
		fclose(file);
	}
	text[strcspn(text, "\n")] = 0;
}

static void say_hello(uint32_t session)
{
	char boot_id[64], hostname[256] = "", image[128];
	struct sysinfo info = {0};
	struct reply reply;

	sysinfo(&info);
	gethostname(hostname, sizeof hostname - 1);
	read_line("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
	read_line("/etc/mobi/image", image, sizeof image);
	reply_open(&reply, session, 5);
	reply_int(&reply, "version", 1);
	reply_string(&reply, "boot_id", boot_id);
	reply_string(&reply, "hostname", hostname);
	reply_string(&reply, "image", image);
	reply_int(&reply, "uptime", info.uptime);
	reply_send(&reply, FRAME_HELLO);
}

static void take_request(const struct frame *frame)
{
	struct request request;

	if (!request_open(&request, frame->session, frame->payload, frame->length)) {
		result_error(frame->session, "bad-request", "the payload of frame type %u is not a map", frame->type);
	} else {
		switch (frame->type) {
		case FRAME_CONFIGURE:
			configure(&request);
			break;
		case FRAME_EXEC:
			session_exec(&request, configured_environment());
			break;
		case FRAME_GET:
			session_get(&request);
			break;
		case FRAME_PUT:
			session_put(&request);
			break;
		case FRAME_PROBE:
			probe(&request);
			break;
		case FRAME_POWEROFF:
			result_ok(frame->session);
			channel_flush();
			kill(1, SIGUSR2);
			break;
		default:
			result_error(frame->session, "unknown-op", "frame type %u is not known here", frame->type);
		}
	}
	request_done(&request);
}

static void take_frame(const struct frame *frame)
{
	switch (frame->type) {
	case FRAME_RESET:
		channel_forget();
		sessions_forget();
		say_hello(frame->session);
		break;
	case FRAME_STREAM:
		session_stream(frame);
		break;
	case FRAME_CREDIT:
		session_credit(frame);
		break;
	case FRAME_SIGNAL:
		session_signal(frame);
		break;
	default:
		take_request(frame);
	}
}

static void reap(int signals)
{
	struct signalfd_siginfo info;
	pid_t pid;
	int status;

	while (read(signals, &info, sizeof info) > 0)
		;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		session_reaped(pid, status);
}

/* One turn: wait, read, act, write. False when the line is gone. */
static bool turn(int signals, int timeout)
{
	struct pollfd watch[2 + SESSIONS_WATCH_MAX];
	struct frame frame;
	size_t n = 2;

	watch[0] = (struct pollfd){.fd = channel_fd(), .events = (short)(POLLIN | (channel_pending() ? POLLOUT : 0))};
	watch[1] = (struct pollfd){.fd = signals, .events = POLLIN};
	n += sessions_watch(watch + n);
	if (poll(watch, n, timeout) < 0 && errno != EINTR)
		return false;
	if (!channel_read())
		return false;
	while (channel_next(&frame)) {
		if (channel_garbled())
			sessions_garbled();
		take_frame(&frame);
	}
	reap(signals);
	return true;
}

int main(void)
{
	sigset_t child;
	int signals, timeout = 0;

	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, NULL);
	signal(SIGPIPE, SIG_IGN);
	signals = signalfd(-1, &child, SFD_NONBLOCK | SFD_CLOEXEC);
	if (channel_open(LINE) < 0) {
		fprintf(stderr, "mobi-agent: cannot open %s: %s\n", LINE, strerror(errno));
		return 1;
	}
	probe_start();
	say_hello(0);
	do {
		timeout = sessions_turn();
		if (!channel_flush())
			break;
	} while (turn(signals, timeout));
	fprintf(stderr, "mobi-agent: %s is gone: %s\n", LINE, strerror(errno));
	return 1;
}
