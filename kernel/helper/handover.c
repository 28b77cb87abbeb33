/* SPDX-License-Identifier: Apache-2.0 */
/* The idea is in handover.h. A frame passes two stages: `expecting` (D's side), then `output` (S's side). */
#include "handover.h"

#include "log.h"
#include "switch.h"

#include <stdlib.h>
#include <string.h>

#define DRAIN_BYTES ((size_t)128 << 10) /* per tick: about 1 Gb/s, so that the burst fits the receiver's socket */
#define DRAIN_TICK LOOP_MS
#define PATIENCE_MIN (200 * LOOP_MS) /* two round trips of a near peer, plus what a busy host adds */
#define PATIENCE_MAX (5 * LOOP_SECOND)
#define RTT_UNKNOWN_US 250000

static void drain_tick(void *context);
static void patience_tick(void *context);

void handover_init(struct switch_port *port)
{
	struct handover *h = &port->handover;

	memset(h, 0, sizeof(*h));
	h->drain = (struct loop_timer){.run = drain_tick, .context = port};
	h->patience = (struct loop_timer){.run = patience_tick, .context = port};
}

static void expecting_end(struct handover *h)
{
	for (size_t i = 0; i < h->sender_count; i++)
		frame_queue_clear(&h->senders[i].waiting);
	free(h->senders);
	h->senders = NULL;
	h->sender_count = h->waiting_bytes = 0;
	h->expecting = false;
}

void handover_free(struct switch_port *port)
{
	struct handover *h = &port->handover;

	loop_timer_cancel(port->sw->loop, &h->drain);
	loop_timer_cancel(port->sw->loop, &h->patience);
	frame_queue_clear(&h->held);
	expecting_end(h);
}

/* ---- second stage: deliver, hold or redirect ---- */

static bool has_passed(const struct handover *h, uint64_t sender)
{
	for (size_t i = 0; i < h->passed_count; i++)
		if (h->passed[i] == sender)
			return true;
	return false;
}

static void send_redirected(struct switch_port *port, uint64_t sender, bool redirected, struct frame *frame)
{
	struct handover *h = &port->handover;
	struct tunnel_peer *peer = tunnel_find(port->sw->tunnel, h->to);
	uint8_t *plain = frame->data - TUNNEL_TARGET - TUNNEL_META;

	/* What a sender sent to all after its marker reaches the new place by itself. */
	if (!redirected && (frame->meta.flags & META_FLOODED) &&
		(has_passed(h, sender) || loop_now() > h->redirect_ns + HANDOVER_SETTLE))
		return;
	if (!peer) {
		h->lost_held++;
		return;
	}
	tunnel_meta_put(plain, frame->meta);
	memcpy(plain + TUNNEL_META, port->mac, TUNNEL_TARGET);
	tunnel_send(port->sw->tunnel, peer, TUNNEL_REDIRECTED, port->network->id, plain,
		TUNNEL_META + TUNNEL_TARGET + frame->length);
	h->redirected++;
}

static void send_forwarded(struct switch_port *port, uint64_t sender)
{
	struct handover *h = &port->handover;
	struct tunnel_peer *peer = tunnel_find(port->sw->tunnel, h->to);
	struct tunnel_marker marker = {.what = MARKER_FORWARDED, .epoch = h->to_epoch, .sender = sender};

	memcpy(marker.mac, port->mac, sizeof(marker.mac));
	if (!has_passed(h, sender) && h->passed_count < HANDOVER_SENDERS)
		h->passed[h->passed_count++] = sender;
	if (peer)
		move_send_marker(port->sw, peer, port->network->id, &marker);
}

static void hold_item(struct switch_port *port, struct frame_item *item)
{
	struct handover *h = &port->handover;

	if (item && h->held.bytes + h->waiting_bytes + item->frame.length > HANDOVER_BOUND) {
		free(item);
		item = NULL;
	}
	if (!item) {
		h->lost_held++;
		return;
	}
	frame_queue_push(&h->held, item);
	h->held_frames += item->marker ? 0 : 1;
}

static void output(struct switch_port *port, uint64_t sender, bool redirected, struct frame *frame)
{
	struct handover *h = &port->handover;
	struct frame_item *item;

	if (h->output == HANDOVER_DELIVER) {
		port_deliver(port, frame);
		return;
	}
	if (h->output == HANDOVER_REDIRECT && !h->held.head) {
		send_redirected(port, sender, redirected, frame);
		return;
	}
	item = frame_item_new(frame);
	if (item) {
		item->sender = sender;
		item->redirected = redirected;
	}
	hold_item(port, item);
}

static struct frame_item *marker_item(uint64_t sender, uint64_t epoch)
{
	struct frame_item *item = frame_item_new(&(struct frame){0});

	if (item) {
		item->sender = sender;
		item->marker = epoch;
	}
	return item;
}

static void output_marker(struct switch_port *port, uint64_t sender, uint64_t epoch)
{
	struct handover *h = &port->handover;

	if (h->output == HANDOVER_REDIRECT && !h->held.head)
		send_forwarded(port, sender);
	else if (h->output != HANDOVER_DELIVER)
		hold_item(port, marker_item(sender, epoch));
}

static void drain_tick(void *context)
{
	struct switch_port *port = context;
	struct handover *h = &port->handover;
	size_t sent = 0;

	while (sent < DRAIN_BYTES && h->held.head) {
		struct frame_item *item = frame_queue_pop(&h->held);

		if (item->marker)
			send_forwarded(port, item->sender);
		else
			send_redirected(port, item->sender, item->redirected, &item->frame);
		sent += sizeof(*item) + item->frame.length;
		free(item);
	}
	if (h->held.head)
		loop_timer_set(port->sw->loop, &h->drain, loop_now() + DRAIN_TICK);
	switch_flush(port->sw);
}

void handover_hold(struct switch_port *port)
{
	struct handover *h = &port->handover;

	if (h->output != HANDOVER_DELIVER)
		return;
	h->output = HANDOVER_HOLD;
	/* What waits for room in the guest's queue has not reached it either, and came before all that is held. */
	h->held_frames += port->backlog.frames;
	frame_queue_prepend(&h->held, &port->backlog);
}

void handover_unhold(struct switch_port *port)
{
	struct handover *h = &port->handover;
	struct frame_item *item;

	h->output = HANDOVER_DELIVER;
	port->generous = true;
	while ((item = frame_queue_pop(&h->held))) {
		if (!item->marker)
			port_deliver(port, &item->frame);
		free(item);
	}
}

void handover_redirect(struct switch_port *port, uint32_t peer, uint64_t epoch)
{
	struct handover *h = &port->handover;

	handover_hold(port);
	h->output = HANDOVER_REDIRECT;
	h->to = peer;
	h->to_epoch = epoch;
	h->redirect_ns = loop_now();
	loop_timer_set(port->sw->loop, &h->drain, h->redirect_ns);
}

/* ---- first stage: what comes to the new place ---- */

static struct handover_sender *sender_of(struct handover *h, uint64_t identity)
{
	for (size_t i = 0; i < h->sender_count; i++)
		if (h->senders[i].identity == identity)
			return &h->senders[i];
	if (h->sender_count == HANDOVER_SENDERS)
		return NULL;
	h->senders[h->sender_count] = (struct handover_sender){.identity = identity};
	return &h->senders[h->sender_count++];
}

static uint64_t rtt_ns(struct switch_state *sw, uint64_t identity)
{
	if (identity == sw->identity)
		return 0;
	for (uint32_t i = 0; i < TUNNEL_PEERS; i++) {
		const struct tunnel_peer *peer = tunnel_find(sw->tunnel, i);

		if (peer && peer->identity == identity)
			return (peer->rtt_us ? peer->rtt_us : RTT_UNKNOWN_US) * 1000;
	}
	return RTT_UNKNOWN_US * UINT64_C(1000);
}

/* When to stop waiting for this sender's other marker; UINT64_MAX = it is not waited for. */
static uint64_t sender_deadline(struct switch_port *port, const struct handover_sender *sender)
{
	struct handover *h = &port->handover;
	const struct tunnel_peer *from = tunnel_find(port->sw->tunnel, h->from);
	uint64_t wait, begin = sender->since_ns;

	if (sender->new_path == sender->old_path)
		return UINT64_MAX;
	wait = 2 * (rtt_ns(port->sw, sender->identity) + rtt_ns(port->sw, from ? from->identity : 0));
	if (wait < PATIENCE_MIN)
		wait = PATIENCE_MIN;
	/* While redirected frames arrive the marker is still behind them. */
	if (!sender->old_path && h->redirected_ns > begin)
		begin = h->redirected_ns;
	if (begin + wait > sender->since_ns + PATIENCE_MAX)
		return sender->since_ns + PATIENCE_MAX;
	return begin + wait;
}

static void arm_patience(struct switch_port *port)
{
	struct handover *h = &port->handover;
	uint64_t next = h->announced_ns ? h->announced_ns + HANDOVER_SETTLE : UINT64_MAX;

	for (size_t i = 0; i < h->sender_count; i++) {
		uint64_t deadline = sender_deadline(port, &h->senders[i]);

		if (deadline < next)
			next = deadline;
	}
	if (next != UINT64_MAX)
		loop_timer_set(port->sw->loop, &h->patience, next);
}

static void release_waiting(struct switch_port *port, struct handover_sender *sender)
{
	struct handover *h = &port->handover;
	struct frame_item *item;

	while ((item = frame_queue_pop(&sender->waiting))) {
		h->waiting_bytes -= item->frame.length;
		if (item->marker)
			output_marker(port, item->sender, item->marker);
		else
			output(port, item->sender, false, &item->frame);
		free(item);
	}
}

static void saw_new_path(struct switch_port *port, struct handover_sender *sender)
{
	if (sender->new_path)
		return;
	sender->new_path = true;
	if (!sender->since_ns)
		sender->since_ns = loop_now();
	arm_patience(port);
}

static void saw_old_path(struct switch_port *port, struct handover_sender *sender)
{
	if (sender->old_path)
		return;
	sender->old_path = true;
	if (!sender->since_ns)
		sender->since_ns = loop_now();
	release_waiting(port, sender);
	arm_patience(port);
}

static void patience_tick(void *context)
{
	struct switch_port *port = context;
	struct handover *h = &port->handover;
	uint64_t now = loop_now();

	for (size_t i = 0; i < h->sender_count; i++) {
		struct handover_sender *sender = &h->senders[i];

		if (sender_deadline(port, sender) > now)
			continue;
		h->markers_missing++;
		saw_new_path(port, sender);
		saw_old_path(port, sender);
	}
	if (h->announced_ns && now >= h->announced_ns + HANDOVER_SETTLE) {
		for (size_t i = 0; i < h->sender_count; i++)
			release_waiting(port, &h->senders[i]);
		expecting_end(h);
	} else {
		arm_patience(port);
	}
	switch_flush(port->sw);
}

static void wait_item(struct switch_port *port, struct handover_sender *sender, struct frame_item *item)
{
	struct handover *h = &port->handover;

	if (item && h->held.bytes + h->waiting_bytes + item->frame.length > HANDOVER_BOUND) {
		free(item);
		item = NULL;
	}
	if (!item) {
		h->lost_held++;
		return;
	}
	item->sender = sender->identity;
	h->waiting_bytes += item->frame.length;
	frame_queue_push(&sender->waiting, item);
}

void handover_input(struct switch_port *port, uint64_t identity, struct frame *frame)
{
	struct handover *h = &port->handover;
	struct handover_sender *sender = h->expecting ? sender_of(h, identity) : NULL;

	if (!sender) {
		/* Before `expect` the guest's old place receives everything. */
		if (port->state != PORT_INCOMING)
			output(port, identity, false, frame);
		return;
	}
	if (!sender->new_path) {
		if (frame->meta.flags & META_FLOODED)
			return;             /* it went to the old place too, and comes from there */
		saw_new_path(port, sender); /* only who knows the new place sends here: the marker was lost */
	}
	if (sender->old_path)
		output(port, identity, false, frame);
	else
		wait_item(port, sender, frame_item_new(frame));
}

void handover_redirected(struct switch_port *port, struct frame *frame)
{
	port->handover.redirected_ns = loop_now();
	port->handover.received++;
	output(port, 0, true, frame);
}

void handover_old_path(struct switch_port *port, uint64_t identity, uint64_t epoch)
{
	struct handover *h = &port->handover;
	struct handover_sender *sender = h->expecting ? sender_of(h, identity) : NULL;

	if (sender && !sender->old_path)
		wait_item(port, sender, marker_item(identity, epoch));
	else
		output_marker(port, identity, epoch);
}

void handover_new_path(struct switch_port *port, uint64_t identity)
{
	struct handover_sender *sender = port->handover.expecting ? sender_of(&port->handover, identity) : NULL;

	if (sender)
		saw_new_path(port, sender);
}

void handover_forwarded(struct switch_port *port, uint64_t identity)
{
	struct handover_sender *sender = port->handover.expecting ? sender_of(&port->handover, identity) : NULL;

	port->handover.redirected_ns = loop_now();
	if (sender)
		saw_old_path(port, sender);
}

bool handover_expect(struct switch_port *port, uint32_t from)
{
	struct handover *h = &port->handover;

	if (!h->senders)
		h->senders = calloc(HANDOVER_SENDERS, sizeof(*h->senders));
	if (!h->senders)
		return false;
	h->expecting = true;
	h->from = from;
	return true;
}

void handover_announced(struct switch_port *port)
{
	struct handover *h = &port->handover;

	if (!h->expecting || h->announced_ns)
		return;
	h->announced_ns = loop_now();
	arm_patience(port);
}
