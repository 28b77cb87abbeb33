/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device side of a split virtqueue; the idea is in virtqueue.h. The one rule of this file: a word of guest memory
 * is read exactly once into a local variable, and only the checked copy is used.
 */
#include "virtqueue.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/*
 * Writes to a descriptor of the guest's choice and must never wait for it: the front end shares the open file, so
 * O_NONBLOCK set here would be worth nothing against a hostile one. A full pipe means that it has been told already.
 */
static void notify(int fd)
{
	uint64_t one = 1;
	struct iovec iov = {&one, sizeof(one)};
	struct pollfd ready = {.fd = fd, .events = POLLOUT};

	if (send(fd, &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 || errno != ENOTSOCK)
		return;
	if (pwritev2(fd, &iov, 1, -1, RWF_NOWAIT) >= 0 || errno != EOPNOTSUPP)
		return;
	if (poll(&ready, 1, 0) == 1 && (ready.revents & POLLOUT) && write(fd, &one, sizeof(one)) < 0) {
		/* Nobody is there any more; the connection will say so. */
	}
}

void virtqueue_break(struct virtqueue *queue, const char *fault)
{
	queue->broken = true;
	queue->fault = fault;
	if (queue->err_fd >= 0)
		notify(queue->err_fd);
}

bool virtqueue_start(struct virtqueue *queue, uint64_t desc, uint64_t avail, uint64_t used, uint16_t base)
{
	const size_t tail = queue->event_idx ? 2 : 0, used_bytes = 4 + 8UL * queue->size;

	queue->running = false;
	queue->broken = true;
	queue->desc = guest_memory_at_user(queue->memory, desc, 16ULL * queue->size);
	queue->avail = guest_memory_at_user(queue->memory, avail, 4 + 2ULL * queue->size + tail);
	queue->used = guest_memory_at_user(queue->memory, used, used_bytes + tail);
	if (!queue->desc || !queue->avail || !queue->used) {
		queue->fault = "a table is outside guest memory";
		return false;
	}
	if ((uintptr_t)queue->desc % 16 || (uintptr_t)queue->avail % 2 || (uintptr_t)queue->used % 4) {
		queue->fault = "a table is misaligned";
		return false;
	}
	queue->avail_event = (void *)((uintptr_t)queue->used + used_bytes);
	queue->next_avail = base;
	queue->next_used = queue->published = queue->used->idx;
	queue->shown = false;
	queue->fault = NULL;
	queue->broken = false;
	queue->running = true;
	return true;
}

static uint16_t avail_index(const struct virtqueue *queue)
{
	return __atomic_load_n(&queue->avail->idx, __ATOMIC_ACQUIRE);
}

unsigned virtqueue_available(const struct virtqueue *queue)
{
	return queue->running && !queue->broken ? (uint16_t)(avail_index(queue) - queue->next_avail) : 0;
}

/* Appends a descriptor's buffer to the chain, in as many pieces as it has regions. */
static const char *chain_add(
	const struct virtqueue *queue, struct virtqueue_chain *chain, size_t room, const struct vring_desc *desc)
{
	const bool writable = desc->flags & VRING_DESC_F_WRITE;
	uint64_t address = desc->addr, left = desc->len;

	if (left == 0)
		return "a descriptor of no bytes";
	if (!writable && chain->writable)
		return "a readable descriptor after a writable one";
	while (left) {
		uint64_t piece = left;
		void *host = guest_memory_piece(queue->memory, address, &piece);

		if (!host)
			return "a buffer outside guest memory";
		if (chain->readable + chain->writable == room)
			return "a chain with too many pieces";
		chain->iov[chain->readable + chain->writable] = (struct iovec){host, piece};
		if (writable) {
			chain->writable++;
			chain->writable_bytes += piece;
		} else {
			chain->readable++;
			chain->readable_bytes += piece;
		}
		address += piece;
		left -= piece;
	}
	return NULL;
}

/* A table of descriptors: the ring's own, or an indirect one, which may begin at any byte of guest memory. */
struct table {
	const uint8_t *entries;
	unsigned count;
};

static struct vring_desc read_desc(const struct table *table, unsigned i)
{
	struct vring_desc desc;

	memcpy(&desc, table->entries + (size_t)i * sizeof(desc), sizeof(desc));
	/* From here on the copy in hand may not be replaced by a second look at guest memory. */
	__asm__ volatile("" ::: "memory");
	return desc;
}

/* Follows one table from entry `i`. `*indirect` is set when the chain goes on in an indirect table. */
static const char *walk(const struct virtqueue *queue, struct virtqueue_chain *chain, size_t room,
	const struct table *table, unsigned i, struct table *indirect)
{
	/* A chain longer than its table has a loop. */
	for (unsigned steps = 0; steps < table->count; steps++) {
		struct vring_desc desc;
		const char *fault;

		if (i >= table->count)
			return "a descriptor number outside its table";
		desc = read_desc(table, i);
		if (desc.flags & VRING_DESC_F_INDIRECT) {
			if (!indirect || !queue->indirect)
				return "an indirect table where none is allowed";
			if (desc.flags & VRING_DESC_F_NEXT)
				return "an indirect table followed by a descriptor";
			if (desc.len == 0 || desc.len % 16 || desc.len / 16 > VIRTQUEUE_MAX_IOV)
				return "an indirect table of a wrong size";
			indirect->entries = guest_memory_at(queue->memory, desc.addr, desc.len);
			indirect->count = desc.len / 16;
			return indirect->entries ? NULL : "an indirect table outside guest memory";
		}
		fault = chain_add(queue, chain, room, &desc);
		if (fault)
			return fault;
		if (!(desc.flags & VRING_DESC_F_NEXT))
			return NULL;
		i = desc.next;
	}
	return "a chain with a loop";
}

int virtqueue_pop(struct virtqueue *queue, struct virtqueue_chain *chain, struct iovec *iov, size_t room)
{
	struct table direct = {(const uint8_t *)queue->desc, queue->size}, indirect = {NULL, 0};
	unsigned waiting;
	const char *fault;

	if (!queue->running || queue->broken)
		return queue->broken ? -1 : 0;
	waiting = (uint16_t)(avail_index(queue) - queue->next_avail);
	if (waiting == 0)
		return 0;
	if (waiting > queue->size) {
		virtqueue_break(queue, "more chains available than the ring has entries");
		return -1;
	}
	*chain = (struct virtqueue_chain){.iov = iov, .head = queue->avail->ring[queue->next_avail % queue->size]};
	fault = walk(queue, chain, room, &direct, chain->head, &indirect);
	if (!fault && indirect.entries)
		fault = walk(queue, chain, room, &indirect, 0, NULL);
	if (fault) {
		virtqueue_break(queue, fault);
		return -1;
	}
	queue->next_avail++;
	return 1;
}

void virtqueue_unpop(struct virtqueue *queue, unsigned count)
{
	queue->next_avail -= count;
}

void virtqueue_push(struct virtqueue *queue, uint16_t head, uint32_t written)
{
	volatile struct vring_used_elem *e;

	if (!queue->running || queue->broken)
		return;
	e = &queue->used->ring[queue->next_used % queue->size];
	e->id = head;
	e->len = written;
	queue->next_used++;
}

/* Does the guest want to be told that the used index went from `from` to `to`? */
static bool wants_notification(struct virtqueue *queue, uint16_t from, uint16_t to)
{
	bool first = !queue->shown;

	queue->shown = true;
	if (!queue->event_idx)
		return !(queue->avail->flags & VRING_AVAIL_F_NO_INTERRUPT);
	return first || vring_need_event(queue->avail->ring[queue->size], to, from);
}

void virtqueue_publish(struct virtqueue *queue)
{
	const uint16_t from = queue->published;

	if (!queue->running || queue->broken || queue->next_used == queue->published)
		return;
	__atomic_store_n(&queue->used->idx, queue->next_used, __ATOMIC_RELEASE);
	queue->published = queue->next_used;
	/* The index must be visible before the guest's wish is read, or both sides wait for one another. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (wants_notification(queue, from, queue->published) && queue->call_fd >= 0)
		notify(queue->call_fd);
}

void virtqueue_no_kicks(struct virtqueue *queue)
{
	/* With the event index silence is the default: the old event lies behind. */
	if (queue->running && !queue->broken && !queue->event_idx)
		queue->used->flags = VRING_USED_F_NO_NOTIFY;
}

bool virtqueue_want_kicks(struct virtqueue *queue)
{
	if (!queue->running || queue->broken)
		return false;
	if (queue->event_idx)
		__atomic_store_n(queue->avail_event, queue->next_avail, __ATOMIC_RELAXED);
	else
		queue->used->flags = 0;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return virtqueue_available(queue) > 0;
}

/* What is left of a range of bytes in pieces. */
struct cursor {
	const struct iovec *iov;
	unsigned count;
	size_t offset, length;
};

static bool next_piece(struct cursor *cursor, struct iovec *piece)
{
	for (; cursor->count && cursor->length; cursor->iov++, cursor->count--) {
		size_t n = cursor->iov->iov_len;

		if (cursor->offset >= n) {
			cursor->offset -= n;
			continue;
		}
		n -= cursor->offset;
		if (n > cursor->length)
			n = cursor->length;
		*piece = (struct iovec){(uint8_t *)cursor->iov->iov_base + cursor->offset, n};
		cursor->offset += n;
		cursor->length -= n;
		return true;
	}
	return false;
}

unsigned iov_slice(const struct iovec *iov, unsigned count, size_t offset, size_t length, struct iovec *slice)
{
	struct cursor cursor = {iov, count, offset, length};
	unsigned pieces = 0;

	while (next_piece(&cursor, &slice[pieces]))
		pieces++;
	return pieces;
}

size_t iov_read(const struct iovec *iov, unsigned count, size_t offset, void *to, size_t length)
{
	struct cursor cursor = {iov, count, offset, length};
	struct iovec piece;
	size_t done = 0;

	for (; next_piece(&cursor, &piece); done += piece.iov_len)
		memcpy((uint8_t *)to + done, piece.iov_base, piece.iov_len);
	return done;
}

size_t iov_write(const struct iovec *iov, unsigned count, size_t offset, const void *from, size_t length)
{
	struct cursor cursor = {iov, count, offset, length};
	struct iovec piece;
	size_t done = 0;

	for (; next_piece(&cursor, &piece); done += piece.iov_len)
		memcpy(piece.iov_base, (const uint8_t *)from + done, piece.iov_len);
	return done;
}

void iov_fill(const struct iovec *iov, unsigned count, size_t offset, size_t length)
{
	struct cursor cursor = {iov, count, offset, length};
	struct iovec piece;

	while (next_piece(&cursor, &piece))
		memset(piece.iov_base, 0, piece.iov_len);
}
