/* SPDX-License-Identifier: Apache-2.0 */
/* Namespaces, the empty root and the process's rights; the other layers are in landlock.c and seccomp_filter.c. */
#include "sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NAMESPACES (CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)

/* Not 0: an exec by user 0 would get the namespace's capabilities back. */
#define INNER_ID 1
#define CPUINFO_MAX (1 << 18)

const char *sandbox_layer_name(unsigned int bit)
{
	static const char *const names[SANDBOX_LAYERS] = {
		"namespaces", "root", "landlock-files", "landlock-tcp", "landlock-scopes", "seccomp", "rights"};

	return bit < SANDBOX_LAYERS ? names[bit] : NULL;
}

pid_t sandbox_clone(void)
{
	return (pid_t)syscall(SYS_clone, NAMESPACES | SIGCHLD, NULL, NULL, NULL, NULL);
}

static bool write_file(const char *path, const char *text, size_t size)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0444);
	bool written;

	if (fd < 0)
		return false;
	written = write(fd, text, size) == (ssize_t)size;
	close(fd);
	return written;
}

static bool map_ids(uid_t uid, gid_t gid)
{
	char text[64];
	int length;

	if (!write_file("/proc/self/setgroups", "deny", 4))
		return false;
	length = snprintf(text, sizeof(text), "%d %u 1", INNER_ID, gid);
	if (!write_file("/proc/self/gid_map", text, (size_t)length))
		return false;
	length = snprintf(text, sizeof(text), "%d %u 1", INNER_ID, uid);
	return write_file("/proc/self/uid_map", text, (size_t)length);
}

static ssize_t read_cpuinfo(char *text, size_t size)
{
	int fd = open("/proc/cpuinfo", O_RDONLY | O_CLOEXEC);
	size_t done = 0;
	ssize_t got;

	if (fd < 0)
		return -1;
	while (done < size && (got = read(fd, text + done, size - done)) > 0)
		done += (size_t)got;
	close(fd);
	return (ssize_t)done;
}

/* A tmpfs over /tmp (a directory that is always there) becomes the root; the old one is let go. */
static bool make_root(const char *initrd)
{
	static char cpuinfo[CPUINFO_MAX];
	ssize_t size = read_cpuinfo(cpuinfo, sizeof(cpuinfo));
	int initrd_fd = initrd ? open(initrd, O_PATH | O_CLOEXEC) : -1;
	char source[64];

	if (size < 0 || (initrd && initrd_fd < 0))
		return false;
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
		mount("guest", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755") < 0 ||
		mkdir("/tmp/proc", 0555) < 0 || !write_file("/tmp/proc/cpuinfo", cpuinfo, (size_t)size))
		return false;
	if (initrd) {
		snprintf(source, sizeof(source), "/proc/self/fd/%d", initrd_fd);
		if (!write_file("/tmp" SANDBOX_INITRD, "", 0) ||
			mount(source, "/tmp" SANDBOX_INITRD, NULL, MS_BIND, NULL) < 0)
			return false;
		close(initrd_fd);
	}
	if (chdir("/tmp") < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 ||
		chdir("/") < 0)
		return false;
	return mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) == 0;
}

unsigned int sandbox_enter(uid_t uid, gid_t gid, const char *initrd)
{
	unsigned int layers = SANDBOX_NAMESPACES;

	if (!map_ids(uid, gid))
		return 0;
	if (make_root(initrd))
		layers |= SANDBOX_ROOT;
	return layers;
}

/* For the case without a user namespace, where the shim may be root. Without the privilege there is nothing to drop. */
static void drop_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {0};

	for (int capability = 0; prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
		prctl(PR_CAPBSET_DROP, capability);
	prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED);
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	syscall(SYS_capset, &header, none);
}

unsigned int sandbox_restrict(int kernel_fd, const char *initrd, bool traced, uint64_t file_max)
{
	struct rlimit no_core = {0, 0}, files = {file_max, file_max};
	unsigned int layers = 0;

	drop_capabilities();
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && setrlimit(RLIMIT_CORE, &no_core) == 0 &&
		setrlimit(RLIMIT_FSIZE, &files) == 0)
		layers |= SANDBOX_RIGHTS;
	layers |= landlock_restrict(kernel_fd, initrd);
	if (seccomp_restrict(traced))
		layers |= SANDBOX_SECCOMP;
	return layers;
}
