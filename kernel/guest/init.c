// SPDX-License-Identifier: Apache-2.0
/*
 * mobi-init: process 1 of every guest. It mounts what programs expect, keeps the agent running, reaps orphans, and
 * ends the guest in order. What a guest is *for* is not decided here: the agent receives addresses, names and programs
 * from the peer, and an image may bring /etc/mobi/start, which runs once the agent has been configured (the agent
 * starts it, so that names resolve by then).
 *
 * Signals are those of busybox and sysvinit: SIGUSR2 powers off, SIGTERM reboots.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define AGENT "/sbin/mobi-agent"
#define GRACE_MS 3000 /* between SIGTERM and SIGKILL at the end */

struct mount_point {
	const char *source, *target, *type, *options;
	unsigned long flags;
};

static const struct mount_point mounts[] = {
	{"proc", "/proc", "proc", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
	{"sysfs", "/sys", "sysfs", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
	{"devtmpfs", "/dev", "devtmpfs", "mode=0755", MS_NOSUID},
	{"devpts", "/dev/pts", "devpts", "mode=0620,ptmxmode=0666", MS_NOSUID | MS_NOEXEC},
	{"tmpfs", "/dev/shm", "tmpfs", "mode=1777", MS_NOSUID | MS_NODEV},
	{"tmpfs", "/run", "tmpfs", "mode=0755", MS_NOSUID | MS_NODEV},
	{"tmpfs", "/tmp", "tmpfs", "mode=1777", MS_NOSUID | MS_NODEV},
};

static void say(const char *what, const char *which)
{
	fprintf(stderr, "mobi-init: %s %s: %s\n", what, which, strerror(errno));
}

static void mount_all(void)
{
	mount(NULL, "/", NULL, MS_REMOUNT | MS_NOATIME, NULL);
	for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++) {
		const struct mount_point *m = &mounts[i];

		mkdir(m->target, 0755);
		if (mount(m->source, m->target, m->type, m->flags, m->options) && errno != EBUSY)
			say("cannot mount", m->target);
	}
	symlink("/proc/self/fd", "/dev/fd");
	symlink("/proc/self/fd/0", "/dev/stdin");
	symlink("/proc/self/fd/1", "/dev/stdout");
	symlink("/proc/self/fd/2", "/dev/stderr");
}

static pid_t start_agent(void)
{
	pid_t pid = fork();

	if (pid == 0) {
		sigset_t none;

		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		setsid();
		execl(AGENT, "mobi-agent", (char *)NULL);
		say("cannot start", AGENT);
		_exit(127);
	}
	return pid;
}

/* Reaps until nobody is left or the time is over. */
static void wait_for_everybody(int milliseconds)
{
	const struct timespec step = {.tv_nsec = 20 * 1000 * 1000};

	for (int waited = 0; waited < milliseconds; waited += 20) {
		pid_t pid;

		while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
			;
		if (pid < 0 && errno == ECHILD)
			return;
		nanosleep(&step, NULL);
	}
}

static void end_guest(int how)
{
	kill(-1, SIGTERM);
	wait_for_everybody(GRACE_MS);
	kill(-1, SIGKILL);
	wait_for_everybody(500);
	sync();
	if (mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL))
		say("cannot make read-only", "/");
	sync();
	reboot(how);
	say("cannot end", "the guest");
	for (;;)
		pause();
}

int main(void)
{
	const struct timespec respawn_delay = {.tv_sec = 1};
	sigset_t handled;
	pid_t agent;

	if (getpid() != 1) {
		fprintf(stderr, "mobi-init: is process 1 of a guest and does nothing elsewhere\n");
		return 2;
	}
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/root", 1);
	setenv("TERM", "linux", 1);
	reboot(RB_DISABLE_CAD);
	mount_all();

	sigfillset(&handled);
	sigprocmask(SIG_SETMASK, &handled, NULL);
	agent = start_agent();
	for (;;) {
		siginfo_t info;
		pid_t pid;

		if (sigwaitinfo(&handled, &info) < 0)
			continue;
		if (info.si_signo == SIGUSR2)
			end_guest(RB_POWER_OFF);
		if (info.si_signo == SIGTERM || info.si_signo == SIGINT)
			end_guest(RB_AUTOBOOT);
		while ((pid = waitpid(-1, NULL, WNOHANG)) > 0) {
			if (pid == agent) {
				nanosleep(&respawn_delay, NULL);
				agent = start_agent();
			}
		}
	}
}
