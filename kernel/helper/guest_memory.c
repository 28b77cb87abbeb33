/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Guest memory as a back end sees it; the idea is in guest_memory.h.
 *
 * The other end can shorten the file under a mapping, and then touching it raises SIGBUS. It must harm only itself: the
 * handler puts a page of zeros where the page was lost. (System calls on such memory just fail with EFAULT.)
 */
#include "guest_memory.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static struct guest_memory *guarded; /* all tables with mappings, for the signal handler */

static void lost_page(int signal, siginfo_t *info, void *context)
{
	const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = (uintptr_t)info->si_addr & -page;

	(void)context;
	for (const struct guest_memory *m = guarded; m; m = m->next)
		for (unsigned i = 0; i < m->count; i++) {
			const uintptr_t begin = (uintptr_t)m->regions[i].mapping;

			if (at >= begin && at - begin < m->regions[i].mapped &&
				mmap((void *)at, page, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS,
					-1, 0) != MAP_FAILED)
				return;
		}
	struct sigaction fatal = {.sa_handler = SIG_DFL};
	sigaction(signal, &fatal, NULL);
}

void guest_memory_init(struct guest_memory *memory)
{
	struct sigaction action = {.sa_sigaction = lost_page, .sa_flags = SA_SIGINFO};

	memset(memory, 0, sizeof(*memory));
	memory->next = guarded;
	guarded = memory;
	sigaction(SIGBUS, &action, NULL);
}

void guest_memory_destroy(struct guest_memory *memory)
{
	guest_memory_clear(memory);
	for (struct guest_memory **m = &guarded; *m; m = &(*m)->next)
		if (*m == memory) {
			*m = memory->next;
			return;
		}
}

void guest_memory_clear(struct guest_memory *memory)
{
	for (unsigned i = 0; i < memory->count; i++)
		munmap(memory->regions[i].mapping, memory->regions[i].mapped);
	memory->count = 0;
}

const char *guest_memory_add(
	struct guest_memory *memory, uint64_t guest, uint64_t user, uint64_t size, uint64_t offset, int fd)
{
	const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), before = offset % page;
	struct guest_region *r = &memory->regions[memory->count];
	struct stat st;

	if (memory->count == GUEST_MEMORY_MAX)
		return "too many memory regions";
	if (size == 0 || size > INT64_MAX || offset > INT64_MAX || guest + size < guest || user + size < user)
		return "a memory region of an impossible size";
	if (fstat(fd, &st) < 0 || st.st_size < 0 || offset > (uint64_t)st.st_size ||
		size > (uint64_t)st.st_size - offset)
		return "a memory region beyond the end of its file";
	*r = (struct guest_region){.guest = guest, .user = user, .size = size, .mapped = size + before};
	r->mapping =
		mmap(NULL, r->mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)(offset - before));
	if (r->mapping == MAP_FAILED)
		return strerror(errno);
	r->host = (uint8_t *)r->mapping + before;
	memory->count++;
	return NULL;
}

void *guest_memory_at(const struct guest_memory *memory, uint64_t guest, uint64_t length)
{
	for (unsigned i = 0; i < memory->count; i++) {
		const struct guest_region *r = &memory->regions[i];
		uint64_t offset = guest - r->guest;

		if (guest >= r->guest && offset < r->size && length <= r->size - offset)
			return r->host + offset;
	}
	return NULL;
}

void *guest_memory_at_user(const struct guest_memory *memory, uint64_t user, uint64_t length)
{
	for (unsigned i = 0; i < memory->count; i++) {
		const struct guest_region *r = &memory->regions[i];
		uint64_t offset = user - r->user;

		if (user >= r->user && offset < r->size && length <= r->size - offset)
			return r->host + offset;
	}
	return NULL;
}

void *guest_memory_piece(const struct guest_memory *memory, uint64_t guest, uint64_t *length)
{
	for (unsigned i = 0; i < memory->count; i++) {
		const struct guest_region *r = &memory->regions[i];
		uint64_t offset = guest - r->guest;

		if (guest < r->guest || offset >= r->size)
			continue;
		if (*length > r->size - offset)
			*length = r->size - offset;
		return r->host + offset;
	}
	return NULL;
}
