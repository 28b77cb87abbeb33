// SPDX-License-Identifier: GPL-2.0-only
/*
 * Freeze and resume, kernel side.
 *
 * The parent asks for a freeze on the control socket. Its interrupt wakes a
 * SCHED_FIFO thread, which therefore runs when no stub process does; it stops
 * timer and devices, writes freeze_state and holds still. THAW lets the same
 * process go on. In another process, freeze_resume() rebuilds what belongs to
 * the host and jumps back into that thread.
 *
 * Stub processes are not rebuilt but forgotten: an address space gets a new
 * stub when it is next used, and the stub's mappings come back one fault at a
 * time (freeze_map_missing()), so a resume takes as long for a large guest as
 * for a small one.
 */

#include <linux/extable.h>
#include <linux/init.h>
#include <linux/interrupt.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/panic_notifier.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/string.h>
#include <linux/wait.h>
#include <asm/sections.h>
#include <asm/tlbflush.h>
#include <as-layout.h>
#include <init.h>
#include <irq_kern.h>
#include <irq_user.h>
#include <kern.h>
#include <kern_util.h>
#include <os.h>
#include <registers.h>
#include <skas.h>
#include <stub-data.h>
#include <freeze.h>
#include "freeze_fault.h"

extern struct exception_table_entry __start___ex_table[];
extern struct exception_table_entry __stop___ex_table[];

/* Neighbours mapped along with a faulting page: 64 KiB, aligned. */
#define FAULT_AROUND	(16 * PAGE_SIZE)
#define FIRST_TICK_NS	1000000

static DECLARE_WAIT_QUEUE_HEAD(freeze_wait);
static struct freeze_request pending;
static bool freeze_requested;
static struct freeze_report report;
static bool booted;

/* The request that this process is obeying: not part of the guest. */
static struct freeze_request go_request __host_data;
static struct freeze_report go_report __host_data;

int freeze_lazy;

static void start_report(u32 kind, u32 sequence)
{
	memset(&report, 0, sizeof(report));
	report.kind = kind;
	report.sequence = sequence;
}

static void send_report(void)
{
	report.t_done = os_freeze_clock();
	os_freeze_send(&report);
}

/* In a starting or resuming process, where @why is all there is to say. */
static void __noreturn fail_start(int err, const char *why)
{
	go_report.kind = FREEZE_KIND_FAILED;
	go_report.sequence = go_request.sequence;
	go_report.error = err;
	go_report.t_done = os_freeze_clock();
	if (why)
		strscpy(go_report.text, why);
	os_freeze_send(&go_report);
	os_freeze_exit(1);
}

static void this_layout(struct freeze_layout *layout)
{
	memset(layout, 0, sizeof(*layout));
	layout->span_start = (unsigned long)__freeze_span_start;
	layout->span_end = (unsigned long)__freeze_span_end;
	layout->task_size = task_size;
	layout->stub_start = stub_start;
	layout->fp_size = host_fp_size;
	layout->seccomp = using_seccomp;
	strscpy(layout->build, linux_banner);
}

/*
 * Last act on the host's stack before the kernel starts: move the kernel's
 * variables into the memfd, or wait for GO and take those of a frozen guest.
 */
int __init freeze_prepare(void)
{
	struct freeze_layout layout;
	const char *why;
	int err;

	if (!freeze_enabled())
		return 0;
	if (!freeze_options.resume) {
		err = os_freeze_share(uml_physmem, physmem_size);
		if (err)
			fail_start(err, "moving the kernel's variables into freeze_memory failed");
		return 0;
	}
	this_layout(&layout);
	os_freeze_wait_go(&go_request);
	go_report.t_request = os_freeze_clock();
	err = os_freeze_load(uml_physmem, &layout, &why);
	if (err)
		fail_start(err, why);
	go_report.t_begin = os_freeze_clock();
	return 0;
}

/* Page tables: what the host process or a stub does not have mapped yet. */

struct marked_range {
	unsigned long start, end;
};

static int mark_unmapped(pte_t *pte, unsigned long address, void *data)
{
	struct marked_range *range = data;

	if (!pte_present(*pte))
		return 0;
	*pte = pte_mkneedsync(*pte);
	range->start = min(range->start, address);
	range->end = address + PAGE_SIZE;
	return 0;
}

static int map_vmalloc_area(void)
{
	struct marked_range range = { .start = ULONG_MAX };
	int err;

	err = apply_to_existing_page_range(&init_mm, VMALLOC_START,
					   VMALLOC_END - VMALLOC_START,
					   mark_unmapped, &range);
	if (err || !range.end)
		return err;
	um_tlb_mark_sync(&init_mm, range.start, range.end);
	return um_tlb_sync(&init_mm);
}

static bool pte_complete(pte_t pte, bool write)
{
	return pte_present(pte) && pte_young(pte) &&
	       (!write || (pte_write(pte) && pte_dirty(pte)));
}

/*
 * A fault although the page table entry allows the access: only the stub,
 * which is younger than the entry, does not have the page. Let the next sync
 * map it, and its neighbours that are complete as well.
 */
bool freeze_map_missing(struct vm_area_struct *vma, unsigned long address,
			bool write)
{
	struct mm_struct *mm = vma->vm_mm;
	unsigned long block = round_down(address, FAULT_AROUND);
	unsigned long start = max(vma->vm_start, block), a;
	unsigned long end = min(vma->vm_end, block + FAULT_AROUND);
	pte_t *pte;

	scoped_guard(spinlock, &mm->page_table_lock) {
		pte = virt_to_pte(mm, address & PAGE_MASK);
		if (!pte || pte_needsync(*pte) || !pte_complete(*pte, write))
			return false;
		/* A block never crosses a table: 512 entries, aligned. */
		pte -= ((address & PAGE_MASK) - start) >> PAGE_SHIFT;
		for (a = start; a < end; a += PAGE_SIZE, pte++)
			if (pte_complete(*pte, false))
				*pte = pte_mkneedsync(*pte);
	}
	um_tlb_mark_sync(mm, start, end);
	return true;
}

/* First use of an address space in this host process. */
int freeze_start_stub(struct mm_id *id)
{
	int err;

	memset((void *)id->stack, 0, STUB_DATA_PAGES * PAGE_SIZE);
	id->syscall_data_len = 0;
	id->syscall_fd_num = 0;
	err = start_userspace(id);
	if (err)
		return err;
	id->stale = 0;
	return unmap(id, 0, STUB_START);
}

static void resume_clock(void)
{
	long long away = os_persistent_clock_emulation() - freeze_state.realtime;

	/*
	 * Hosts keep UTC, so the guest's clocks jump over the time in which it
	 * did not run; they never go back.
	 */
	os_clock_offset = 0;
	os_clock_offset = freeze_state.monotonic - os_nsecs() + max(away, 0LL);
}

/*
 * On the host's stack of a fresh process, with interrupts off: make anew what
 * belongs to the host, then go on where the guest was frozen. Devices come
 * first since their descriptors must get back their old numbers.
 */
void __ref freeze_resume(void)
{
	int err;

	sort_extable(__start___ex_table, __stop___ex_table);
	mark_rodata_ro();
	err = map_vmalloc_area();
	if (err)
		fail_start(err, "mapping the vmalloc area failed");
	err = virtio_uml_reconnect(&go_report);
	if (err)
		fail_start(err, NULL);
	go_report.t_devices = os_freeze_clock();
	err = init_stub_exe_fd();
	if (err)
		fail_start(err, "making the stub's executable failed");
	um_irqs_rebuild();
	timer_set_signal_handler();
	err = os_timer_create();
	if (err)
		fail_start(err, "making a timer failed");
	os_idle_prepare();
	resume_clock();
	freeze_forget_stubs();
	freeze_lazy = 1;
	UML_LONGJMP(&freeze_state.context, 1);
}

static void save_state(void)
{
	freeze_state.monotonic = os_nsecs();
	freeze_state.realtime = os_persistent_clock_emulation();
	freeze_state.memory_size = physmem_size;
	freeze_state.linear_start = linear_map_start();
	this_layout(&freeze_state.layout);
	freeze_state.magic = FREEZE_MAGIC;
}

/*
 * Two copies of a guest must not draw the same random numbers. A guest that
 * only moved needs nothing; one that was forked will have to call
 * add_vmfork_randomness() here instead of just stirring.
 */
static void stir_random_pool(void)
{
	u8 seed[32];

	if (os_getrandom(seed, sizeof(seed), 0) == sizeof(seed))
		add_device_randomness(seed, sizeof(seed));
	memzero_explicit(seed, sizeof(seed));
}

static void hold_frozen(void)
{
	struct freeze_request thaw;

	os_freeze_hold(&report, &thaw);
	start_report(FREEZE_KIND_RUNNING, thaw.sequence);
	report.t_request = os_freeze_clock();
	report.t_begin = report.t_request;
	virtio_uml_thaw();
	report.t_devices = os_freeze_clock();
}

static void resumed(void)
{
	report = go_report;
	report.kind = FREEZE_KIND_RUNNING;
	report.sequence = go_request.sequence;
	stir_random_pool();
}

/* Only @report and freeze_state are used after the jump: both are static. */
static void freeze(const struct freeze_request *request, u64 t_request)
{
	unsigned long flags;
	int err;

	local_irq_save(flags);
	os_timer_disable(0);
	start_report(FREEZE_KIND_FROZEN, request->sequence);
	report.t_request = t_request;
	report.t_begin = os_freeze_clock();
	err = virtio_uml_freeze(&report);
	if (err) {
		report.kind = FREEZE_KIND_FAILED;
		report.error = err;
	} else {
		report.t_devices = os_freeze_clock();
		save_state();
		if (UML_SETJMP(&freeze_state.context) == 0)
			hold_frozen();
		else
			resumed();
		freeze_state.magic = 0;
		virtio_uml_kick();
	}
	send_report();
	os_timer_one_shot(0, FIRST_TICK_NS);
	send_sigio_to_self();
	local_irq_restore(flags);
}

static u64 requested_at;

static int freeze_thread(void *unused)
{
	struct freeze_request request;

	sched_set_fifo(current);
	for (;;) {
		wait_event(freeze_wait, READ_ONCE(freeze_requested));
		request = pending;
		freeze_requested = false;
		freeze(&request, requested_at);
	}
	return 0;
}

static void answer_at_once(const struct freeze_request *request)
{
	struct freeze_report answer = {
		.kind = FREEZE_KIND_RUNNING,
		.sequence = request->sequence,
		.t_request = os_freeze_clock(),
	};

	if (request->op == FREEZE_OP_FREEZE) {
		answer.kind = FREEZE_KIND_FAILED;
		answer.error = -EBUSY;
		strscpy(answer.text, "a freeze has been asked for already");
	} else if (request->op != FREEZE_OP_THAW) {
		answer.kind = FREEZE_KIND_FAILED;
		answer.error = -EINVAL;
		strscpy(answer.text, "this guest is running");
	}
	answer.t_done = os_freeze_clock();
	os_freeze_send(&answer);
}

static irqreturn_t control_interrupt(int irq, void *dev)
{
	struct freeze_request request;
	int got;

	while ((got = os_freeze_receive(&request)) > 0) {
		if (request.op != FREEZE_OP_FREEZE || freeze_requested) {
			answer_at_once(&request);
			continue;
		}
		requested_at = os_freeze_clock();
		pending = request;
		freeze_requested = true;
		wake_up(&freeze_wait);
	}
	/* Without its parent nobody could freeze or fence this guest. */
	if (got < 0)
		os_freeze_exit(1);
	return IRQ_HANDLED;
}

static int __init freeze_init(void)
{
	struct task_struct *thread;
	int irq;

	if (!freeze_enabled())
		return 0;
	thread = kthread_run(freeze_thread, NULL, "freeze");
	if (IS_ERR(thread))
		return PTR_ERR(thread);
	irq = um_request_irq(UM_IRQ_ALLOC, freeze_options.control, IRQ_READ,
			     control_interrupt, 0, "freeze", &freeze_wait);
	if (irq < 0)
		return irq;
	/* What came before the descriptor was asynchronous raised no signal. */
	send_sigio_to_self();
	return 0;
}
late_initcall(freeze_init);

/* Last words */

void freeze_booted(void)
{
	struct freeze_report words = { .kind = FREEZE_KIND_BOOTED };

	if (!freeze_enabled() || booted)
		return;
	booted = true;
	words.t_done = os_freeze_clock();
	os_freeze_send(&words);
}

void freeze_report_end(int kind)
{
	struct freeze_report words = { .kind = kind };

	if (!freeze_enabled())
		return;
	words.t_done = os_freeze_clock();
	os_freeze_send(&words);
}

static int report_panic(struct notifier_block *self, unsigned long unused,
			void *message)
{
	struct freeze_report words = { .kind = FREEZE_KIND_PANIC };

	if (!freeze_enabled())
		return NOTIFY_DONE;
	words.t_done = os_freeze_clock();
	strscpy(words.text, (const char *)message);
	os_freeze_send(&words);
	return NOTIFY_DONE;
}

static struct notifier_block panic_reporter = {
	.notifier_call = report_panic,
	.priority = INT_MAX,	/* panic_exit() comes next and does not return */
};

static int __init register_panic_reporter(void)
{
	return atomic_notifier_chain_register(&panic_notifier_list,
					      &panic_reporter);
}
__uml_postsetup(register_panic_reporter);
