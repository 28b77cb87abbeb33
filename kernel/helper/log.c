/* SPDX-License-Identifier: Apache-2.0 */
#include "log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LEVEL_DEBUG, LEVEL_INFO, LEVEL_WARNING, LEVEL_ERROR, LEVELS };

#define LINE_SIZE 1024
#define FILE_MAX (1 << 20)

static const char *const level_names[LEVELS] = {"debug", "info", "warning", "error"};
static const char *role_name = "helper";
static int lowest_level = LEVEL_INFO;

void log_open(const char *role)
{
	const char *wanted = getenv("MOBI_LOG");

	role_name = role;
	for (int level = 0; wanted && level < LEVELS; level++)
		if (strcmp(wanted, level_names[level]) == 0)
			lowest_level = level;
}

/* A log file begins anew when it is full: whoever started this process may be gone and cannot rotate it. */
static void bound_file(void)
{
	static const char note[] = "info helper: the log was full, what was before is gone\n";
	struct stat status;

	if (fstat(STDERR_FILENO, &status) < 0 || !S_ISREG(status.st_mode) || status.st_size < FILE_MAX)
		return;
	if (ftruncate(STDERR_FILENO, 0) == 0)
		(void)!write(STDERR_FILENO, note, sizeof(note) - 1);
}

static void write_line(int level, const char *format, va_list arguments)
{
	char line[LINE_SIZE];
	int saved_errno = errno;
	int head, length;

	if (level < lowest_level)
		return;
	head = snprintf(line, sizeof(line), "%s %s: ", level_names[level], role_name);
	length = head + vsnprintf(line + head, sizeof(line) - (size_t)head, format, arguments);
	if (length > LINE_SIZE - 2)
		length = LINE_SIZE - 2;
	for (int i = head; i < length; i++)
		if ((unsigned char)line[i] < ' ' || line[i] == 0x7f)
			line[i] = '?';
	line[length] = '\n';
	bound_file();
	/* A lost diagnostic is no reason to end a guest. */
	(void)!write(STDERR_FILENO, line, (size_t)length + 1);
	errno = saved_errno;
}

#define DEFINE_LOG(function, level)                                                                                    \
	void function(const char *format, ...)                                                                         \
	{                                                                                                              \
		va_list arguments;                                                                                     \
		va_start(arguments, format);                                                                           \
		write_line(level, format, arguments);                                                                  \
		va_end(arguments);                                                                                     \
	}

DEFINE_LOG(log_debug, LEVEL_DEBUG)
DEFINE_LOG(log_info, LEVEL_INFO)
DEFINE_LOG(log_warning, LEVEL_WARNING)
DEFINE_LOG(log_error, LEVEL_ERROR)
