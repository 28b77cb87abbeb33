/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_SANDBOX_H
#define MOBI_SANDBOX_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * The wall round a guest. A guest's kernel is an ordinary process that runs code of people nobody trusts; when one of
 * them takes it over, this is what is left to take. Layers, each of which is enough against most of what it guards
 * against, and each of which may be missing on some host:
 *
 *	namespaces	own user, mount, pid, network, IPC and host name space: no capability, no other process to
 *			see or signal, no network; when its init ends, nothing of the guest survives
 *	root		an empty read-only file system, with a copy of /proc/cpuinfo and the initial RAM disk
 *	landlock	no file but those (and the kernel's own to execute), no TCP, no abstract sockets, no signals to
 *			or tracing of others
 *	seccomp		only the system calls UML makes (no socket(), no connect(), no namespaces, no mounts, …)
 *	rights		no new privileges, no capabilities, no core dumps, files no larger than the guest's memory
 *
 * All of it is set up in the child, between clone and exec; what took effect comes back as a set of bits.
 */
enum sandbox_layer {
	SANDBOX_NAMESPACES = 1 << 0,
	SANDBOX_ROOT = 1 << 1,
	SANDBOX_LANDLOCK_FILES = 1 << 2,
	SANDBOX_LANDLOCK_TCP = 1 << 3,
	SANDBOX_LANDLOCK_SCOPES = 1 << 4,
	SANDBOX_SECCOMP = 1 << 5,
	SANDBOX_RIGHTS = 1 << 6,
};

#define SANDBOX_LAYERS 7

/* What the guest's kernel finds as its initial RAM disk when it stands in SANDBOX_ROOT. */
#define SANDBOX_INITRD "/initrd"

/* Name of the layer with this bit number, for people and `status`. */
const char *sandbox_layer_name(unsigned int bit);

/*
 * Like fork(), but the child is the init (pid 1) of new namespaces, without any capability outside of them.
 * -1 and errno where that is not allowed.
 */
pid_t sandbox_clone(void);

/*
 * In that child: user and group map, then the empty root. `uid` and `gid` are those before the clone. Returns the
 * layers that took effect, 0 if the namespaces are of no use.
 */
unsigned int sandbox_enter(uid_t uid, gid_t gid, const char *initrd);

/* Just before exec of `kernel_fd`. `traced`: UML will ptrace its stubs. `file_max`: largest file, bytes. */
unsigned int sandbox_restrict(int kernel_fd, const char *initrd, bool traced, uint64_t file_max);

/* Parts of sandbox_restrict, each in a file of its own. */
unsigned int landlock_restrict(int kernel_fd, const char *initrd);
bool seccomp_restrict(bool traced);

#endif
