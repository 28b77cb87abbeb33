/* SPDX-License-Identifier: Apache-2.0 */
#include "guest_console.h"

#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool open_log(struct guest_console *console)
{
	struct stat status;

	console->log_fd = open(console->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (console->log_fd < 0 || fstat(console->log_fd, &status) < 0) {
		log_error("console log %s: %s", console->path, strerror(errno));
		return false;
	}
	console->log_size = (uint64_t)status.st_size;
	return true;
}

static void rotate_log(struct guest_console *console)
{
	char older[PATH_MAX];

	snprintf(older, sizeof(older), "%s.1", console->path);
	if (rename(console->path, older) < 0) {
		log_warning("console log %s: %s", console->path, strerror(errno));
		console->log_size = ftruncate(console->log_fd, 0) == 0 ? 0 : console->log_size;
		return;
	}
	close(console->log_fd);
	open_log(console);
}

/* A log that cannot be written is reported once and costs nothing but itself. */
static void write_log(struct guest_console *console, const char *data, size_t size)
{
	if (console->log_fd < 0)
		return;
	if (console->log_size + size > CONSOLE_LOG_MAX)
		rotate_log(console);
	if (console->log_fd < 0)
		return;
	if (write(console->log_fd, data, size) == (ssize_t)size) {
		console->log_size += size;
	} else if (!console->log_failed) {
		log_warning("console log %s: %s", console->path, strerror(errno));
		console->log_failed = true;
	}
}

static void remember_line(struct guest_console *console, const char *data, size_t size)
{
	for (size_t i = 0; i < size; i++) {
		if (data[i] == '\n' || data[i] == '\r') {
			console->line[console->line_size] = 0;
			if (console->line_size)
				memcpy(console->last, console->line, sizeof(console->last));
			console->line_size = 0;
		} else if (console->line_size < CONSOLE_LINE_MAX) {
			console->line[console->line_size++] = data[i] < ' ' || data[i] > '~' ? '?' : data[i];
		}
	}
}

static void tap(void *context, const char *data, size_t size)
{
	write_log(context, data, size);
	remember_line(context, data, size);
}

bool console_open(struct guest_console *console, struct loop *loop, const char *path)
{
	console->path = path;
	console->log_fd = -1;
	if (path && !open_log(console))
		return false;
	console->stream.tap = tap;
	console->stream.context = console;
	if (stream_open(&console->stream, loop))
		return true;
	log_error("no stream for the console: %s", strerror(errno));
	return false;
}
