/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_HANDOVER_H
#define MOBI_HANDOVER_H

#include "frame.h"
#include "loop.h"

/*
 * Order through a move. The guest with address m moves from switch S to switch D while others (X, Y, and also guests of
 * S and D) go on sending to it. Nothing may be lost, doubled or reordered.
 *
 *	X ──── old path ────▶ S (holds, then redirects) ────▶ D (queues per sender) ──▶ guest
 *	└─────────────────────────── new path ────────────────▶
 *
 * - S *holds* the frames for the frozen guest; once told where it is, it *redirects* them and all that follow to D.
 * - Every switch that sends learns of the new place at some instant of its own. It then puts a marker on the old path,
 *   another on the new path, and sends on the new path from there on. Paths keep order, so each marker divides the
 *   stream exactly.
 * - S forwards the old path's marker to D behind the frames it divides.
 * - D delivers what is redirected. What comes on the new path from X waits until X's old-path marker was forwarded, so
 *   it never overtakes. A frame X sends to *all* (broadcast) goes on both paths: D takes it from S if X sent it before
 *   its markers, and from the new path if after; S drops the ones behind the marker.
 *
 * A marker can be lost: after two round trips without any redirected frame D stops waiting for it. After
 * HANDOVER_SETTLE all is as always.
 */
enum { HANDOVER_SENDERS = 256 };
#define HANDOVER_BOUND ((size_t)64 << 20) /* bytes held or waiting per port; more is lost, and counted */
#define HANDOVER_SETTLE (10 * LOOP_SECOND)

struct switch_port;

enum handover_output {
	HANDOVER_DELIVER,
	HANDOVER_HOLD,
	HANDOVER_REDIRECT,
};

/* What D knows of one sender. */
struct handover_sender {
	uint64_t identity;
	bool new_path;     /* its marker on the new path came */
	bool old_path;     /* its marker on the old path was forwarded */
	uint64_t since_ns; /* when the first of the two came */
	struct frame_queue waiting;
};

struct handover {
	enum handover_output output;
	struct frame_queue held;
	uint32_t to;
	uint64_t to_epoch, redirect_ns;
	uint64_t passed[HANDOVER_SENDERS]; /* senders whose marker was forwarded */
	size_t passed_count;
	struct loop_timer drain;

	bool expecting;
	uint32_t from;
	uint64_t announced_ns, redirected_ns;
	struct handover_sender *senders; /* HANDOVER_SENDERS, while expecting */
	size_t sender_count, waiting_bytes;
	struct loop_timer patience;

	uint64_t held_frames;     /* ever held */
	uint64_t redirected;      /* sent on to the new place */
	uint64_t received;        /* redirected frames that came here */
	uint64_t lost_held;       /* beyond the bound */
	uint64_t markers_missing; /* senders whose marker did not come in time */
};

void handover_init(struct switch_port *port);
void handover_free(struct switch_port *port);

/* A frame for the guest of the port, sent by `sender` on the direct path. */
void handover_input(struct switch_port *port, uint64_t sender, struct frame *frame);
/* The same, redirected by the guest's old place. */
void handover_redirected(struct switch_port *port, struct frame *frame);
/* The old-path marker of `sender`: its frames for this guest end here. */
void handover_old_path(struct switch_port *port, uint64_t sender, uint64_t epoch);
/* The new-path marker: from here on the sender sends to us. */
void handover_new_path(struct switch_port *port, uint64_t sender);
/* The old place says that it has sent on all that came before the marker of `sender`. */
void handover_forwarded(struct switch_port *port, uint64_t sender);

void handover_hold(struct switch_port *port);
void handover_unhold(struct switch_port *port);
void handover_redirect(struct switch_port *port, uint32_t peer, uint64_t epoch);
/* False without memory. */
bool handover_expect(struct switch_port *port, uint32_t from);
void handover_announced(struct switch_port *port);

#endif
