/* SPDX-License-Identifier: Apache-2.0 */
/* A device's turns over a guest's queue. Input: [flags 1 | what the device does 16 | the guest's memory …]. */
#include "guest.h"

#define TURNS 16

static void use(const struct guest *guest, const struct virtqueue_chain *chain)
{
	static uint8_t copy[4096];
	struct iovec slice[VIRTQUEUE_MAX_IOV];
	const struct iovec *writable = chain->iov + chain->readable;
	size_t length = iov_read(chain->iov, chain->readable, 1, copy, sizeof(copy));

	guest_check_chain(guest, chain);
	check(iov_slice(chain->iov, chain->readable, 1, sizeof(copy), slice) <= chain->readable);
	check(iov_write(writable, chain->writable, 0, copy, length) <= chain->writable_bytes);
	iov_fill(writable, chain->writable, length, 100);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct iovec iov[VIRTQUEUE_MAX_IOV];
	struct virtqueue_chain chain;
	struct guest guest;

	if (size < 1 + TURNS)
		return 0;
	if (guest_make(&guest, data[0], data + 1 + TURNS, size - 1 - TURNS))
		for (size_t i = 1; i <= TURNS; i++) {
			if (virtqueue_pop(&guest.queue, &chain, iov, data[i] & 4 ? 3 : VIRTQUEUE_MAX_IOV) > 0) {
				use(&guest, &chain);
				if (data[i] & 1)
					virtqueue_push(&guest.queue, chain.head, (uint32_t)chain.writable_bytes);
				else
					virtqueue_unpop(&guest.queue, 1);
			}
			if (data[i] & 2)
				virtqueue_publish(&guest.queue);
			virtqueue_no_kicks(&guest.queue);
			virtqueue_want_kicks(&guest.queue);
		}
	check(virtqueue_available(&guest.queue) <= UINT16_MAX);
	guest_memory_destroy(&guest.memory);
	return 0;
}
