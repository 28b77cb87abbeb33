/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_PAGE_SCAN_H
#define MOBI_PAGE_SCAN_H

/*
 * The comparison while a guest stands still: every page of memory against the hash of what was sent, by two threads,
 * since the guest's own processor is idle now and this is most of the downtime. The result is a set of pages, bit b of
 * word w = page 64 w + b, which a page source then names.
 */
#include "page_region.h"

/* Fills `set` (one bit per page of the region, zeroed by the caller) with the pages that differ. */
void page_scan(const struct page_regions *regions, const struct page_region *region, uint64_t *set);

#endif
