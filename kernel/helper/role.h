/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_ROLE_H
#define MOBI_ROLE_H

/*
 * A role is one of the jobs of mobi-helper. main() finds it by the first argument and calls run() with the rest
 * (argv[0] is the role's name). run() returns the process's exit status: 0 done, 1 failed, 2 wrong command line.
 */
struct role {
	const char *name;
	const char *summary; /* one line for --help */
	int (*run)(int argc, char **argv);
};

extern const struct role role_guest, role_switch, role_disk, role_pages, role_wan;

#endif
