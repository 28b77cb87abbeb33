/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_VIRTQUEUE_H
#define MOBI_VIRTQUEUE_H

#include "guest_memory.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/*
 * Split virtqueues (virtio 1.2, section 2.7), device side.
 *
 * A virtqueue is three tables in guest memory. The guest writes *descriptors* (address,
 * length, next) and puts the number of a chain's first descriptor into the *available* ring; the device does the work
 * and puts that number and the bytes it wrote into the *used* ring. The guest is not trusted and goes on writing while
 * we read: every word is read once, then checked, and every address is looked up in the regions. A guest that breaks
 * the rules only breaks its own queue.
 *
 * One turn of a device: virtqueue_pop() chains, do the work, virtqueue_push() each, virtqueue_publish() once for the
 * whole batch. virtqueue_unpop() gives chains back that could not be served now. Chains may be pushed in any order.
 */

#define VIRTQUEUE_MAX_SIZE 1024 /* descriptors in a queue */
#define VIRTQUEUE_MAX_IOV 1024  /* pieces of a chain, IOV_MAX of the host */

/*
 * One chain of descriptors: first the pieces the device may read, then those it may write. The pieces point into guest
 * memory, which changes under the reader's eyes: copy what is to be interpreted.
 */
struct virtqueue_chain {
	uint16_t head;
	unsigned readable, writable; /* number of pieces */
	size_t readable_bytes, writable_bytes;
	struct iovec *iov; /* the caller's; `readable` pieces, then `writable` pieces */
};

struct vring_desc;
struct vring_avail;
struct vring_used;

struct virtqueue {
	const struct guest_memory *memory;
	unsigned index;      /* number of the queue in its device */
	unsigned size;       /* descriptors, a power of two */
	bool event_idx;      /* VIRTIO_RING_F_EVENT_IDX was negotiated */
	bool indirect;       /* VIRTIO_RING_F_INDIRECT_DESC was negotiated */
	bool running;        /* between start and stop */
	bool broken;         /* the guest broke the rules; nothing is served until the next start */
	const char *fault;   /* which rule it broke */
	uint16_t next_avail; /* the next entry of the available ring to look at */
	uint16_t next_used;  /* the next entry of the used ring to fill; may be ahead of what is published */
	uint16_t published;  /* the used index as the guest sees it */
	bool shown;          /* something was published since the start */
	const struct vring_desc *desc;
	const volatile struct vring_avail *avail;
	volatile struct vring_used *used;
	volatile uint16_t *avail_event;
	int kick_fd, call_fd, err_fd; /* -1 = none */
};

/*
 * Puts the tables at the given addresses (of the front end's process) and begins at available entry `base`. The used
 * index is taken from the ring. False, with `fault` set, when a table is outside guest memory or misaligned.
 */
bool virtqueue_start(struct virtqueue *queue, uint64_t desc, uint64_t avail, uint64_t used, uint16_t base);

/* Takes the next chain; `iov` has room for `room` pieces. 1 = one chain, 0 = none available, -1 = queue broken. */
int virtqueue_pop(struct virtqueue *queue, struct virtqueue_chain *chain, struct iovec *iov, size_t room);

/* Gives the `count` chains that were popped last back: they will be popped again. */
void virtqueue_unpop(struct virtqueue *queue, unsigned count);

/* Chains that the guest offers and nobody has popped. */
unsigned virtqueue_available(const struct virtqueue *queue);

/* Returns a chain with the number of bytes written to it; the guest sees it at virtqueue_publish(). */
void virtqueue_push(struct virtqueue *queue, uint16_t head, uint32_t written);

/* Shows all pushed chains to the guest and notifies it if it wants that. */
void virtqueue_publish(struct virtqueue *queue);

/*
 * Tells the guest whether it need kick. A kick is only certain for chains that become available after
 * virtqueue_want_kicks(), so call it before going idle; it returns true when some are available already.
 */
void virtqueue_no_kicks(struct virtqueue *queue);
bool virtqueue_want_kicks(struct virtqueue *queue);

/* Marks the ring broken and tells the front end through err_fd. */
void virtqueue_break(struct virtqueue *queue, const char *fault);

/*
 * Copies between a buffer and the pieces of a chain from `offset` on; returns the bytes copied, less than `length` when
 * the pieces end.
 */
size_t iov_read(const struct iovec *iov, unsigned count, size_t offset, void *to, size_t length);
size_t iov_write(const struct iovec *iov, unsigned count, size_t offset, const void *from, size_t length);
void iov_fill(const struct iovec *iov, unsigned count, size_t offset, size_t length); /* with zeros */

/* The pieces of [offset, offset + length), as far as they are there; `slice` has room for `count`. Returns how many. */
unsigned iov_slice(const struct iovec *iov, unsigned count, size_t offset, size_t length, struct iovec *slice);

#endif
