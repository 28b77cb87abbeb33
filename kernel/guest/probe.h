// SPDX-License-Identifier: Apache-2.0
/*
 * The guest's own view of a move. A thread wakes every millisecond by the guest's clock and measures how late it was;
 * the largest lateness since the last reset is the hole a migration tore into the guest's time. The loop costs host
 * time (a thousand wake-ups a second), so it runs only for PROBE_SECONDS after somebody asked for it; between, a beat
 * per 50 ms shows that the guest lives.
 */
#ifndef MOBI_PROBE_H
#define MOBI_PROBE_H

#include "message.h"

#define PROBE_SECONDS 60
#define PROBE_SAMPLES 2000

void probe_start(void);
void probe(struct request *request);

#endif
