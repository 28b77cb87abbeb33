/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_OVERLAY_FILE_H
#define MOBI_OVERLAY_FILE_H

#include "overlay.h"

/* The overlay's header and its two maps on disk; only overlay.c needs this. All return 0 or a negative errno. */

/* Adds blocks [first, last] to the map of now. */
int overlay_file_note(struct overlay *overlay, uint64_t first, uint64_t last);

/* Syncs the data, then writes and syncs the map of the last sync. */
int overlay_file_sync(struct overlay *overlay);

#endif
