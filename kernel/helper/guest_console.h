/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_GUEST_CONSOLE_H
#define MOBI_GUEST_CONSOLE_H

#include "guest_stream.h"

/*
 * The guest's console: a stream whose output also goes to a log of bounded size (LOG, and LOG.1 before it), and whose
 * last line is remembered, since it is often the only one that says why a guest ended.
 */
#define CONSOLE_LOG_MAX (8 << 20)
#define CONSOLE_LINE_MAX 120

struct guest_console {
	struct guest_stream stream;
	const char *path; /* NULL: no log */
	int log_fd;
	uint64_t log_size;
	bool log_failed;
	char line[CONSOLE_LINE_MAX + 1]; /* the line under way */
	char last[CONSOLE_LINE_MAX + 1]; /* the last one that was not empty */
	size_t line_size;
};

/* False after a line in the log. */
bool console_open(struct guest_console *console, struct loop *loop, const char *path);

#endif
