/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_VHOST_USER_H
#define MOBI_VHOST_USER_H

#include "loop.h"
#include "virtqueue.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * vhost-user, back end (https://qemu-project.gitlab.io/qemu/interop/vhost-user.html). A virtual machine monitor, the
 * front end, connects to a unix socket and hands over the guest's memory, the virtqueues' addresses and two event
 * descriptors per queue: *kick* (guest to device) and *call* (device to guest). This library listens, negotiates and
 * keeps the queues; the device only sees kicks and works on its queues with virtqueue.h:
 *
 *	static void kick(void *context, unsigned index)
 *	{
 *		struct virtqueue *queue = vhost_user_queue(server, index);
 *
 *		while (budget-- && virtqueue_pop(queue, &chain, iov, VIRTQUEUE_MAX_IOV) > 0)
 *			virtqueue_push(queue, chain.head, serve(&chain));
 *		virtqueue_publish(queue);
 *		if (virtqueue_want_kicks(queue)) // there is more already: let others have their turn
 *			vhost_user_again(server, index);
 *	}
 *
 * One front end at a time: another's connection waits until the first one leaves. After a disconnect all is as in the
 * beginning, and the next front end says where in the rings to go on. GET_VRING_BASE stops a queue: after its reply
 * nothing of that queue's is read or written until it is started again.
 *
 * A device must not keep pieces of a chain after its `stop` was called: their memory may be unmapped.
 */

#define VHOST_USER_MAX_QUEUES 16

struct vhost_user;

struct vhost_user_device {
	const char *name;   /* for diagnostics */
	uint64_t features;  /* virtio feature bits of the device itself; those of rings and transport are added */
	unsigned queues;    /* 1 … VHOST_USER_MAX_QUEUES */
	const void *config; /* the configuration space, which the device may change in place, or NULL */
	size_t config_size; /* bytes, at most 256 */

	/* Chains may be available: after a kick of the guest, after a start of the queue, after vhost_user_again(). */
	void (*kick)(void *context, unsigned index);
	/* The queue, still running, is about to stop: push and publish what is done, unpop the rest. May be NULL. */
	void (*stop)(void *context, unsigned index);
	/* A front end came or went. May be NULL. */
	void (*connection)(void *context, bool connected);
	/* The guest writes to the configuration space; false refuses. May be NULL: always refused. */
	bool (*set_config)(void *context, size_t offset, const void *data, size_t size);
};

/*
 * Serves `device` on the unix socket `path` (mode 0600; a stale socket is replaced, one that is in use is not).
 * `device` must outlive the result. NULL and errno on failure.
 */
struct vhost_user *vhost_user_listen(
	struct loop *loop, const char *path, const struct vhost_user_device *device, void *context);

/* Stops all queues, disconnects, removes the socket. */
void vhost_user_free(struct vhost_user *server);

struct virtqueue *vhost_user_queue(struct vhost_user *server, unsigned index);
bool vhost_user_connected(const struct vhost_user *server);
uint64_t vhost_user_features(const struct vhost_user *server); /* what the front end has accepted */

/* Calls `kick` for this queue once more, after the other events of the loop. */
void vhost_user_again(struct vhost_user *server, unsigned index);

#endif
