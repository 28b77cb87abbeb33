/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Freeze and resume of a whole UML guest.
 *
 * All state of the guest lives in one memfd given by the parent process: the
 * physical memory, and the kernel's own variables (the "span", see
 * uml.lds.S), which are moved there before the kernel starts. The rest of the
 * process - libc's variables, host stack, file descriptors, signal handlers,
 * stub processes - is host state: every process makes its own. A frozen guest
 * is thus the content of the memfd, and any process that runs the same binary
 * with the same options can take it from there.
 *
 * Used on both sides of UML, kernel and host, so only plain types here.
 */
#ifndef __UM_FREEZE_H
#define __UM_FREEZE_H

#include <longjmp.h>
#include <freeze_protocol.h>

struct mm_id;

/* Belongs to one host process and does not travel. */
#define __host_data __attribute__((section(".host.data")))

#define FREEZE_MAX_DEVICES 16

/* From the command line: descriptors are -1 when not given. */
struct freeze_options {
	int memory;
	int control;
	int resume;
	int timeout_ms;
	int devices;
	int device[FREEZE_MAX_DEVICES];
};

extern struct freeze_options freeze_options;

static inline int freeze_enabled(void)
{
	return freeze_options.memory >= 0;
}

/* What the guest's memory must be combined with to be a running guest. */
struct freeze_layout {
	unsigned long span_start, span_end;
	unsigned long task_size, stub_start;
	unsigned long fp_size;
	int seccomp;
	char build[256];
};

struct freeze_state {
	unsigned long long magic;
	struct freeze_layout layout;
	unsigned long long memory_size;
	unsigned long linear_start;	/* physical memory is mapped from here on */
	long long monotonic, realtime;	/* guest's and host's clock, ns */
	jmp_buf context;		/* of the thread that froze the guest */
};

#define FREEZE_MAGIC 0x314e5a5246494255ULL

extern struct freeze_state freeze_state;
extern char __freeze_span_start[], __freeze_span_end[];

/* os-Linux/freeze.c */
unsigned long long os_freeze_clock(void);
void os_freeze_sleep_us(int us);
void os_freeze_check_options(void);
int os_freeze_share(unsigned long physmem, unsigned long long size);
void os_freeze_wait_go(struct freeze_request *go);
int os_freeze_load(unsigned long physmem, const struct freeze_layout *layout,
		   const char **why);
void os_freeze_hold(const struct freeze_report *report,
		    struct freeze_request *thaw);
int os_freeze_receive(struct freeze_request *request);
void os_freeze_send(const struct freeze_report *report);
void os_freeze_exit(int code) __attribute__((noreturn));
int os_freeze_device(int index);
int os_freeze_wait_readable(int fd);
int os_freeze_peer_gone(int fd);
int os_freeze_move_fd(int fd, int wanted);
int os_freeze_pipe_at(int wanted, int *write_end);

/* os-Linux/time.c, os-Linux/skas/process.c, kernel/mem.c */
extern long long os_clock_offset;
int init_stub_exe_fd(void);
void interrupt_stub(void);
unsigned long linear_map_start(void);

/* kernel/freeze.c */
int freeze_prepare(void);
void freeze_resume(void);
void freeze_booted(void);
void freeze_report_end(int kind);
int freeze_start_stub(struct mm_id *id);
void freeze_forget_stubs(void);
extern int freeze_lazy;

/* kernel/irq.c */
void um_irqs_rebuild(void);
void um_irq_rearm_fd(int fd);

/* drivers/virtio_uml_freeze.c */
int virtio_uml_freeze(struct freeze_report *report);
void virtio_uml_thaw(void);
int virtio_uml_reconnect(struct freeze_report *report);
void virtio_uml_kick(void);

#endif /* __UM_FREEZE_H */
