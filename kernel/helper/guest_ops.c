/* SPDX-License-Identifier: Apache-2.0 */
/* What a controller may ask of the shim: each operation checks that it may be done now, then hands it on. */
#include "guest.h"

#include "log.h"
#include "sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FREEZE_TIMEOUT_MAX_MS 60000
#define RECONNECT_FREEZE_TIMEOUT (5 * LOOP_SECOND)
#define PATH_LENGTH_MAX 107

void guest_put_exit(struct guest *guest, struct control_message *message)
{
	msgpack_packer *packer = control_put(message, "exit");

	if (guest->state != GUEST_EXITED) {
		msgpack_pack_nil(packer);
		return;
	}
	msgpack_pack_map(packer, 3);
	pack_str(packer, "reason");
	pack_str(packer, guest_reason_name(guest->reason));
	pack_str(packer, "code");
	msgpack_pack_int(packer, guest->exit_code);
	pack_str(packer, "message");
	pack_str(packer, guest->exit_message);
}

static uint64_t memory_size(const struct guest *guest)
{
	struct stat status;

	return fstat(guest->memory_fd, &status) == 0 ? (uint64_t)status.st_size : 0;
}

static void put_sandbox(struct guest *guest, struct control_message *reply)
{
	msgpack_packer *packer = control_put(reply, "sandbox");
	unsigned int layers = guest->process.layers;

	msgpack_pack_array(packer, (size_t)__builtin_popcount(layers));
	for (unsigned int bit = 0; bit < SANDBOX_LAYERS; bit++)
		if (layers & 1u << bit)
			pack_str(packer, sandbox_layer_name(bit));
}

static void op_status(void *context, struct control_request *request, const struct control_args *args)
{
	struct guest *guest = context;
	struct control_message *reply = control_reply(request);

	(void)args;
	/* Who asks may be another than who let it go, and must not take it for one that will never run. */
	control_put_str(reply, "state", guest_state_name(guest->pending == PENDING_GO ? GUEST_RUNNING : guest->state));
	control_put_u64(reply, "pid", (uint64_t)guest->process.pid);
	control_put_u64(reply, "memory", memory_size(guest));
	control_put_u64(reply, "since_ns", guest->since_ns);
	guest_put_exit(guest, reply);
	control_put_u64(reply, "deadline_ns", guest->lease.deadline_ns);
	control_put_bool(reply, "expired", guest->lease.expired);
	control_put_bool(reply, "stopped", guest->lease.stopped);
	put_sandbox(guest, reply);
	control_put_str(reply, "mode", guest->options.mode);
	control_send(reply);
}

static bool refuse_state(struct guest *guest, struct control_request *request, const char *what)
{
	control_error(request, CONTROL_BAD_STATE, "the guest is %s%s, %s is not possible",
		guest_state_name(guest->state), guest->reconnecting ? " and being reconnected" : "", what);
	return false;
}

/* The state that an operation needs, and nothing else under way. */
static bool require_state(
	struct guest *guest, struct control_request *request, enum guest_state state, const char *what)
{
	if (guest->state != state || guest->reconnecting)
		return refuse_state(guest, request, what);
	if (guest->pending == PENDING_NONE)
		return true;
	control_error(request, CONTROL_BAD_STATE, "the guest's kernel is still busy, %s is not possible", what);
	return false;
}

static bool require_lease(struct guest *guest, struct control_request *request)
{
	if (lease_valid(guest))
		return true;
	control_error(request, CONTROL_BAD_STATE, "the lease has expired, the guest must not run");
	return false;
}

/*
 * The length is the kernel's to choose, at a resume the source's. From then on it is sealed, so that those who map the
 * memory never find it shorter.
 */
static void op_memory(void *context, struct control_request *request, const struct control_args *args)
{
	struct guest *guest = context;
	struct control_message *reply;
	uint64_t size = memory_size(guest);

	if (!control_u64_optional(args, "size", 1, UINT64_C(1) << 46, &size))
		return;
	if (size != memory_size(guest) && ftruncate(guest->memory_fd, (off_t)size) < 0) {
		control_error(request, errno == EPERM ? CONTROL_BAD_STATE : CONTROL_IO,
			"the guest's memory has %llu bytes and keeps them: %s", (unsigned long long)memory_size(guest),
			strerror(errno));
		return;
	}
	if (size && fcntl(guest->memory_fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK) < 0)
		log_warning("the memory's length cannot be sealed: %s", strerror(errno));
	reply = control_reply(request);
	control_put_u64(reply, "size", size);
	control_put_fd(reply, guest->memory_fd);
	control_send(reply);
}

static void op_freeze(void *context, struct control_request *request, const struct control_args *args)
{
	struct guest *guest = context;
	uint64_t timeout_ms;
	bool under_way = guest->pending == PENDING_CANCEL || (guest->pending == PENDING_FREEZE && !guest->ticket.id);

	if (!control_u64(args, "timeout_ms", 1, FREEZE_TIMEOUT_MAX_MS, &timeout_ms))
		return;
	if ((!under_way || guest->reconnecting) && !require_state(guest, request, GUEST_RUNNING, "freeze"))
		return;
	guest_freeze(guest, control_defer(request), timeout_ms * LOOP_MS);
}

static void op_thaw(void *context, struct control_request *request, const struct control_args *args)
{
	struct guest *guest = context;

	(void)args;
	if (require_state(guest, request, GUEST_FROZEN, "thaw") && require_lease(guest, request))
		guest_thaw(guest, control_defer(request));
}

static void op_go(void *context, struct control_request *request, const struct control_args *args)
{
	struct guest *guest = context;

	(void)args;
	if (require_state(guest, request, GUEST_WAITING, "go") && require_lease(guest, request))
		guest_go(guest, control_defer(request));
}

static void op_lease(void *context, struct control_request *request, const struct control_args *args)
{
	uint64_t deadline_ns;

	if (!control_u64(args, "deadline_ns", 0, INT64_MAX, &deadline_ns))
		return;
	lease_set(context, deadline_ns);
	control_ok(request);
}

static void attach(struct guest_stream *stream, struct control_request *request)
{
	int fd = stream_attach(stream);
	struct control_message *reply;

	if (fd < 0) {
		control_error(request, CONTROL_IO, "no socket for the stream: %s", strerror(errno));
		return;
	}
	reply = control_reply(request);
	control_put_fd(reply, fd);
	close(fd);
	control_send(reply);
}

static void op_console(void *context, struct control_request *request, const struct control_args *args)
{
	struct guest *guest = context;

	(void)args;
	attach(&guest->console.stream, request);
}

static void op_agent(void *context, struct control_request *request, const struct control_args *args)
{
	struct guest *guest = context;

	(void)args;
	attach(&guest->agent, request);
}

/* New sockets first: when one of them fails, the guest has not noticed anything. */
static void op_reconnect(void *context, struct control_request *request, const struct control_args *args)
{
	struct guest *guest = context;
	const msgpack_object_array *list;
	const char *sockets[GUEST_DEVICES_MAX];
	char message[GUEST_MESSAGE_MAX];

	if (!control_list(args, "devices", GUEST_DEVICES_MAX, &list))
		return;
	for (uint32_t i = 0; i < list->size; i++)
		if (!control_list_str(args, "devices", list, i, PATH_LENGTH_MAX, &sockets[i]))
			return;
	if (guest->state != GUEST_FROZEN && !require_state(guest, request, GUEST_RUNNING, "reconnect"))
		return;
	if (!require_state(guest, request, guest->state, "reconnect"))
		return;
	if (!guest_connect_devices(guest, sockets, list->size, guest->device_fds, message)) {
		control_error(request, CONTROL_IO, "%s", message);
		return;
	}
	guest->device_count = list->size;
	guest->reconnecting = true;
	guest->reconnect_running = guest->state == GUEST_RUNNING;
	guest->reconnect_ticket = control_defer(request);
	if (guest->reconnect_running)
		guest_freeze(guest, (struct control_ticket){0}, RECONNECT_FREEZE_TIMEOUT);
	else
		guest_reconnect_step(guest);
}

static void op_kill(void *context, struct control_request *request, const struct control_args *args)
{
	struct guest *guest = context;

	(void)args;
	if (guest->state == GUEST_EXITED) {
		control_ok(request);
		return;
	}
	if (guest->kill_ticket.id)
		control_send(control_reply_to(guest->control, guest->kill_ticket));
	guest->kill_ticket = control_defer(request);
	guest_kill(guest);
}

const struct control_op guest_ops[] = {
	{"status", op_status, ""},
	{"memory", op_memory, "size"},
	{"freeze", op_freeze, "timeout_ms"},
	{"thaw", op_thaw, ""},
	{"go", op_go, ""},
	{"lease", op_lease, "deadline_ns"},
	{"console", op_console, ""},
	{"agent", op_agent, ""},
	{"reconnect", op_reconnect, "devices"},
	{"kill", op_kill, ""},
	{0},
};
