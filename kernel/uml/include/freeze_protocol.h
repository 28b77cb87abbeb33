/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * What the guest's kernel and its parent (the shim) say to one another.
 *
 * The control descriptor is one end of an AF_UNIX SOCK_SEQPACKET socketpair:
 * one struct per datagram, in host byte order, since both ends are always on
 * the same machine. The parent sends requests; every request but EXIT is
 * answered by exactly one report with the request's sequence number. The
 * guest sends its last words (POWEROFF, REBOOT, PANIC) and BOOTED on its own,
 * with sequence 0. A datagram of any other length is ignored by the guest.
 *
 * Included by user space and by arch/um, so nothing but <linux/types.h>.
 */
#ifndef _UAPI_FREEZE_PROTOCOL_H
#define _UAPI_FREEZE_PROTOCOL_H

#include <linux/types.h>

enum freeze_op {
	FREEZE_OP_FREEZE = 1,	/* running: stop, and bring all state into the memfd */
	FREEZE_OP_THAW = 2,	/* frozen: go on in the same process */
	FREEZE_OP_GO = 3,	/* waiting (freeze_resume): run what the memfd holds */
	FREEZE_OP_EXIT = 4,	/* frozen or waiting: end the process */
};

enum freeze_kind {
	FREEZE_KIND_FROZEN = 1,	/* to FREEZE: the memfd is complete, nobody writes it */
	FREEZE_KIND_RUNNING = 2,	/* to THAW or GO: the guest runs */
	FREEZE_KIND_FAILED = 3,	/* to FREEZE: error and text, the guest goes on;
				 * to GO: error and text, the process ends */
	FREEZE_KIND_BOOTED = 4,	/* unasked: the first program is about to start */
	FREEZE_KIND_POWEROFF = 5,	/* unasked, the process ends */
	FREEZE_KIND_REBOOT = 6,	/* unasked, the process ends */
	FREEZE_KIND_PANIC = 7,	/* unasked, text is the reason, the process ends */
	FREEZE_KIND_WAITING = 8,	/* unasked (freeze_resume): host side is set up,
				 * GO would be obeyed at once */
};

/* freeze_report.flags */
#define FREEZE_FLAG_BACKEND_LOST	(1u << 0)	/* FROZEN: a device backend was gone */

#define FREEZE_TEXT_SIZE 80

struct freeze_request {
	__u32 op;		/* enum freeze_op */
	__u32 sequence;		/* chosen by the parent, not 0 */
};

/*
 * Times are CLOCK_MONOTONIC of the host in ns, 0 where they have no meaning:
 * t_request: the request was read; t_begin: interrupts went off (FREEZE) or
 * the memfd was mapped (GO); t_devices: devices were quiet (FREEZE) or
 * connected (GO); t_done: just before this report was sent.
 */
struct freeze_report {
	__u32 kind;		/* enum freeze_kind */
	__u32 sequence;
	__s32 error;		/* 0 or a negative errno */
	__u32 flags;
	__u64 t_request;
	__u64 t_begin;
	__u64 t_devices;
	__u64 t_done;
	char text[FREEZE_TEXT_SIZE];	/* NUL-terminated */
};

#endif /* _UAPI_FREEZE_PROTOCOL_H */
