/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_CONTROL_H
#define MOBI_CONTROL_H

#include "loop.h"

#include <msgpack.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * The control socket every role serves (kernel/README.md, section 1): SOCK_SEQPACKET, one MessagePack map per datagram,
 * one controller at a time. A role gives a table of operations; `hello` and `quit` are there by themselves.
 *
 *	static void op_bandwidth(void *context, struct control_request *request, const struct control_args *args)
 *	{
 *		struct pages *pages = context;
 *		uint64_t bandwidth;
 *
 *		if (!control_u64(args, "bandwidth", 0, UINT64_MAX, &bandwidth))
 *			return;			(the getter has answered bad-argument)
 *		pages->bandwidth = bandwidth;
 *		control_ok(request);
 *	}
 *
 *	static void op_status(void *context, struct control_request *request, const struct control_args *args)
 *	{
 *		struct control_message *reply = control_reply(request);
 *
 *		control_put_str(reply, "state", "idle");
 *		msgpack_packer *list = control_put(reply, "peers");	(any value, packed by hand)
 *		msgpack_pack_array(list, 0);
 *		control_put_fd(reply, fd);				(duplicated; the role keeps its own)
 *		control_send(reply);
 *	}
 *
 *	static const struct control_op ops[] = {
 *		{"bandwidth", op_bandwidth, "bandwidth"},
 *		{"status", op_status, ""},
 *		{0},
 *	};
 *	struct control *control = control_new(&(struct control_config){
 *		.loop = loop, .path = path, .role = "pages", .ops = ops, .context = &pages});
 *
 * An answer that takes time: `pages->ticket = control_defer(request)` in the handler, later
 * control_reply_to(control, ticket) or control_error_to(…). If the controller is gone by then, the answer is dropped.
 *
 * Nothing here blocks: a controller that does not read its socket is disconnected once CONTROL_QUEUE_MAX messages wait.
 */
#define CONTROL_MESSAGE_MAX 65536
#define CONTROL_FDS_MAX 8
#define CONTROL_QUEUE_MAX 256

struct control;
struct control_request; /* valid while its handler runs */
struct control_message;

/* A map of arguments: the request's own, or one inside of it. */
struct control_args {
	struct control_request *request;
	const msgpack_object_map *map;
	char where[64]; /* "" or "regions[2]." */
};

/* What is left of a request that is answered later. Zero: none. */
struct control_ticket {
	uint64_t connection;
	uint64_t id;
};

struct control_op {
	const char *name; /* NULL ends the table */
	void (*run)(void *context, struct control_request *request, const struct control_args *args);
	const char *keys; /* arguments it takes, separated by one space; any other is refused */
};

struct control_config {
	struct loop *loop;
	const char *path;
	const char *role;
	const struct control_op *ops; /* may have a `hello` or `quit` of its own */
	void *context;
	void (*connection)(void *context, bool connected); /* may be NULL; a replacement is false, then true */
	void (*quit)(void *context);                       /* after `quit` was answered; NULL: loop_stop(loop, 0) */
};

/* Binds the socket (mode 0600, a stale one is replaced, a living one is not). NULL after a line in the log. */
struct control *control_new(const struct control_config *config);
void control_free(struct control *control); /* and unlinks the socket */
bool control_connected(const struct control *control);
void control_disconnect(struct control *control);

/* Error codes of the protocol. */
#define CONTROL_BAD_REQUEST "bad-request"
#define CONTROL_UNKNOWN_OP "unknown-op"
#define CONTROL_BAD_ARGUMENT "bad-argument"
#define CONTROL_BAD_STATE "bad-state"
#define CONTROL_NOT_FOUND "not-found"
#define CONTROL_EXISTS "exists"
#define CONTROL_TIMEOUT "timeout"
#define CONTROL_IO "io"
#define CONTROL_NO_SPACE "no-space"
#define CONTROL_LIMIT "limit"
#define CONTROL_AUTHENTICATION "authentication"
#define CONTROL_MISMATCH "mismatch"
#define CONTROL_INTERNAL "internal"

/*
 * Arguments. A getter returns false after it has answered bad-argument with the name of the argument: the handler just
 * returns. The *_optional forms leave *value alone and return true when the argument is absent or nil. Strings are
 * NUL-terminated (and have none inside); strings and bytes are valid while the handler runs.
 */
bool control_has(const struct control_args *args, const char *key); /* present and not nil */
bool control_u64(const struct control_args *args, const char *key, uint64_t min, uint64_t max, uint64_t *value);
bool control_u64_optional(
	const struct control_args *args, const char *key, uint64_t min, uint64_t max, uint64_t *value);
bool control_bool(const struct control_args *args, const char *key, bool *value);
bool control_bool_optional(const struct control_args *args, const char *key, bool *value);
bool control_str(const struct control_args *args, const char *key, size_t max, const char **value);
/* Index of the string in the NULL-terminated `choices`. */
bool control_choice(const struct control_args *args, const char *key, const char *const *choices, size_t *index);
/* Exactly `size` bytes, copied. */
bool control_bytes(const struct control_args *args, const char *key, void *bytes, size_t size);
bool control_list(const struct control_args *args, const char *key, size_t max, const msgpack_object_array **list);
/* Element `index` of list `key`, as a map that has no other keys than `keys`. */
bool control_list_map(const struct control_args *args, const char *key, const msgpack_object_array *list, size_t index,
	const char *keys, struct control_args *element);
bool control_list_u64(const struct control_args *args, const char *key, const msgpack_object_array *list, size_t index,
	uint64_t min, uint64_t max, uint64_t *value);
bool control_list_str(const struct control_args *args, const char *key, const msgpack_object_array *list, size_t index,
	size_t max, const char **value);

/* Descriptors that came with the request, close-on-exec. Those that are not taken are closed after the handler. */
size_t control_fd_count(const struct control_request *request);
int control_take_fd(struct control_request *request, size_t index); /* -1 if there is none, or taken before */

/* Answers, each request once. A handler that neither answers nor defers is a mistake and answered `internal`. */
void control_ok(struct control_request *request);
void control_error(struct control_request *request, const char *code, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
struct control_message *control_reply(struct control_request *request); /* {"id", "ok": true, …} */

struct control_ticket control_defer(struct control_request *request);
void control_error_to(struct control *control, struct control_ticket ticket, const char *code, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
struct control_message *control_reply_to(struct control *control, struct control_ticket ticket);

struct control_message *control_event(struct control *control, const char *event); /* {"event", …} */

/* Filling a message. None of these fails: what is too large is turned into an `internal` error at control_send. */
void control_put_u64(struct control_message *message, const char *key, uint64_t value);
void control_put_bool(struct control_message *message, const char *key, bool value);
void control_put_str(struct control_message *message, const char *key, const char *value); /* NULL: nil */
void control_put_bytes(struct control_message *message, const char *key, const void *bytes, size_t size);
void control_put_nil(struct control_message *message, const char *key);
msgpack_packer *control_put(struct control_message *message, const char *key); /* pack exactly one value */
void control_put_fd(struct control_message *message, int fd);
void control_send(struct control_message *message); /* and frees it */

/* One string to a packer. */
void pack_str(msgpack_packer *packer, const char *text);

#endif
