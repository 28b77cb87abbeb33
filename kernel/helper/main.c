/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mobi-helper: the C side of a peer. One program, one role per process; which role is the first argument. All of a
 * role's conversation is on its control socket (control.h); this file only finds the role.
 */
#include "role.h"

#include <stdio.h>
#include <string.h>

static const struct role *const roles[] = {
#include "roles.inc"
	NULL,
};

static void usage(FILE *out)
{
	fprintf(out, "usage: mobi-helper ROLE [OPTIONS]   (mobi-helper ROLE --help tells more)\n\nroles:\n");
	for (size_t i = 0; roles[i]; i++)
		fprintf(out, "  %-8s %s\n", roles[i]->name, roles[i]->summary);
}

int main(int argc, char **argv)
{
	if (argc < 2) {
		usage(stderr);
		return 2;
	}
	if (strcmp(argv[1], "--help") == 0) {
		usage(stdout);
		return 0;
	}
	if (strcmp(argv[1], "--version") == 0) {
		printf("mobi-helper %s\n", MOBI_VERSION);
		return 0;
	}
	for (size_t i = 0; roles[i]; i++)
		if (strcmp(argv[1], roles[i]->name) == 0)
			return roles[i]->run(argc - 1, argv + 1);
	fprintf(stderr, "mobi-helper: no role named '%s' (mobi-helper --help lists them)\n", argv[1]);
	return 2;
}
