/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Building what goes to the controller. The number of a map's keys stands before them, but is only known at the end:
 * the map gets a fixed three-byte header that is filled in when the message is sent.
 */
#include "control_internal.h"

#include "log.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAP16 0xde
#define MAP16_HEADER 3

void pack_str(msgpack_packer *packer, const char *text)
{
	size_t length = strlen(text);

	msgpack_pack_str(packer, length);
	msgpack_pack_str_body(packer, text, length);
}

static struct control_message *message_new(struct control *control, struct control_ticket ticket)
{
	static const char header[MAP16_HEADER] = {(char)MAP16};
	struct control_message *message = calloc(1, sizeof(*message));

	if (!message) {
		log_error("no memory for an answer");
		abort();
	}
	message->control = control;
	message->ticket = ticket;
	msgpack_sbuffer_init(&message->buffer);
	msgpack_packer_init(&message->packer, &message->buffer, msgpack_sbuffer_write);
	msgpack_sbuffer_write(&message->buffer, header, sizeof(header));
	return message;
}

msgpack_packer *control_put(struct control_message *message, const char *key)
{
	message->keys++;
	pack_str(&message->packer, key);
	return &message->packer;
}

void control_put_u64(struct control_message *message, const char *key, uint64_t value)
{
	msgpack_pack_uint64(control_put(message, key), value);
}

void control_put_bool(struct control_message *message, const char *key, bool value)
{
	msgpack_packer *packer = control_put(message, key);

	if (value)
		msgpack_pack_true(packer);
	else
		msgpack_pack_false(packer);
}

void control_put_nil(struct control_message *message, const char *key)
{
	msgpack_pack_nil(control_put(message, key));
}

void control_put_str(struct control_message *message, const char *key, const char *value)
{
	if (value)
		pack_str(control_put(message, key), value);
	else
		control_put_nil(message, key);
}

void control_put_bytes(struct control_message *message, const char *key, const void *bytes, size_t size)
{
	msgpack_packer *packer = control_put(message, key);

	msgpack_pack_bin(packer, size);
	msgpack_pack_bin_body(packer, bytes, size);
}

void control_put_fd(struct control_message *message, int fd)
{
	int copy = message->fd_count < CONTROL_FDS_MAX ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;

	if (copy < 0)
		message->overflow = true;
	else
		message->fds[message->fd_count++] = copy;
}

static void message_free(struct control_message *message)
{
	for (size_t i = 0; i < message->fd_count; i++)
		close(message->fds[i]);
	msgpack_sbuffer_destroy(&message->buffer);
	free(message);
}

void control_send(struct control_message *message)
{
	struct control *control = message->control;
	struct control_ticket ticket = message->ticket;
	bool too_large = message->overflow || message->buffer.size > CONTROL_MESSAGE_MAX;
	bool wanted = control->connection_fd >= 0 && ticket.connection == control->connection;

	message->buffer.data[1] = (char)(message->keys >> 8);
	message->buffer.data[2] = (char)message->keys;
	if (wanted && !too_large)
		control_transmit(control, message->buffer.data, message->buffer.size, message->fds, message->fd_count);
	message_free(message);
	if (too_large) {
		log_error("a message for the controller is too large or its descriptors could not be duplicated");
		if (ticket.id)
			control_error_to(control, ticket, CONTROL_INTERNAL, "the answer is too large");
	}
}

struct control_message *control_event(struct control *control, const char *event)
{
	struct control_message *message =
		message_new(control, (struct control_ticket){.connection = control->connection});

	control_put_str(message, "event", event);
	return message;
}

struct control_message *control_reply_to(struct control *control, struct control_ticket ticket)
{
	struct control_message *message = message_new(control, ticket);

	control_put_u64(message, "id", ticket.id);
	control_put_bool(message, "ok", true);
	return message;
}

struct control_message *control_reply(struct control_request *request)
{
	request->answered = true;
	return control_reply_to(request->control, request->ticket);
}

void control_ok(struct control_request *request)
{
	control_send(control_reply(request));
}

struct control_ticket control_defer(struct control_request *request)
{
	request->answered = true;
	return request->ticket;
}

static void send_error(
	struct control *control, struct control_ticket ticket, const char *code, const char *format, va_list arguments)
{
	struct control_message *message = message_new(control, ticket);
	char sentence[512];

	vsnprintf(sentence, sizeof(sentence), format, arguments);
	control_put_u64(message, "id", ticket.id);
	control_put_bool(message, "ok", false);
	control_put_str(message, "error", code);
	control_put_str(message, "message", sentence);
	control_send(message);
}

void control_error_to(struct control *control, struct control_ticket ticket, const char *code, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	send_error(control, ticket, code, format, arguments);
	va_end(arguments);
}

void control_error(struct control_request *request, const char *code, const char *format, ...)
{
	va_list arguments;

	request->answered = true;
	va_start(arguments, format);
	send_error(request->control, request->ticket, code, format, arguments);
	va_end(arguments);
}
