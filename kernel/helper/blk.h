/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_BLK_H
#define MOBI_BLK_H

#include "overlay.h"
#include "vhost_user.h"

/*
 * A virtio block device (virtio 1.2, section 5.2) over an overlay. Requests are served one after the other and
 * completed in order, so that the used index always says how far the device has come. A request that finds no space on
 * the host is held, and with it all that follow: the guest waits, and goes on when there is room again.
 */

enum blk_state {
	BLK_OK,
	BLK_NO_SPACE, /* a request is held */
	BLK_ERROR,    /* some request failed; the guest was told */
};

struct blk {
	struct loop *loop;
	struct overlay *overlay;
	struct vhost_user *server;
	struct vhost_user_device device;
	struct loop_timer retry;
	enum blk_state state;
	char message[160]; /* why the state is not BLK_OK */
	uint64_t reads, writes, flushes;
	void (*changed)(void *context); /* the state changed; may be NULL */
	void *context;
	uint8_t config[64];
	char identity[20];
};

/* Serves on the unix socket `path`. `blk` must stay where it is. False and errno. */
bool blk_start(struct blk *blk, struct loop *loop, struct overlay *overlay, const char *path);
void blk_stop(struct blk *blk);

#endif
