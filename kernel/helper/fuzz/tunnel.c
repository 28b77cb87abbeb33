/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packets of other peers. Input: [how 1 | type 1 | network 1 | length 2 | bytes] …: `how` is the peer (bit 0), whether
 * the bytes are a whole datagram as a stranger sends it or what that peer seals (bit 1), and what is done before: guest
 * 1 is held (bit 2) or let go (bit 3), guest 2 is redirected to peer 2 (bit 4), guest 3 runs (bit 5), time passes (bit
 * 6).
 */
#include "../tunnel_receive.c"
#include "net.h"

static struct switch_state *sw;
static struct aead *seal;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	static const uint8_t key[AEAD_KEY];

	(void)argc;
	(void)argv;
	sw = net_open();
	seal = aead_new(key);
	check(seal);
	return 0;
}

static void receive_sealed(struct tunnel_header header, const uint8_t *plain, size_t size)
{
	size_t length = TUNNEL_HEADER + size + AEAD_TAG;
	uint8_t *packet = malloc(length), nonce[AEAD_NONCE];

	check(packet);
	tunnel_header_put(packet, &header);
	tunnel_nonce(nonce, header.counter);
	aead_seal(seal, nonce, packet, TUNNEL_HEADER, plain, size, packet + TUNNEL_HEADER);
	receive_packet(sw->tunnel, packet, length);
	free(packet);
}

static void tick(struct loop_timer *timer)
{
	if (!timer->armed)
		return;
	loop_timer_cancel(sw->loop, timer);
	timer->run(timer->context);
}

static void move(unsigned how)
{
	if (how & 4)
		handover_hold(sw->ports[1]);
	if (how & 8 && sw->ports[1]->handover.output == HANDOVER_HOLD)
		handover_unhold(sw->ports[1]);
	if (how & 16)
		handover_redirect(sw->ports[2], 2, 2);
	if (how & 32)
		move_announce(sw->ports[3]);
	for (size_t i = 1; how & 64 && i <= 3; i++) {
		tick(&sw->ports[i]->handover.drain);
		tick(&sw->ports[i]->handover.patience);
	}
}

static void receive_next(struct input *input, uint64_t counter)
{
	unsigned how = input_number(input, 1);
	struct tunnel_header header = {.type = (uint8_t)input_number(input, 1),
		.network = input_number(input, 1),
		.key_id = 11 + (how & 1),
		.counter = counter};
	size_t size;
	uint8_t *bytes = input_piece(input, &size);

	move(how);
	if (how & 2)
		receive_packet(sw->tunnel, bytes, size);
	else
		receive_sealed(header, bytes, size);
	free(bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};

	net_fill(sw);
	for (uint64_t counter = 1; input.left; counter++)
		receive_next(&input, counter);
	forward_from_peer(sw, NULL, NULL);
	net_empty(sw);
	return 0;
}
