/* SPDX-License-Identifier: Apache-2.0 */
/* Datagrams of the control socket, to operations that read an argument of every type. */
#include "../control.c"
#include "fuzz.h"

static void read_scalars(void *context, struct control_request *request, const struct control_args *args)
{
	static const char *const choices[] = {"one", "two", NULL};
	const char *text;
	uint64_t number;
	uint8_t key[4];
	size_t choice;
	bool flag;

	(void)context;
	if (!control_u64(args, "n", 1, 1000, &number) || !control_u64_optional(args, "o", 0, UINT64_MAX, &number) ||
		!control_bool(args, "b", &flag) || !control_bool_optional(args, "f", &flag) ||
		!control_str(args, "s", 16, &text) || !control_choice(args, "c", choices, &choice) ||
		!control_bytes(args, "k", key, sizeof(key)))
		return;
	check(strlen(text) <= 16 && choice < 2);
	control_ok(request);
}

static void read_lists(void *context, struct control_request *request, const struct control_args *args)
{
	const msgpack_object_array *maps, *numbers, *texts;
	struct control_args element;
	const char *text;
	uint64_t number;

	(void)context;
	if (!control_list(args, "maps", 4, &maps) || !control_list(args, "numbers", 4, &numbers) ||
		!control_list(args, "texts", 4, &texts))
		return;
	for (size_t i = 0; i < maps->size; i++)
		if (!control_list_map(args, "maps", maps, i, "n s", &element) ||
			!control_u64(&element, "n", 0, 9, &number) || !control_str(&element, "s", 9, &text))
			return;
	for (size_t i = 0; i < numbers->size; i++)
		if (!control_list_u64(args, "numbers", numbers, i, 0, 9, &number))
			return;
	for (size_t i = 0; i < texts->size; i++)
		if (!control_list_str(args, "texts", texts, i, 9, &text))
			return;
	struct control_message *reply = control_reply(request);
	control_put_u64(reply, "fds", control_fd_count(request));
	control_put_bytes(reply, "echo", maps, sizeof(*maps));
	control_send(reply);
}

static const struct control_op ops[] = {
	{"scalars", read_scalars, "n o b f s c k"},
	{"lists", read_lists, "maps numbers texts"},
	{0},
};

static void quit(void *context)
{
	(void)context;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct control control = {.connection_fd = -1, .config = {.role = "fuzz", .ops = ops, .quit = quit}};
	struct control_request request = {.control = &control};
	char *datagram = malloc(size + (size == 0));

	check(datagram);
	memcpy(datagram, data, size);
	handle_datagram(&control, &request, datagram, size);
	check(request.answered);
	free(datagram);
	return 0;
}
