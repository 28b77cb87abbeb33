/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a guest's kernel reports to its shim. Input: [what 1 | length 2 | report] …: `what` 0 sends the report as it is,
 * 1 as an answer to what was asked last, 2 asks for a freeze before, 3 for a thaw, where that may be asked.
 */
#include "../control_internal.h"
#include "../guest.h"
#include "../log.h"
#include "fuzz.h"

#include <sys/epoll.h>
#include <sys/socket.h>

static struct control control = {.connection_fd = -1};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	setenv("MOBI_LOG", "error", 1);
	log_open("fuzz");
	return 0;
}

static void ask(struct guest *guest, unsigned what)
{
	if (guest->pending != PENDING_NONE)
		return;
	if (what == 2 && guest->state == GUEST_RUNNING)
		guest_freeze(guest, (struct control_ticket){1, 1}, LOOP_SECOND);
	if (what == 3 && guest->state == GUEST_FROZEN)
		guest_thaw(guest, (struct control_ticket){1, 1});
}

static void report_next(struct guest *guest, int kernel, struct input *input)
{
	unsigned what = input_number(input, 1) & 3;
	struct freeze_request request;
	size_t size;
	uint8_t *report = input_piece(input, &size);

	ask(guest, what);
	if (what && size >= 8)
		memcpy(report + offsetof(struct freeze_report, sequence), &guest->sequence, sizeof(guest->sequence));
	send(kernel, report, size, MSG_DONTWAIT | MSG_NOSIGNAL);
	guest_report_ready(guest, guest->report_fd, EPOLLIN);
	while (recv(kernel, &request, sizeof(request), MSG_DONTWAIT) > 0)
		;
	free(report);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	int pair[2];
	struct input input = {data, size};
	struct guest guest = {.control = &control, .lease.timer_fd = -1};

	check(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
	guest.loop = loop_new();
	guest.report_fd = pair[0];
	while (input.left)
		report_next(&guest, pair[1], &input);
	check(memchr(guest.exit_message, 0, sizeof(guest.exit_message)));
	loop_free(guest.loop);
	close(pair[0]);
	close(pair[1]);
	return 0;
}
