/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_GUEST_PROCESS_H
#define MOBI_GUEST_PROCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * One run of the guest's kernel as a process tree: the kernel itself (leader of a session), its stubs, and where
 * namespaces are allowed an init above them, whose end takes all of them along. See kernel/README.md, section 2, for
 * what the kernel finds open.
 */
#define GUEST_DEVICES_MAX 16
#define GUEST_MESSAGE_MAX 160

struct process_spec {
	const char *kernel;
	const char *initrd;     /* or NULL */
	char **argv;            /* NULL-terminated */
	size_t initrd_argument; /* index of its option in argv, whose path is another one in an empty root; 0: none */
	const int *sources;     /* descriptors to hand over … */
	const int *targets;     /* … and the numbers they get, ascending, from 0 to 599 */
	size_t fd_count;
	bool sandboxed;
	bool traced; /* ptrace mode */
	uint64_t file_max;
};

struct guest_process {
	pid_t pid;     /* of the kernel, as seen from here; 0: none */
	pid_t waited;  /* whose end is awaited: the kernel's, or its init's */
	int status_fd; /* where the init writes the kernel's wait status; -1 without init */
	unsigned int layers;
};

/* False with a sentence in `message` (GUEST_MESSAGE_MAX bytes): nothing is left running then. */
bool process_start(struct guest_process *process, const struct process_spec *spec, char *message);

/* Called for each child that waitpid() returned: true if it was this process, with the kernel's wait status. */
bool process_reaped(struct guest_process *process, pid_t pid, int *status);

void process_signal(const struct guest_process *process, int number); /* to the whole group */
void process_kill(const struct guest_process *process);

#endif
