/* SPDX-License-Identifier: Apache-2.0 */
/* Frames of guests. Input: [port 1 | pieces 1 | length 2 | virtio header and frame] …. */
#include "net.h"
#include "../switch_port.c"

static struct switch_state *sw;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	sw = net_open();
	return 0;
}

/* The frame in one or two pieces, as a guest's buffers may lie. */
static void send_frame(struct input *input)
{
	struct switch_port *port = sw->ports[1 + input_number(input, 1) % 3];
	size_t cut = input_number(input, 1), size;
	uint8_t *bytes = input_piece(input, &size);

	cut = cut < size ? cut : size;
	struct iovec iov[2] = {{bytes, cut}, {bytes + cut, size - cut}};
	struct virtqueue_chain chain = {.readable = 2, .readable_bytes = size, .iov = iov};

	take_frame(port, &chain, 0);
	free(bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};

	net_fill(sw);
	while (input.left)
		send_frame(&input);
	switch_flush(sw);
	check(sw->ports[2]->counters.tx_frames == 0); /* its lease is over */
	net_empty(sw);
	return 0;
}
