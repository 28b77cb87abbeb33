/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Role `disk`: one disk of one guest. It serves a block device on a vhost-user socket (blk.h) from a base and a
 * copy-on-write overlay (overlay.h), and shares overlay and maps with the process that copies the disk to another host.
 */
#include "blk.h"
#include "control.h"
#include "log.h"
#include "options.h"
#include "role.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

struct disk {
	struct loop *loop;
	struct control *control;
	struct overlay overlay;
	struct blk blk;
};

static const char *const states[] = {[BLK_OK] = "ok", [BLK_NO_SPACE] = "no-space", [BLK_ERROR] = "error"};

static const char *message_of(const struct blk *blk)
{
	return blk->state == BLK_OK ? NULL : blk->message;
}

static void op_status(void *context, struct control_request *request, const struct control_args *args)
{
	struct disk *disk = context;
	struct control_message *reply = control_reply(request);

	(void)args;
	control_put_u64(reply, "size", disk->overlay.size);
	control_put_u64(reply, "block_size", BLOCK_SIZE);
	control_put_u64(reply, "blocks", disk->overlay.blocks);
	control_put_u64(reply, "allocated", overlay_count(&disk->overlay, disk->overlay.allocated));
	control_put_u64(reply, "dirty", overlay_count(&disk->overlay, disk->overlay.dirty));
	control_put_str(reply, "state", states[disk->blk.state]);
	control_put_bool(reply, "connected", vhost_user_connected(disk->blk.server));
	control_put_u64(reply, "reads", disk->blk.reads);
	control_put_u64(reply, "writes", disk->blk.writes);
	control_put_u64(reply, "flushes", disk->blk.flushes);
	control_put_str(reply, "message", message_of(&disk->blk));
	control_send(reply);
}

/* Sharing, tracking and syncing need an overlay that can be written. */
static bool has_overlay(struct disk *disk, struct control_request *request)
{
	if (disk->overlay.file >= 0 && !disk->overlay.read_only)
		return true;
	control_error(request, CONTROL_BAD_STATE, "this disk is read-only: it has no overlay to share, track or sync");
	return false;
}

static void op_share(void *context, struct control_request *request, const struct control_args *args)
{
	struct disk *disk = context;
	struct control_message *reply;
	int fd;

	(void)args;
	if (!has_overlay(disk, request))
		return;
	fd = overlay_share(&disk->overlay);
	if (fd < 0) {
		control_error(request, CONTROL_IO, "cannot open the overlay again: %s", strerror(errno));
		return;
	}
	reply = control_reply(request);
	control_put_u64(reply, "size", disk->overlay.size);
	control_put_u64(reply, "block_size", BLOCK_SIZE);
	control_put_u64(reply, "blocks", disk->overlay.blocks);
	control_put_u64(reply, "data_offset", disk->overlay.data_offset);
	control_put_u64(reply, "allocated_offset", disk->overlay.allocated_offset);
	control_put_u64(reply, "dirty_offset", disk->overlay.dirty_offset);
	control_put_fd(reply, fd);
	control_put_fd(reply, disk->overlay.maps);
	control_send(reply);
	close(fd);
}

static void op_track(void *context, struct control_request *request, const struct control_args *args)
{
	struct disk *disk = context;
	bool on;

	if (!control_bool(args, "on", &on) || !has_overlay(disk, request))
		return;
	overlay_track(&disk->overlay, on);
	control_ok(request);
}

static void op_sync(void *context, struct control_request *request, const struct control_args *args)
{
	struct disk *disk = context;
	struct control_message *reply;
	int failure;

	(void)args;
	if (!has_overlay(disk, request))
		return;
	failure = overlay_adopt(&disk->overlay);
	if (!failure)
		failure = overlay_sync(&disk->overlay);
	if (failure) {
		control_error(request, failure == -ENOSPC ? CONTROL_NO_SPACE : CONTROL_IO,
			"cannot sync the overlay: %s", strerror(-failure));
		return;
	}
	reply = control_reply(request);
	control_put_u64(reply, "allocated", overlay_count(&disk->overlay, disk->overlay.allocated));
	control_send(reply);
}

static const struct control_op ops[] = {
	{"status", op_status, ""},
	{"share", op_share, ""},
	{"track", op_track, "on"},
	{"sync", op_sync, ""},
	{0},
};

static void state_changed(void *context)
{
	struct disk *disk = context;
	struct control_message *event;

	if (!disk->control)
		return;
	event = control_event(disk->control, "state");
	control_put_str(event, "state", states[disk->blk.state]);
	control_put_str(event, "message", message_of(&disk->blk));
	control_send(event);
}

static void ended(void *context, const struct signalfd_siginfo *info)
{
	struct disk *disk = context;

	(void)info;
	loop_stop(disk->loop, 0);
}

/* Serves until it is told to end; returns the exit status. */
static int serve(struct disk *disk, const char *socket)
{
	int status;

	disk->blk.changed = state_changed;
	disk->blk.context = disk;
	if (!blk_start(&disk->blk, disk->loop, &disk->overlay, socket)) {
		log_error("cannot listen on %s: %s", socket, strerror(errno));
		return 1;
	}
	status = loop_run(disk->loop);
	blk_stop(&disk->blk);
	if (overlay_sync(&disk->overlay) < 0) {
		log_error("the overlay could not be synced at the end");
		status = 1;
	}
	return status;
}

static int run(int argc, char **argv)
{
	struct overlay_options storage = {0};
	const char *socket = NULL, *control = NULL;
	struct disk disk = {0};
	char error[512];
	const struct option_spec specs[] = {
		{"socket", OPTION_STRING, &socket, "PATH", "where to serve the block device (vhost-user)",
			.required = true},
		{"base", OPTION_STRING, &storage.base, "FILE", "what the disk holds at first; without: zeros", false},
		{"overlay", OPTION_STRING, &storage.overlay, "FILE", "where changes go; without: read-only", false},
		{"size", OPTION_SIZE, &storage.size, "SIZE", "of the disk, at least that of the base", false},
		{"read-only", OPTION_FLAG, &storage.read_only, NULL, "refuse writes", false},
		{"control", OPTION_STRING, &control, "PATH", "the control socket", false},
		{0},
	};
	int status =
		options_parse("disk", "serve a disk, with a copy-on-write overlay, over vhost-user", argc, argv, specs);

	if (status >= 0)
		return status;
	log_open("disk");
	signal(SIGXFSZ, SIG_IGN);
	if (!overlay_open(&disk.overlay, &storage, error, sizeof(error))) {
		overlay_close(&disk.overlay);
		return options_error("disk", "%s", error);
	}
	disk.loop = loop_new();
	status = 1;
	if (!disk.loop) {
		log_error("cannot make an event loop: %s", strerror(errno));
	} else {
		loop_signal(disk.loop, SIGTERM, ended, &disk);
		loop_signal(disk.loop, SIGINT, ended, &disk);
		if (control)
			disk.control = control_new(&(struct control_config){
				.loop = disk.loop, .path = control, .role = "disk", .ops = ops, .context = &disk});
		if (!control || disk.control)
			status = serve(&disk, socket);
		control_free(disk.control);
		loop_free(disk.loop);
	}
	overlay_close(&disk.overlay);
	return status;
}

const struct role role_disk = {"disk", "a guest's disk: base and copy-on-write overlay over vhost-user-blk", run};
