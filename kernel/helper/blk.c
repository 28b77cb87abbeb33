/* SPDX-License-Identifier: Apache-2.0 */
#include "blk.h"

#include "log.h"

#include <assert.h>
#include <errno.h>
#include <linux/virtio_blk.h>
#include <stdio.h>
#include <string.h>

#define SECTOR 512
#define BATCH 64
#define MAX_SEGMENTS 126                    /* with header and status a chain fits into a queue of 128 */
#define MAX_RANGES 16                       /* of a discard or write-zeroes request */
#define MAX_DISCARD_SECTORS (1u << 22)      /* 2 GiB */
#define MAX_WRITE_ZEROES_SECTORS (1u << 16) /* 32 MiB: zeros may really have to be written */
#define RETRY_NS LOOP_SECOND
#define HOLD (-ENOSPC) /* not an answer: there is no space, try again later */

#define BIT(n) (UINT64_C(1) << (n))

static void set_state(struct blk *blk, enum blk_state state, const char *what, int failure)
{
	if (state == blk->state)
		return;
	blk->state = state;
	blk->message[0] = '\0';
	if (state != BLK_OK) {
		snprintf(blk->message, sizeof(blk->message), "%s: %s", what, strerror(failure));
		log_warning("%s", blk->message);
	}
	if (blk->changed)
		blk->changed(blk->context);
}

/* The status byte for a result of the overlay, or HOLD. */
static int status_of(struct blk *blk, int result, const char *what)
{
	if (result == 0)
		return VIRTIO_BLK_S_OK;
	if (result == -ENOSPC || result == -EDQUOT) {
		set_state(blk, BLK_NO_SPACE, what, -result);
		return HOLD;
	}
	set_state(blk, BLK_ERROR, what, -result);
	return VIRTIO_BLK_S_IOERR;
}

static bool inside(const struct blk *blk, uint64_t sector, uint64_t bytes)
{
	const uint64_t sectors = blk->overlay->size / SECTOR;

	return bytes % SECTOR == 0 && sector <= sectors && bytes / SECTOR <= sectors - sector;
}

static int serve_read(struct blk *blk, const struct virtqueue_chain *chain, uint64_t sector, uint32_t *written)
{
	const uint64_t bytes = chain->writable_bytes - 1;
	struct iovec data[VIRTQUEUE_MAX_IOV];
	unsigned pieces;
	int status;

	if (!inside(blk, sector, bytes))
		return VIRTIO_BLK_S_IOERR;
	pieces = iov_slice(chain->iov + chain->readable, chain->writable, 0, bytes, data);
	status = status_of(blk, overlay_read(blk->overlay, data, pieces, sector * SECTOR, bytes), "cannot read");
	if (status == VIRTIO_BLK_S_OK)
		*written += (uint32_t)bytes;
	return status;
}

static int serve_write(struct blk *blk, const struct virtqueue_chain *chain, uint64_t sector)
{
	const uint64_t bytes = chain->readable_bytes - sizeof(struct virtio_blk_outhdr);
	struct iovec data[VIRTQUEUE_MAX_IOV];
	unsigned pieces;

	if (!inside(blk, sector, bytes) || blk->overlay->read_only)
		return VIRTIO_BLK_S_IOERR;
	pieces = iov_slice(chain->iov, chain->readable, sizeof(struct virtio_blk_outhdr), bytes, data);
	return status_of(blk, overlay_write(blk->overlay, data, pieces, sector * SECTOR, bytes), "cannot write");
}

static int serve_zero(struct blk *blk, const struct virtqueue_chain *chain, bool discard)
{
	const uint32_t limit = discard ? MAX_DISCARD_SECTORS : MAX_WRITE_ZEROES_SECTORS;
	const uint32_t known = discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
	struct virtio_blk_discard_write_zeroes ranges[MAX_RANGES];
	const size_t bytes = chain->readable_bytes - sizeof(struct virtio_blk_outhdr);
	int status = VIRTIO_BLK_S_OK;

	if (bytes == 0 || bytes % sizeof(ranges[0]) || bytes > sizeof(ranges) || blk->overlay->read_only)
		return VIRTIO_BLK_S_IOERR;
	iov_read(chain->iov, chain->readable, sizeof(struct virtio_blk_outhdr), ranges, bytes);
	for (size_t i = 0; i < bytes / sizeof(ranges[0]); i++) {
		if (ranges[i].flags & ~known)
			return VIRTIO_BLK_S_UNSUPP;
		if (ranges[i].num_sectors > limit ||
			!inside(blk, ranges[i].sector, ranges[i].num_sectors * UINT64_C(512)))
			return VIRTIO_BLK_S_IOERR;
	}
	for (size_t i = 0; i < bytes / sizeof(ranges[0]) && status == VIRTIO_BLK_S_OK; i++)
		status = status_of(blk,
			overlay_zero(blk->overlay, ranges[i].sector * SECTOR, ranges[i].num_sectors * UINT64_C(512),
				discard || ranges[i].flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
			"cannot write zeros");
	return status;
}

static int serve_identity(struct blk *blk, const struct virtqueue_chain *chain, uint32_t *written)
{
	size_t size = chain->writable_bytes - 1;

	if (size > sizeof(blk->identity))
		size = sizeof(blk->identity);
	*written += (uint32_t)iov_write(chain->iov + chain->readable, chain->writable, 0, blk->identity, size);
	return VIRTIO_BLK_S_OK;
}

/* Serves one request: the status byte, or HOLD. `*written` counts the bytes before the status. */
static int serve(struct blk *blk, const struct virtqueue_chain *chain, uint32_t *written)
{
	struct virtio_blk_outhdr header;
	uint64_t *counter = &blk->writes;
	int status;

	if (iov_read(chain->iov, chain->readable, 0, &header, sizeof(header)) != sizeof(header))
		return VIRTIO_BLK_S_IOERR;
	switch (header.type) {
	case VIRTIO_BLK_T_IN:
		counter = &blk->reads;
		status = serve_read(blk, chain, header.sector, written);
		break;
	case VIRTIO_BLK_T_OUT:
		status = serve_write(blk, chain, header.sector);
		break;
	case VIRTIO_BLK_T_FLUSH:
		counter = &blk->flushes;
		status = status_of(blk, overlay_sync(blk->overlay), "cannot sync");
		break;
	case VIRTIO_BLK_T_GET_ID:
		return serve_identity(blk, chain, written);
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES:
		status = serve_zero(blk, chain, header.type == VIRTIO_BLK_T_DISCARD);
		break;
	default:
		return VIRTIO_BLK_S_UNSUPP;
	}
	*counter += status == VIRTIO_BLK_S_OK;
	return status;
}

static void retry_later(struct blk *blk)
{
	loop_timer_set(blk->loop, &blk->retry, loop_now() + RETRY_NS);
}

/* One batch of requests. False when one had to be held. */
static bool serve_batch(struct blk *blk, struct virtqueue *queue)
{
	struct iovec iov[VIRTQUEUE_MAX_IOV];
	struct virtqueue_chain chain;

	for (unsigned i = 0; i < BATCH && virtqueue_pop(queue, &chain, iov, VIRTQUEUE_MAX_IOV) > 0; i++) {
		uint32_t written = 0;
		int status;
		uint8_t byte;

		if (chain.writable_bytes == 0) {
			virtqueue_break(queue, "a request without a byte for its status");
			return true;
		}
		status = serve(blk, &chain, &written);
		if (status == HOLD) {
			virtqueue_unpop(queue, 1);
			return false;
		}
		if (status == VIRTIO_BLK_S_OK && blk->state == BLK_NO_SPACE)
			set_state(blk, BLK_OK, "", 0);
		byte = (uint8_t)status;
		iov_write(chain.iov + chain.readable, chain.writable, chain.writable_bytes - 1, &byte, 1);
		virtqueue_push(queue, chain.head, written + 1);
	}
	return true;
}

static void serve_queue(struct blk *blk)
{
	struct virtqueue *queue = vhost_user_queue(blk->server, 0);
	bool all;

	virtqueue_no_kicks(queue);
	all = serve_batch(blk, queue);
	/* A guest that cannot flush expects that what is complete is on the disk. */
	if (!(vhost_user_features(blk->server) & BIT(VIRTIO_BLK_F_FLUSH)))
		status_of(blk, overlay_sync(blk->overlay), "cannot sync");
	virtqueue_publish(queue);
	if (!all)
		retry_later(blk);
	else if (virtqueue_want_kicks(queue))
		vhost_user_again(blk->server, 0);
}

static void kick(void *context, unsigned index)
{
	struct blk *blk = context;

	(void)index;
	if (!blk->retry.armed)
		serve_queue(blk);
}

static void retry(void *context)
{
	serve_queue(context);
}

static void stop(void *context, unsigned index)
{
	struct blk *blk = context;

	(void)index;
	loop_timer_cancel(blk->loop, &blk->retry);
	if (blk->state == BLK_NO_SPACE)
		set_state(blk, BLK_OK, "", 0);
}

static void connection(void *context, bool connected)
{
	struct blk *blk = context;
	int failure = connected ? overlay_adopt(blk->overlay) : 0;

	if (failure)
		set_state(blk, BLK_ERROR, "cannot write the overlay's map", -failure);
}

static void fill_config(struct blk *blk)
{
	const struct virtio_blk_config config = {
		.capacity = blk->overlay->size / SECTOR,
		.seg_max = MAX_SEGMENTS,
		.blk_size = SECTOR,
		.physical_block_exp = 3, /* 4096 bytes: smaller writes cost a copy */
		.min_io_size = 1,
		.num_queues = 1,
		.max_discard_sectors = MAX_DISCARD_SECTORS,
		.max_discard_seg = MAX_RANGES,
		.discard_sector_alignment = BLOCK_SIZE / SECTOR,
		.max_write_zeroes_sectors = MAX_WRITE_ZEROES_SECTORS,
		.max_write_zeroes_seg = MAX_RANGES,
		.write_zeroes_may_unmap = 1,
	};
	const size_t size = offsetof(struct virtio_blk_config, unused1) + sizeof(config.unused1);

	static_assert(offsetof(struct virtio_blk_config, unused1) + sizeof(config.unused1) <= sizeof(blk->config), "");
	memcpy(blk->config, &config, size);
	memcpy(blk->identity, "mobitopolo", 10);
}

bool blk_start(struct blk *blk, struct loop *loop, struct overlay *overlay, const char *path)
{
	const uint64_t writable = BIT(VIRTIO_BLK_F_DISCARD) | BIT(VIRTIO_BLK_F_WRITE_ZEROES);

	blk->loop = loop;
	blk->overlay = overlay;
	blk->retry = (struct loop_timer){.run = retry, .context = blk};
	fill_config(blk);
	blk->device = (struct vhost_user_device){
		.name = "disk",
		.features = BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_BLK_SIZE) | BIT(VIRTIO_BLK_F_TOPOLOGY) |
			    BIT(VIRTIO_BLK_F_FLUSH) | (overlay->read_only ? BIT(VIRTIO_BLK_F_RO) : writable),
		.queues = 1,
		.config = blk->config,
		.config_size = offsetof(struct virtio_blk_config, unused1) + 3,
		.kick = kick,
		.stop = stop,
		.connection = connection,
	};
	blk->server = vhost_user_listen(loop, path, &blk->device, blk);
	return blk->server != NULL;
}

void blk_stop(struct blk *blk)
{
	vhost_user_free(blk->server);
	loop_timer_cancel(blk->loop, &blk->retry);
	blk->server = NULL;
}
