// SPDX-License-Identifier: Apache-2.0
#ifndef MOBI_CONFIGURE_H
#define MOBI_CONFIGURE_H

#include "message.h"

/*
 * Carries out a `configure` request: host name, interfaces (found by MAC, renamed, addressed, brought up), /etc/hosts
 * and the environment of later programs. Doing it twice is the same as once. Answers the session itself.
 */
void configure(struct request *request);

/* "KEY=value" strings for programs, NULL-terminated; never freed while a program may be started. */
char **configured_environment(void);

/* Starts /etc/mobi/start once, after the first successful configure. */
void configure_start_services(void);

#endif
