/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_UNIX_SOCKET_H
#define MOBI_UNIX_SOCKET_H

/*
 * Unix sockets by path (at most 107 bytes). `type` is SOCK_STREAM or SOCK_SEQPACKET. All return a descriptor that is
 * closed on exec, or -1 and errno.
 */

/*
 * Non-blocking, for this user only (mode 0600). The file of a process that was killed is replaced; one that a living
 * process has is left to it: EADDRINUSE.
 */
int unix_listen(const char *path, int type);

/* Blocking, but EAGAIN instead of a wait for room in the listener's queue. */
int unix_connect(const char *path, int type);

#endif
