/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_OPTIONS_H
#define MOBI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * A role's command line, as a table. Only long options, no positional arguments. A mistake is one line on stderr and
 * exit status 2; --help and --version are there by themselves. Targets keep their value when the option is absent.
 *
 *	struct my_options { const char *socket; uint64_t size; bool read_only; struct option_list devices; } o = {0};
 *	const struct option_spec specs[] = {
 *		{"socket", OPTION_STRING, &o.socket, "PATH", "where to serve", .required = true},
 *		{"size", OPTION_SIZE, &o.size, "SIZE", "of the disk, such as 64M"},
 *		{"read-only", OPTION_FLAG, &o.read_only, NULL, "refuse writes"},
 *		{"device", OPTION_LIST, &o.devices, "KIND:SOCKET", "may be given again"},
 *		{0},
 *	};
 *	int status = options_parse("disk", "serve a disk", argc, argv, specs);
 *	if (status >= 0)
 *		return status;
 *	if (!o.size)
 *		return options_error("disk", "--size must not be 0");
 */
#define OPTION_LIST_MAX 64

struct option_list {
	const char *items[OPTION_LIST_MAX];
	size_t count;
};

enum option_kind {
	OPTION_FLAG,   /* bool */
	OPTION_STRING, /* const char *, not empty, points into argv */
	OPTION_SIZE,   /* uint64_t, bytes; units K M G T are powers of 1024 */
	OPTION_NUMBER, /* uint64_t, decimal */
	OPTION_LIST,   /* struct option_list, of strings */
};

struct option_spec {
	const char *name; /* NULL ends the table */
	enum option_kind kind;
	void *target;
	const char *value; /* how --help names the value */
	const char *help;
	bool required;
};

/* Returns -1 to go on, else the exit status the role's run() returns at once. */
int options_parse(const char *role, const char *summary, int argc, char **argv, const struct option_spec *specs);

/* Prints the line and returns 2, for mistakes only the role can see. */
int options_error(const char *role, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
