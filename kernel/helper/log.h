/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_LOG_H
#define MOBI_LOG_H

/*
 * Diagnostics: one line per call on stderr, `level role: sentence`, written whole (lines of several processes that
 * share a log never mix). Control characters are replaced, so that a guest cannot forge lines. Never log a key.
 * A file on stderr is kept under 1 MiB (open it O_APPEND).
 *
 *	log_open("disk");
 *	log_warning("%s: %s", path, strerror(errno));	->	warning disk: /x/overlay: No space left on device
 *
 * The level from which lines are written is `info`, or what the environment's MOBI_LOG says (debug info warning error).
 */
void log_open(const char *role);
void log_debug(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_warning(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
