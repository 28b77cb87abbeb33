/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Landlock layer: a process gives up rights for itself and its descendants, without privilege. The numbers are of
 * the kernel's interface (its versions 1 to 6 each added some), written out since a distribution's headers may be older
 * than its kernel.
 */
#include "sandbox.h"

#include <fcntl.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

#define CREATE_RULESET_VERSION 1
#define RULE_PATH_BENEATH 1

#define ACCESS_FS_EXECUTE (1u << 0)
#define ACCESS_FS_READ_FILE (1u << 2)
#define ACCESS_NET_ALL 3u /* bind and connect of TCP */
#define SCOPE_ALL 3u      /* abstract unix sockets, signals */

struct ruleset {
	uint64_t handled_access_fs;
	uint64_t handled_access_net;
	uint64_t scoped;
};

struct path_beneath {
	uint64_t allowed_access;
	int32_t parent_fd;
} __attribute__((packed));

/* All rights on files that this version of the interface knows. */
static uint64_t file_rights(long version)
{
	static const unsigned int known[] = {0, 13, 14, 15, 15, 16};

	return (UINT64_C(1) << known[version < 5 ? version : 5]) - 1;
}

static bool allow(int ruleset, int fd, uint64_t access)
{
	struct path_beneath rule = {access, fd};

	return syscall(SYS_landlock_add_rule, ruleset, RULE_PATH_BENEATH, &rule, 0) == 0;
}

static bool allow_path(int ruleset, const char *path)
{
	int fd = open(path, O_PATH | O_CLOEXEC);
	bool allowed = fd >= 0 && allow(ruleset, fd, ACCESS_FS_READ_FILE);

	if (fd >= 0)
		close(fd);
	return allowed;
}

unsigned int landlock_restrict(int kernel_fd, const char *initrd)
{
	long version = syscall(SYS_landlock_create_ruleset, NULL, 0, CREATE_RULESET_VERSION);
	struct ruleset rules = {0};
	size_t size = offsetof(struct ruleset, handled_access_net);
	unsigned int layers = SANDBOX_LANDLOCK_FILES;
	int ruleset;

	if (version < 1)
		return 0;
	rules.handled_access_fs = file_rights(version);
	if (version >= 4) {
		rules.handled_access_net = ACCESS_NET_ALL;
		size = offsetof(struct ruleset, scoped);
		layers |= SANDBOX_LANDLOCK_TCP;
	}
	if (version >= 6) {
		rules.scoped = SCOPE_ALL;
		size = sizeof(rules);
		layers |= SANDBOX_LANDLOCK_SCOPES;
	}
	ruleset = (int)syscall(SYS_landlock_create_ruleset, &rules, size, 0);
	if (ruleset < 0)
		return 0;
	if (!allow(ruleset, kernel_fd, ACCESS_FS_EXECUTE | ACCESS_FS_READ_FILE) ||
		!allow_path(ruleset, "/proc/cpuinfo") || (initrd && !allow_path(ruleset, initrd)) ||
		syscall(SYS_landlock_restrict_self, ruleset, 0) < 0)
		layers = 0;
	close(ruleset);
	return layers;
}
