/* SPDX-License-Identifier: Apache-2.0 */
#include "unix_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG 4

static int open_socket(const char *path, int type, struct sockaddr_un *address)
{
	*address = (struct sockaddr_un){.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof(address->sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address->sun_path, path);
	return socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

static int fail(int fd, int error)
{
	close(fd);
	errno = error;
	return -1;
}

/*
 * Asked with the wrong type of socket: a real connection would replace the controller, or the guest, of a process that
 * lives, and would be refused by one that has bound the path but does not listen yet. A file of another kind refuses
 * too, and is none of ours.
 */
static bool remove_stale(const struct sockaddr_un *address)
{
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct stat file;
	bool stale;

	if (fd < 0)
		return false;
	stale = lstat(address->sun_path, &file) == 0 && S_ISSOCK(file.st_mode) &&
		connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 && errno == ECONNREFUSED;
	close(fd);
	return stale && unlink(address->sun_path) == 0;
}

static bool bind_at(int fd, const struct sockaddr_un *address)
{
	const struct sockaddr *name = (const struct sockaddr *)address;

	if (bind(fd, name, sizeof(*address)) == 0)
		return true;
	if (errno != EADDRINUSE)
		return false;
	if (remove_stale(address) && bind(fd, name, sizeof(*address)) == 0)
		return true;
	errno = EADDRINUSE;
	return false;
}

int unix_listen(const char *path, int type)
{
	struct sockaddr_un address;
	int fd = open_socket(path, type, &address);
	mode_t mask;
	bool bound;

	if (fd < 0)
		return -1;
	mask = umask(0177);
	bound = bind_at(fd, &address);
	umask(mask);
	return bound && listen(fd, BACKLOG) == 0 ? fd : fail(fd, errno);
}

int unix_connect(const char *path, int type)
{
	struct sockaddr_un address;
	int fd = open_socket(path, type, &address);

	if (fd < 0)
		return -1;
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0 && fcntl(fd, F_SETFL, 0) == 0)
		return fd;
	return fail(fd, errno);
}
