/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_GUEST_H
#define MOBI_GUEST_H

/*
 * The shim of one guest (kernel/README.md, section 4). Its files:
 *
 *	guest.c		options, start and end
 *	guest_ops.c	the operations of the control socket
 *	guest_state.c	the state machine: what the guest's kernel is asked, what it reports, how it ends
 *	guest_launch.c	one run of the kernel: its command line and descriptors
 *	guest_lease.c	the deadline after which the guest must not run
 *	guest_process.c, guest_stream.c, guest_console.c, sandbox.c	one thing each, knowing nothing of the others
 */
#include "control.h"
#include "guest_console.h"
#include "guest_process.h"
#include "guest_stream.h"
#include "loop.h"
#include "options.h"

#include "../uml/include/freeze_protocol.h"

enum guest_state { GUEST_STARTING, GUEST_RUNNING, GUEST_WAITING, GUEST_FROZEN, GUEST_EXITED };

/* The one thing the kernel has been asked and not answered yet. */
enum guest_pending { PENDING_NONE, PENDING_FREEZE, PENDING_CANCEL, PENDING_THAW, PENDING_GO };

enum guest_reason { EXIT_NONE, EXIT_POWEROFF, EXIT_REBOOT, EXIT_PANIC, EXIT_KILLED, EXIT_CRASHED };

struct guest_options {
	const char *control, *kernel, *console, *mode, *append, *initrd;
	uint64_t memory, cpus;
	uint64_t lease_ns; /* 0: none needed */
	struct option_list devices;
	bool resume, no_sandbox;
};

struct guest_lease {
	uint64_t deadline_ns; /* CLOCK_BOOTTIME, 0: none needed */
	bool expired;
	bool announced; /* `expired` has been sent */
	bool stopped;   /* the guest did not freeze: its processes are stopped */
	int timer_fd;
	struct loop_timer stop_timer;
};

struct guest {
	struct guest_options options;
	struct loop *loop;
	struct control *control;
	struct guest_console console;
	struct guest_stream agent;
	struct guest_process process;
	int memory_fd;
	int report_fd; /* our end of the freeze protocol */

	int device_fds[GUEST_DEVICES_MAX];
	size_t device_count;

	enum guest_state state;
	uint64_t since_ns;
	enum guest_reason reason; /* the kernel's last words, then how it ended */
	int exit_code;            /* exit status, or minus the signal */
	char exit_message[GUEST_MESSAGE_MAX];

	enum guest_pending pending;
	uint32_t sequence;
	uint64_t requested_ns;
	struct control_ticket ticket; /* who gets the answer to `pending`; id 0: nobody */
	struct loop_timer pending_timer;

	bool reconnecting;      /* frozen, about to go on in a fresh process */
	bool reconnect_running; /* it was running before */
	struct control_ticket reconnect_ticket;
	struct control_ticket kill_ticket;

	struct loop_timer end_timer; /* a kernel that has to end, or a fresh one that has to be ready */
	bool quitting;
	struct guest_lease lease;
};

/* guest_launch.c: false with a sentence in `message` (GUEST_MESSAGE_MAX bytes). */
bool guest_connect_devices(struct guest *guest, const char *const *sockets, size_t count, int *fds, char *message);
bool guest_launch(struct guest *guest, bool resume, char *message);

/* guest_state.c */
const char *guest_state_name(enum guest_state state);
const char *guest_reason_name(enum guest_reason reason); /* NULL for EXIT_NONE */
void guest_set_state(struct guest *guest, enum guest_state state);
/* Asks the kernel; the answer goes to `ticket`. The caller has checked that this may be asked now. */
void guest_freeze(struct guest *guest, struct control_ticket ticket, uint64_t timeout_ns);
void guest_thaw(struct guest *guest, struct control_ticket ticket);
void guest_go(struct guest *guest, struct control_ticket ticket);
void guest_cancel_freeze(struct guest *guest);  /* a freeze under way is undone as soon as it is there */
void guest_reconnect_step(struct guest *guest); /* frozen: end the old process */
void guest_report_ready(void *context, int fd, uint32_t events);
void guest_child_ended(void *context, const struct signalfd_siginfo *info);
void guest_kill(struct guest *guest);

/* guest_lease.c */
bool lease_open(struct guest *guest);
void lease_set(struct guest *guest, uint64_t deadline_ns);
bool lease_valid(const struct guest *guest); /* may the guest run at this instant? */
void lease_enforce(struct guest *guest);     /* called when the guest's state changed */

/* guest_ops.c */
extern const struct control_op guest_ops[];
void guest_put_exit(struct guest *guest, struct control_message *message);

#endif
