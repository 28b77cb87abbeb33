/* SPDX-License-Identifier: Apache-2.0 */
/* Requests to a disk of 1 MiB. Input: [flags 1 | the guest's memory …]; bit 7 of flags: the disk is read-only. */
#include "../blk.c"
#include "guest.h"

static struct overlay overlay;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	char path[FUZZ_PATH], error[256];
	const struct overlay_options options = {.overlay = fuzz_path(path, "disk"), .size = 1 << 20};

	(void)argc;
	(void)argv;
	setenv("MOBI_LOG", "error", 1);
	log_open("fuzz");
	check(overlay_open(&overlay, &options, error, sizeof(error)));
	unlink(path);
	return 0;
}

/* A disk as it was in the beginning. */
static void forget(void)
{
	overlay.read_only = false;
	check(overlay_zero(&overlay, 0, overlay.size, true) == 0);
	memset(overlay.allocated, 0, overlay.words * sizeof(*overlay.allocated));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct blk blk = {.overlay = &overlay};
	struct guest guest;

	if (size < 1)
		return 0;
	overlay.read_only = data[0] & 0x80;
	fill_config(&blk);
	if (guest_make(&guest, data[0], data + 1, size - 1)) {
		check(serve_batch(&blk, &guest.queue));
		check((uint16_t)(guest.queue.next_used - guest.queue.published) <= BATCH);
		virtqueue_publish(&guest.queue);
	}
	/* No request that a guest can make is a failure of the host. */
	check(blk.state == BLK_OK);
	guest_memory_destroy(&guest.memory);
	forget();
	return 0;
}
