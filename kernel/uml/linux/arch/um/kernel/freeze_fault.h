/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __UM_FREEZE_FAULT_H
#define __UM_FREEZE_FAULT_H

#include <linux/mm_types.h>

bool freeze_map_missing(struct vm_area_struct *vma, unsigned long address,
			bool write);

#endif /* __UM_FREEZE_FAULT_H */
