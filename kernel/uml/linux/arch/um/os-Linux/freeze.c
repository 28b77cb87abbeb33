// SPDX-License-Identifier: GPL-2.0-only
/*
 * Freeze and resume, host side: options, control socket, memory, descriptors.
 */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <init.h>
#include <kern_util.h>
#include <os.h>
#include <freeze.h>

#define DEFAULT_TIMEOUT_MS	2000
#define MAX_TIMEOUT_MS		60000
#define SEND_TIMEOUT_MS		1000
#define NSEC_PER_MS		1000000LL
/* Where a descriptor is out of the way of every number to be restored. */
#define SPARE_FD		512

struct freeze_options freeze_options __host_data = {
	.memory = -1,
	.control = -1,
	.timeout_ms = DEFAULT_TIMEOUT_MS,
};

/* A frozen guest's memory is not written, so all this is the host's. */
static char hold_stack[UM_THREAD_SIZE] __host_data
	__attribute__((aligned(UM_THREAD_SIZE)));
static jmp_buf hold_enter __host_data;
static jmp_buf hold_leave __host_data;
static struct freeze_report hold_report __host_data;
static struct freeze_request hold_thaw __host_data;

struct freeze_state freeze_state;

static int __init parse_number(const char *name, const char *text, long max)
{
	char *end;
	long value = strtol(text, &end, 10);

	if (end == text || *end || value < 0 || value > max) {
		os_warn("%s%s: expected a number from 0 to %ld\n", name, text, max);
		exit(1);
	}
	return value;
}

static int __init parse_fd(const char *name, const char *text)
{
	int fd = parse_number(name, text, SPARE_FD - 1);

	if (fcntl(fd, F_GETFD) < 0) {
		os_warn("%s%s: no such open descriptor\n", name, text);
		exit(1);
	}
	return fd;
}

static int __init memory_option(char *text, int *add)
{
	*add = 0;
	freeze_options.memory = parse_fd("freeze_memory=", text);
	return 0;
}

__uml_setup("freeze_memory=", memory_option,
"freeze_memory=<fd>\n"
"    An open memfd that holds the guest's whole state, as long as its memory.\n\n"
);

static int __init control_option(char *text, int *add)
{
	*add = 0;
	freeze_options.control = parse_fd("freeze_control=", text);
	return 0;
}

__uml_setup("freeze_control=", control_option,
"freeze_control=<fd>\n"
"    A connected SOCK_SEQPACKET socket: freeze, thaw and go are asked for\n"
"    here, see freeze_protocol.h.\n\n"
);

static int __init device_option(char *text, int *add)
{
	*add = 0;
	if (freeze_options.devices == FREEZE_MAX_DEVICES) {
		os_warn("freeze_device=: at most %d devices\n", FREEZE_MAX_DEVICES);
		exit(1);
	}
	freeze_options.device[freeze_options.devices++] =
		parse_fd("freeze_device=", text);
	return 0;
}

__uml_setup("freeze_device=", device_option,
"freeze_device=<fd>\n"
"    A connected vhost-user socket; the n-th is for the n-th\n"
"    virtio_uml.device=, whose path is only a label then.\n\n"
);

static int __init resume_option(char *text, int *add)
{
	*add = 0;
	freeze_options.resume = 1;
	return 0;
}

__uml_setup("freeze_resume", resume_option,
"freeze_resume\n"
"    Do not boot: wait for GO, then run the guest that freeze_memory holds.\n\n"
);

static int __init timeout_option(char *text, int *add)
{
	*add = 0;
	freeze_options.timeout_ms =
		parse_number("freeze_timeout=", text, MAX_TIMEOUT_MS);
	return 0;
}

__uml_setup("freeze_timeout=", timeout_option,
"freeze_timeout=<ms>\n"
"    How long a freeze waits for device backends before it fails\n"
"    (default 2000).\n\n"
);

void __init os_freeze_check_options(void)
{
	struct freeze_options *o = &freeze_options;

	if (o->memory >= 0 ? o->control < 0 : o->control >= 0) {
		os_warn("freeze_memory= and freeze_control= need one another\n");
		exit(1);
	}
	if (o->memory < 0 && (o->resume || o->devices)) {
		os_warn("freeze_resume and freeze_device= need freeze_memory=\n");
		exit(1);
	}
}

unsigned long long os_freeze_clock(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * UM_NSEC_PER_SEC + now.tv_nsec;
}

void os_freeze_sleep_us(int us)
{
	struct timespec time = { .tv_nsec = us * 1000L };

	nanosleep(&time, NULL);
}

void os_freeze_exit(int code)
{
	_exit(code);
}

/* Returns 1 with a request, 0 when there is none, -1 when the parent is gone. */
int os_freeze_receive(struct freeze_request *request)
{
	int n;

	for (;;) {
		CATCH_EINTR(n = recv(freeze_options.control, request,
				     sizeof(*request), MSG_DONTWAIT | MSG_TRUNC));
		if (n == sizeof(*request))
			return 1;
		if (n < 0)
			return errno == EAGAIN ? 0 : -1;
		if (n == 0)
			return -1;
	}
}

void os_freeze_send(const struct freeze_report *report)
{
	struct pollfd ready = { .fd = freeze_options.control, .events = POLLOUT };
	int n;

	do {
		CATCH_EINTR(n = send(freeze_options.control, report, sizeof(*report),
				     MSG_DONTWAIT | MSG_NOSIGNAL));
	} while (n < 0 && errno == EAGAIN && poll(&ready, 1, SEND_TIMEOUT_MS) > 0);
}

/* Wait for the next request; a guest whose parent is gone ends. */
static void wait_request(struct freeze_request *request)
{
	struct pollfd ready = { .fd = freeze_options.control, .events = POLLIN };
	int got;

	for (;;) {
		got = os_freeze_receive(request);
		if (got < 0 || (got > 0 && request->op == FREEZE_OP_EXIT))
			os_freeze_exit(0);
		if (got > 0)
			return;
		poll(&ready, 1, -1);
	}
}

static void refuse(const struct freeze_request *request, const char *why)
{
	struct freeze_report report = {
		.kind = FREEZE_KIND_FAILED,
		.sequence = request->sequence,
		.error = -EINVAL,
	};

	strscpy(report.text, why);
	os_freeze_send(&report);
}

void os_freeze_wait_go(struct freeze_request *go)
{
	struct freeze_report waiting = { .kind = FREEZE_KIND_WAITING };

	waiting.t_done = os_freeze_clock();
	os_freeze_send(&waiting);
	for (;;) {
		wait_request(go);
		if (go->op == FREEZE_OP_GO)
			return;
		refuse(go, "this process waits for GO");
	}
}

static void hold(void)
{
	sigset_t all, old;

	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, &old);
	os_freeze_send(&hold_report);
	for (;;) {
		wait_request(&hold_thaw);
		if (hold_thaw.op == FREEZE_OP_THAW)
			break;
		if (hold_thaw.op == FREEZE_OP_FREEZE) {
			hold_report.sequence = hold_thaw.sequence;
			os_freeze_send(&hold_report);
		} else {
			refuse(&hold_thaw, "this guest is frozen, not waiting for GO");
		}
	}
	sigprocmask(SIG_SETMASK, &old, NULL);
	longjmp(hold_leave, 1);
}

/*
 * Send @report and stay frozen until @thaw was received. From the report on
 * not a byte of the guest may change, so this neither runs on the guest's
 * stack nor takes a signal, whose handler would run on another one.
 */
void os_freeze_hold(const struct freeze_report *report,
		    struct freeze_request *thaw)
{
	hold_report = *report;
	hold_report.t_done = os_freeze_clock();
	if (setjmp(hold_leave) == 0) {
		new_thread(hold_stack, &hold_enter, hold);
		longjmp(hold_enter, 1);
	}
	*thaw = hold_thaw;
}

static int map_span(unsigned long physmem)
{
	unsigned long start = (unsigned long)__freeze_span_start;

	if (mmap(__freeze_span_start, __freeze_span_end - __freeze_span_start,
		 PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE,
		 freeze_options.memory, start - physmem) == MAP_FAILED)
		return -errno;
	return 0;
}

/* Move the span into the memfd; runs on the host's stack, before the kernel. */
int os_freeze_share(unsigned long physmem, unsigned long long size)
{
	unsigned long start = (unsigned long)__freeze_span_start;
	unsigned long length = __freeze_span_end - __freeze_span_start, done = 0;
	struct stat st;
	long n;

	if (fstat(freeze_options.memory, &st) < 0)
		return -errno;
	if (st.st_size != size && ftruncate(freeze_options.memory, size) < 0)
		return -errno;
	while (done < length) {
		CATCH_EINTR(n = pwrite(freeze_options.memory, (void *)(start + done),
				       length - done, start - physmem + done));
		if (n <= 0)
			return n ? -errno : -EIO;
		done += n;
	}
	return map_span(physmem);
}

static const char *mismatch(const struct freeze_state *saved,
			    const struct freeze_layout *here)
{
	const struct freeze_layout *there = &saved->layout;

	if (saved->magic != FREEZE_MAGIC)
		return "the memory holds no frozen guest";
	if (strncmp(there->build, here->build, sizeof(here->build)))
		return "the guest was frozen by another build of the kernel";
	if (there->seccomp != here->seccomp)
		return there->seccomp ? "the guest was frozen in seccomp mode" :
					"the guest was frozen in ptrace mode";
	if (there->fp_size != here->fp_size)
		return "this host's processor state has another size";
	if (there->task_size != here->task_size ||
	    there->stub_start != here->stub_start)
		return "this process has another address space layout";
	if (there->span_start != here->span_start ||
	    there->span_end != here->span_end)
		return "the kernel's variables are elsewhere";
	return NULL;
}

/* Check the frozen guest, then put its variables in place of this process's. */
int os_freeze_load(unsigned long physmem, const struct freeze_layout *layout,
		   const char **why)
{
	struct freeze_state saved;
	struct stat st;
	int n, err;

	*why = "reading the memory failed";
	CATCH_EINTR(n = pread(freeze_options.memory, &saved, sizeof(saved),
			      (unsigned long)&freeze_state - physmem));
	if (n != sizeof(saved))
		return n < 0 ? -errno : -ENODATA;
	*why = mismatch(&saved, layout);
	if (*why)
		return -EINVAL;
	*why = "the memory has the wrong length";
	if (fstat(freeze_options.memory, &st) < 0 ||
	    st.st_size != saved.memory_size)
		return -EINVAL;
	*why = "the heap of this process is too large";
	if ((unsigned long)sbrk(0) > saved.linear_start)
		return -ENOMEM;
	*why = "mapping the memory failed";
	err = map_span(physmem);
	if (err)
		return err;
	return os_map_memory((void *)saved.linear_start, freeze_options.memory,
			     saved.linear_start - physmem,
			     physmem + saved.memory_size - saved.linear_start,
			     1, 1, 1);
}

int os_freeze_device(int index)
{
	if (index < 0 || index >= freeze_options.devices)
		return -ENODEV;
	return freeze_options.device[index];
}

/* Wait for @fd to be readable, through signals, for at most freeze_timeout=. */
int os_freeze_wait_readable(int fd)
{
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	long long left = freeze_options.timeout_ms;
	unsigned long long deadline;
	int n;

	deadline = os_freeze_clock() + left * NSEC_PER_MS;
	while (left > 0) {
		n = poll(&ready, 1, left);
		if (n > 0)
			return 0;
		if (n < 0 && errno != EINTR)
			return -errno;
		left = (long long)(deadline - os_freeze_clock()) / NSEC_PER_MS;
	}
	return -ETIMEDOUT;
}

int os_freeze_peer_gone(int fd)
{
	struct pollfd peer = { .fd = fd, .events = POLLRDHUP };

	return poll(&peer, 1, 0) > 0;
}

/* Give @fd the number @wanted, which the guest remembers. */
int os_freeze_move_fd(int fd, int wanted)
{
	int err = 0;

	if (fd < 0 || fd == wanted)
		return fd < 0 ? fd : 0;
	if (dup3(fd, wanted, O_CLOEXEC) < 0)
		err = -errno;
	close(fd);
	return err;
}

/* A pipe whose reading end has the number @wanted. */
int os_freeze_pipe_at(int wanted, int *write_end)
{
	int fds[2], err;

	err = os_pipe(fds, 1, 1);
	if (err < 0)
		return err;
	*write_end = fcntl(fds[1], F_DUPFD_CLOEXEC, SPARE_FD);
	err = *write_end < 0 ? -errno : 0;
	close(fds[1]);
	if (err) {
		close(fds[0]);
		return err;
	}
	err = os_freeze_move_fd(fds[0], wanted);
	if (err)
		close(*write_end);
	return err;
}
