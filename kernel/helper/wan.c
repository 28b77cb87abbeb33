/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Role `wan`: the Internet between the peers of one machine (wan.h), told on its control socket what it is like. Sites
 * are made by being named.
 */
#include "wan.h"

#include "control.h"
#include "log.h"
#include "options.h"
#include "role.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>

struct role_state {
	struct loop *loop;
	struct control *control;
	struct loop_timer ending;
	struct wan wan;
};

static int find_site(const struct wan *wan, const char *name)
{
	for (unsigned i = 0; i < wan->site_count; i++)
		if (strcmp(wan->sites[i].name, name) == 0)
			return (int)i;
	return -1;
}

/* The number of the site that an argument names; a new one is made. False after an answer. */
static bool site_argument(struct wan *wan, struct control_request *request, const struct control_args *args,
	const char *key, unsigned *site)
{
	const char *name;
	int found;

	if (!control_str(args, key, WAN_NAME_MAX, &name))
		return false;
	found = find_site(wan, name);
	if (found < 0) {
		if (wan->site_count == WAN_MAX_SITES) {
			control_error(request, CONTROL_LIMIT, "there are %d sites already", WAN_MAX_SITES);
			return false;
		}
		found = (int)wan->site_count++;
		strncpy(wan->sites[found].name, name, WAN_NAME_MAX);
	}
	*site = (unsigned)found;
	return true;
}

static void op_attach(void *context, struct control_request *request, const struct control_args *args)
{
	struct role_state *state = context;
	const char *interface;
	unsigned site;

	if (!control_str(args, "interface", IF_NAMESIZE - 1, &interface))
		return;
	if (wan_find_port(&state->wan, interface)) {
		control_error(request, CONTROL_EXISTS, "interface %s is attached already", interface);
		return;
	}
	if (!site_argument(&state->wan, request, args, "site", &site))
		return;
	if (wan_attach(&state->wan, site, interface)) {
		control_ok(request);
		return;
	}
	control_error(request,
		errno == ENODEV   ? CONTROL_NOT_FOUND
		: errno == ENOSPC ? CONTROL_LIMIT
				  : CONTROL_IO,
		"cannot attach interface %s: %s", interface, strerror(errno));
}

static void op_detach(void *context, struct control_request *request, const struct control_args *args)
{
	struct role_state *state = context;
	const char *interface;
	struct wan_port *port;

	if (!control_str(args, "interface", IF_NAMESIZE - 1, &interface))
		return;
	port = wan_find_port(&state->wan, interface);
	if (!port) {
		control_error(request, CONTROL_NOT_FOUND, "interface %s is not attached", interface);
		return;
	}
	wan_detach(port);
	control_ok(request);
}

static bool config_arguments(const struct control_args *args, uint64_t *rtt_us, struct impair_config *config)
{
	uint64_t loss = 0, reorder = 0, duplicate = 0;

	if (!control_u64_optional(args, "rtt_us", 0, 2 * IMPAIR_DELAY_MAX_US, rtt_us) ||
		!control_u64_optional(args, "jitter_us", 0, IMPAIR_DELAY_MAX_US, &config->jitter_us) ||
		!control_u64_optional(args, "loss_ppm", 0, 1000000, &loss) ||
		!control_u64_optional(args, "reorder_ppm", 0, 1000000, &reorder) ||
		!control_u64_optional(args, "duplicate_ppm", 0, 1000000, &duplicate) ||
		!control_u64_optional(args, "rate", 0, UINT64_C(1) << 40, &config->rate) ||
		!control_u64_optional(args, "limit_bytes", 0, IMPAIR_QUEUE_MAX, &config->limit_bytes))
		return false;
	config->loss_ppm = (uint32_t)loss;
	config->reorder_ppm = (uint32_t)reorder;
	config->duplicate_ppm = (uint32_t)duplicate;
	/* 100 ms worth of the rate, but room for a few segments that were never cut into packets. */
	if (config->rate && !config->limit_bytes)
		config->limit_bytes = config->rate / 10 > (256 << 10) ? config->rate / 10 : 256 << 10;
	if (config->limit_bytes > IMPAIR_QUEUE_MAX)
		config->limit_bytes = IMPAIR_QUEUE_MAX;
	return true;
}

/* Both lanes between two different sites. False after an answer. */
static bool lane_arguments(struct role_state *state, struct control_request *request, const struct control_args *args,
	struct wan_lane *lanes[2])
{
	unsigned a, b;

	if (!site_argument(&state->wan, request, args, "a", &a) || !site_argument(&state->wan, request, args, "b", &b))
		return false;
	if (a == b) {
		control_error(request, CONTROL_BAD_ARGUMENT, "a path is between two different sites");
		return false;
	}
	lanes[0] = wan_lane(&state->wan, a, b);
	lanes[1] = wan_lane(&state->wan, b, a);
	if (lanes[0] && lanes[1])
		return true;
	control_error(request, CONTROL_INTERNAL, "out of memory");
	return false;
}

static void op_path(void *context, struct control_request *request, const struct control_args *args)
{
	struct impair_config config = {0};
	struct wan_lane *lanes[2];
	uint64_t rtt_us = 0;

	if (!config_arguments(args, &rtt_us, &config) || !lane_arguments(context, request, args, lanes))
		return;
	config.delay_us = rtt_us / 2;
	impair_set(&lanes[0]->impair, &config);
	config.delay_us = rtt_us - rtt_us / 2;
	impair_set(&lanes[1]->impair, &config);
	control_ok(request);
}

static void op_cut(void *context, struct control_request *request, const struct control_args *args)
{
	struct wan_lane *lanes[2];

	if (!lane_arguments(context, request, args, lanes))
		return;
	lanes[0]->cut = lanes[1]->cut = true;
	control_ok(request);
}

static void op_heal(void *context, struct control_request *request, const struct control_args *args)
{
	struct role_state *state = context;
	struct wan_lane *lanes[2];

	if (control_has(args, "a") || control_has(args, "b")) {
		if (!lane_arguments(state, request, args, lanes))
			return;
		lanes[0]->cut = lanes[1]->cut = false;
	} else {
		for (unsigned a = 0; a < state->wan.site_count; a++)
			for (unsigned b = 0; b < state->wan.site_count; b++)
				if (state->wan.lanes[a][b])
					state->wan.lanes[a][b]->cut = false;
	}
	control_ok(request);
}

static void op_site(void *context, struct control_request *request, const struct control_args *args)
{
	struct role_state *state = context;
	const msgpack_object_array *list;
	unsigned site, block = 0;

	if (!control_list(args, "block", 3, &list))
		return;
	for (size_t i = 0; i < list->size; i++) {
		const char *name;

		if (!control_list_str(args, "block", list, i, 8, &name))
			return;
		if (strcmp(name, "tcp") == 0) {
			block |= BLOCK_TCP;
		} else if (strcmp(name, "udp") == 0) {
			block |= BLOCK_UDP;
		} else if (strcmp(name, "icmp") == 0) {
			block |= BLOCK_ICMP;
		} else {
			control_error(request, CONTROL_BAD_ARGUMENT, "block: %s is none of tcp, udp, icmp", name);
			return;
		}
	}
	if (!site_argument(&state->wan, request, args, "site", &site))
		return;
	state->wan.sites[site].block = block;
	control_ok(request);
}

static void pack_pair(msgpack_packer *p, const char *key, uint64_t value)
{
	pack_str(p, key);
	msgpack_pack_uint64(p, value);
}

static void pack_lane(msgpack_packer *p, const struct wan *wan, const struct wan_lane *lane)
{
	msgpack_pack_map(p, 12);
	pack_str(p, "a");
	pack_str(p, wan->sites[lane->from].name);
	pack_str(p, "b");
	pack_str(p, wan->sites[lane->to].name);
	pack_str(p, "cut");
	(lane->cut ? msgpack_pack_true : msgpack_pack_false)(p);
	pack_pair(p, "frames", lane->frames);
	pack_pair(p, "bytes", lane->bytes);
	pack_pair(p, "waiting", lane->impair.count);
	pack_pair(p, "lost", lane->impair.lost);
	pack_pair(p, "over_rate", lane->impair.over_rate);
	pack_pair(p, "over_limit", lane->impair.over_limit);
	pack_pair(p, "reordered", lane->impair.reordered);
	pack_pair(p, "duplicated", lane->impair.duplicated);
	pack_pair(p, "cut_frames", lane->cut_frames);
}

static void pack_port(msgpack_packer *p, const struct wan *wan, const struct wan_port *port)
{
	msgpack_pack_map(p, 8);
	pack_str(p, "site");
	pack_str(p, wan->sites[port->site].name);
	pack_str(p, "interface");
	pack_str(p, port->interface);
	pack_pair(p, "rx_frames", port->rx_frames);
	pack_pair(p, "rx_bytes", port->rx_bytes);
	pack_pair(p, "tx_frames", port->tx_frames);
	pack_pair(p, "tx_bytes", port->tx_bytes);
	pack_pair(p, "tx_dropped", port->tx_dropped);
	pack_pair(p, "blocked", port->blocked);
}

/* Of one site, since all of them might not fit into a message. */
static void op_counters(void *context, struct control_request *request, const struct control_args *args)
{
	struct wan *wan = &((struct role_state *)context)->wan;
	struct control_message *reply;
	const char *name;
	unsigned ports = 0, lanes = 0;
	msgpack_packer *p;
	int site;

	if (!control_str(args, "site", WAN_NAME_MAX, &name))
		return;
	site = find_site(wan, name);
	if (site < 0) {
		control_error(request, CONTROL_NOT_FOUND, "there is no site %s", name);
		return;
	}
	for (unsigned i = 0; i < WAN_MAX_PORTS; i++)
		ports += wan->ports[i].id && wan->ports[i].site == (unsigned)site;
	for (unsigned b = 0; b < wan->site_count; b++)
		lanes += wan->lanes[site][b] != NULL;
	reply = control_reply(request);
	p = control_put(reply, "ports");
	msgpack_pack_array(p, ports);
	for (unsigned i = 0; i < WAN_MAX_PORTS; i++)
		if (wan->ports[i].id && wan->ports[i].site == (unsigned)site)
			pack_port(p, wan, &wan->ports[i]);
	p = control_put(reply, "lanes");
	msgpack_pack_array(p, lanes);
	for (unsigned b = 0; b < wan->site_count; b++)
		if (wan->lanes[site][b])
			pack_lane(p, wan, wan->lanes[site][b]);
	control_send(reply);
}

static void op_status(void *context, struct control_request *request, const struct control_args *args)
{
	struct wan *wan = &((struct role_state *)context)->wan;
	struct control_message *reply = control_reply(request);
	msgpack_packer *p = control_put(reply, "sites");

	(void)args;
	msgpack_pack_array(p, wan->site_count);
	for (unsigned i = 0; i < wan->site_count; i++)
		pack_str(p, wan->sites[i].name);
	control_put_u64(reply, "seed", wan->seed);
	control_send(reply);
}

static const struct control_op ops[] = {
	{"attach", op_attach, "site interface"},
	{"detach", op_detach, "interface"},
	{"path", op_path, "a b rtt_us rate loss_ppm jitter_us reorder_ppm duplicate_ppm limit_bytes"},
	{"site", op_site, "site block"},
	{"cut", op_cut, "a b"},
	{"heal", op_heal, "a b"},
	{"counters", op_counters, "site"},
	{"status", op_status, ""},
	{0},
};

static void end(void *context)
{
	struct role_state *state = context;

	loop_stop(state->loop, 0);
}

/* The network is of no use without its controller, and ends with it; a newer one may take its place at once. */
static void connection(void *context, bool connected)
{
	struct role_state *state = context;

	if (connected)
		loop_timer_cancel(state->loop, &state->ending);
	else
		loop_timer_set(state->loop, &state->ending, loop_now() + LOOP_SECOND);
}

static void ended(void *context, const struct signalfd_siginfo *info)
{
	(void)info;
	end(context);
}

static int serve(struct role_state *state, const char *control)
{
	int status = 1;

	state->ending = (struct loop_timer){.run = end, .context = state};
	loop_signal(state->loop, SIGTERM, ended, state);
	loop_signal(state->loop, SIGINT, ended, state);
	state->control = control_new(&(struct control_config){.loop = state->loop,
		.path = control,
		.role = "wan",
		.ops = ops,
		.context = state,
		.connection = connection});
	if (state->control)
		status = loop_run(state->loop);
	control_free(state->control);
	return status;
}

static int run(int argc, char **argv)
{
	struct role_state *state;
	const char *control = NULL;
	uint64_t seed = 0;
	const struct option_spec specs[] = {
		{"control", OPTION_STRING, &control, "PATH", "the control socket", true},
		{"seed", OPTION_NUMBER, &seed, "NUMBER",
			"of the random losses and delays; without: a new one each time", false},
		{0},
	};
	int status =
		options_parse("wan", "delay, pace, lose and cut what sites send to one another", argc, argv, specs);

	if (status >= 0)
		return status;
	log_open("wan");
	/* Timers would be up to 50 us late otherwise, to save power. */
	prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
	if (!seed && getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
		seed = loop_now();
	status = 1;
	state = calloc(1, sizeof(*state));
	if (state)
		state->loop = loop_new();
	if (state && state->loop && wan_init(&state->wan, state->loop, seed))
		status = serve(state, control);
	else
		log_error("cannot start: %s", strerror(errno));
	if (state && state->loop) {
		wan_free(&state->wan);
		loop_free(state->loop);
	}
	free(state);
	return status;
}

const struct role role_wan = {"wan", "the Internet between the sites of one machine", run};
