/* SPDX-License-Identifier: Apache-2.0 */
/* The role `switch`: start, networks, end. The whole is sketched in switch.h. */
#include "switch.h"

#include "log.h"
#include "options.h"
#include "role.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

struct switch_network *switch_network_find(struct switch_state *sw, uint32_t id)
{
	struct switch_network *network = sw->networks[id % SWITCH_NETWORK_BUCKETS];

	while (network && network->id != id)
		network = network->next;
	return network;
}

bool switch_network_has(const struct switch_network *network, uint32_t peer)
{
	for (size_t i = 0; i < network->peer_count; i++)
		if (network->peers[i] == peer)
			return true;
	return false;
}

void switch_flush(struct switch_state *sw)
{
	while (sw->dirty) {
		struct switch_port *port = sw->dirty;

		sw->dirty = port->next_dirty;
		port_publish(port);
	}
	tunnel_flush(sw->tunnel);
}

static void ended(void *context, const struct signalfd_siginfo *info)
{
	struct switch_state *sw = context;

	(void)info;
	loop_stop(sw->loop, 0);
}

static void switch_free(struct switch_state *sw)
{
	control_free(sw->control);
	for (size_t i = 0; i < SWITCH_PORTS; i++)
		if (sw->ports[i])
			port_free(sw->ports[i]);
	for (size_t i = 0; i < SWITCH_NETWORK_BUCKETS; i++)
		while (sw->networks[i]) {
			struct switch_network *network = sw->networks[i];

			sw->networks[i] = network->next;
			free(network);
		}
	table_free(&sw->table);
	tunnel_free(sw->tunnel);
	loop_free(sw->loop);
	free(sw);
}

static int serve(struct switch_state *sw, const char *control)
{
	sw->loop = loop_new();
	sw->tunnel = sw->loop ? tunnel_new(sw->loop, forward_from_peer, sw) : NULL;
	if (!sw->tunnel || loop_signal(sw->loop, SIGTERM, ended, sw) || loop_signal(sw->loop, SIGINT, ended, sw)) {
		log_error("cannot start: %s", strerror(errno));
		return 1;
	}
	sw->control = control_new(&(struct control_config){
		.loop = sw->loop, .path = control, .role = "switch", .ops = switch_ops, .context = sw});
	if (!sw->control)
		return 1;
	log_info("frames are sealed by %s", aead_implementation());
	return loop_run(sw->loop);
}

static int run(int argc, char **argv)
{
	const char *control = NULL;
	const struct option_spec specs[] = {
		{"control", OPTION_STRING, &control, "PATH", "control socket to serve", .required = true},
		{0},
	};
	int status = options_parse("switch", "carry frames between guests and to other hosts", argc, argv, specs);
	struct switch_state *sw;

	if (status >= 0)
		return status;
	log_open("switch");
	sw = calloc(1, sizeof(*sw));
	if (!sw) {
		log_error("no memory");
		return 1;
	}
	status = serve(sw, control);
	switch_free(sw);
	return status;
}

const struct role role_switch = {"switch", "carry frames between guests and to other hosts", run};
