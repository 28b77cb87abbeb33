/* SPDX-License-Identifier: Apache-2.0 */
/* The overlay's file: header, lock, the two maps on disk; overlay.h says what they are for. */
#include "overlay_file.h"

#include "virtqueue.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define MAGIC "MOBIDISK"
#define FORMAT 1
#define MAX_SIZE (UINT64_C(1) << 46) /* 64 TiB: the maps have to fit into memory */
#define BASE_SAMPLES 64

/* Little-endian, as every machine this runs on. */
struct header {
	char magic[8];
	uint32_t format;
	uint32_t block_size;
	uint64_t size;
	uint64_t data_offset;
	uint64_t base_size;
	uint8_t base[16];  /* identity of the base's content; zeros for none */
	uint64_t checksum; /* XXH3-64 of all before it */
	char boot[40];     /* of the kernel that wrote the second map; may change */
};

static bool fail(char *error, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));

static bool fail(char *error, size_t size, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(error, size, format, arguments);
	va_end(arguments);
	return false;
}

static uint64_t round_up(uint64_t value, uint64_t unit)
{
	return (value + unit - 1) / unit * unit;
}

static uint64_t map_bytes(const struct overlay *overlay)
{
	return round_up(overlay->words * 8, BLOCK_SIZE);
}

static uint64_t now_offset(const struct overlay *overlay)
{
	return BLOCK_SIZE + map_bytes(overlay);
}

int file_read(int fd, const struct iovec *iov, unsigned count, uint64_t offset, size_t length)
{
	struct iovec piece[VIRTQUEUE_MAX_IOV];

	for (size_t done = 0; done < length;) {
		unsigned pieces = iov_slice(iov, count, done, length - done, piece);
		ssize_t n = preadv(fd, piece, (int)pieces, (off_t)(offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0) {
			iov_fill(iov, count, done, length - done);
			return 0;
		}
		done += (size_t)n;
	}
	return 0;
}

int file_write(int fd, const struct iovec *iov, unsigned count, uint64_t offset, size_t length)
{
	struct iovec piece[VIRTQUEUE_MAX_IOV];

	for (size_t done = 0; done < length;) {
		unsigned pieces = iov_slice(iov, count, done, length - done, piece);
		ssize_t n = pwritev(fd, piece, (int)pieces, (off_t)(offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		done += (size_t)n;
	}
	return 0;
}

static int write_at(int fd, const void *data, size_t size, uint64_t offset)
{
	const struct iovec part = {(void *)data, size};

	return file_write(fd, &part, 1, offset, size);
}

static int read_at(int fd, void *data, size_t size, uint64_t offset)
{
	const struct iovec part = {data, size};

	return file_read(fd, &part, 1, offset, size);
}

int overlay_file_note(struct overlay *overlay, uint64_t first, uint64_t last)
{
	for (uint64_t w = first / 64; w <= last / 64;) {
		uint64_t words[512];
		size_t n = 0;
		uint64_t begin = w;
		int failure;

		for (; w <= last / 64 && n < 512; w++, n++) {
			uint64_t mask = ~UINT64_C(0);

			if (w == first / 64)
				mask &= ~UINT64_C(0) << (first % 64);
			if (w == last / 64)
				mask &= ~UINT64_C(0) >> (63 - last % 64);
			words[n] = __atomic_load_n(&overlay->allocated[w], __ATOMIC_ACQUIRE) | mask;
		}
		failure = write_at(overlay->file, words, n * 8, now_offset(overlay) + begin * 8);
		if (failure)
			return failure;
	}
	return 0;
}

int overlay_adopt(struct overlay *overlay)
{
	if (overlay->file < 0 || overlay->read_only)
		return 0;
	return write_at(overlay->file, overlay->allocated, overlay->words * 8, now_offset(overlay));
}

int overlay_file_sync(struct overlay *overlay)
{
	const uint64_t bytes = map_bytes(overlay);
	uint64_t *map = aligned_alloc(BLOCK_SIZE, bytes);
	bool changed = false;
	int failure = 0;

	if (!map)
		return -ENOMEM;
	memset(map, 0, bytes);
	/* The map of before the sync: whatever is set later may not be on the disk yet. */
	for (uint64_t w = 0; w < overlay->words; w++)
		map[w] = __atomic_load_n(&overlay->allocated[w], __ATOMIC_ACQUIRE);
	if (fdatasync(overlay->file) < 0)
		failure = -errno;
	for (uint64_t at = 0; at < bytes && !failure; at += BLOCK_SIZE) {
		uint8_t *old = (uint8_t *)overlay->synced + at, *new = (uint8_t *)map + at;

		if (memcmp(old, new, BLOCK_SIZE) == 0)
			continue;
		failure = write_at(overlay->file, new, BLOCK_SIZE, BLOCK_SIZE + at);
		memcpy(old, new, BLOCK_SIZE);
		changed = true;
	}
	if (!failure && changed && fdatasync(overlay->file) < 0)
		failure = -errno;
	free(map);
	return failure;
}

/*
 * Identity of a base: a hash of its size and of 64 blocks spread over it. Cheap for any size, the same on every host,
 * and different for two images with different file systems in them.
 */
static int base_identity(const struct overlay *overlay, uint8_t identity[16])
{
	struct {
		uint64_t size;
		uint8_t blocks[BASE_SAMPLES][BLOCK_SIZE];
	} * sample;
	XXH128_canonical_t hash;
	int failure = 0;

	memset(identity, 0, 16);
	if (overlay->base < 0)
		return 0;
	sample = malloc(sizeof(*sample));
	if (!sample)
		return -ENOMEM;
	sample->size = overlay->base_size;
	for (uint64_t i = 0; i < BASE_SAMPLES && !failure; i++)
		failure = read_at(overlay->base, sample->blocks[i], BLOCK_SIZE,
			overlay->base_size / BLOCK_SIZE * i / BASE_SAMPLES * BLOCK_SIZE);
	XXH128_canonicalFromHash(&hash, XXH3_128bits(sample, sizeof(*sample)));
	memcpy(identity, hash.digest, 16);
	free(sample);
	return failure;
}

static void boot_identity(char boot[static 40])
{
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

	memset(boot, 0, 40);
	if (fd >= 0 && read(fd, boot, 36) != 36)
		memset(boot, 0, 40);
	if (fd >= 0)
		close(fd);
}

static uint64_t checksum(const struct header *header)
{
	return XXH3_64bits(header, offsetof(struct header, checksum));
}

/* The number of blocks, and what follows from it. */
static void set_size(struct overlay *overlay, uint64_t size)
{
	overlay->size = round_up(size, BLOCK_SIZE);
	overlay->blocks = overlay->size / BLOCK_SIZE;
	overlay->words = (overlay->blocks + 63) / 64;
	overlay->data_offset = BLOCK_SIZE + 2 * map_bytes(overlay);
	overlay->allocated_offset = 0;
	overlay->dirty_offset = map_bytes(overlay);
}

static bool lock_file(struct overlay *overlay, const char *path, char *error, size_t error_size)
{
	struct flock lock = {.l_type = overlay->read_only ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET, .l_len = 1};

	if (fcntl(overlay->file, F_OFD_SETLK, &lock) == 0)
		return true;
	if (errno == EAGAIN || errno == EACCES)
		return fail(error, error_size, "%s is in use by another process", path);
	return fail(error, error_size, "cannot lock %s: %s", path, strerror(errno));
}

/* The header first and synced: a file with a header but no length is an empty overlay. */
static bool create(
	struct overlay *overlay, const char *path, const struct header *wanted, char *error, size_t error_size)
{
	uint8_t block[BLOCK_SIZE] = {0};
	int failure;

	memcpy(block, wanted, sizeof(*wanted));
	failure = write_at(overlay->file, block, sizeof(block), 0);
	if (!failure && fsync(overlay->file) < 0)
		failure = -errno;
	if (failure)
		return fail(error, error_size, "cannot write %s: %s", path, strerror(-failure));
	return true;
}

static bool check_header(
	const struct header *header, const struct header *wanted, const char *path, char *error, size_t error_size)
{
	if (memcmp(header->magic, MAGIC, sizeof(header->magic)) != 0)
		return fail(error, error_size, "%s is not an overlay of a disk", path);
	if (header->format != FORMAT)
		return fail(error, error_size, "%s has format version %u; this program knows version %u", path,
			header->format, FORMAT);
	if (header->checksum != checksum(header))
		return fail(error, error_size, "the header of %s is damaged", path);
	if (header->block_size != BLOCK_SIZE || header->size == 0 || header->size > MAX_SIZE ||
		header->size % BLOCK_SIZE)
		return fail(error, error_size, "%s has blocks of %u bytes and a size of %llu, which is not possible",
			path, header->block_size, (unsigned long long)header->size);
	if (header->base_size != wanted->base_size || memcmp(header->base, wanted->base, sizeof(header->base)) != 0)
		return fail(error, error_size, "%s is an overlay of another base", path);
	if (wanted->size && header->size != wanted->size)
		return fail(error, error_size, "%s is a disk of %llu bytes, not of %llu", path,
			(unsigned long long)header->size, (unsigned long long)wanted->size);
	return true;
}

/* Opens, locks and checks the file, or makes it; sets the disk's size. */
static bool open_file(struct overlay *overlay, const struct overlay_options *options, struct header *header,
	char *error, size_t error_size)
{
	struct header wanted = {
		.magic = MAGIC, .format = FORMAT, .block_size = BLOCK_SIZE, .base_size = overlay->base_size};
	const char *path = options->overlay;
	struct stat st;
	int failure = base_identity(overlay, wanted.base);

	if (failure)
		return fail(error, error_size, "cannot read %s: %s", options->base, strerror(-failure));
	overlay->file = open(path, (options->read_only ? O_RDONLY : O_RDWR | O_CREAT) | O_CLOEXEC, 0600);
	if (overlay->file < 0 || fstat(overlay->file, &st) < 0)
		return fail(error, error_size, "cannot open %s: %s", path, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return fail(error, error_size, "%s is not a regular file", path);
	if (!lock_file(overlay, path, error, error_size))
		return false;
	if (options->size)
		wanted.size = round_up(options->size, BLOCK_SIZE);
	if (fstat(overlay->file, &st) == 0 && st.st_size == 0) {
		if (options->read_only)
			return fail(error, error_size, "%s is empty", path);
		if (wanted.size == 0)
			wanted.size = round_up(overlay->base_size, BLOCK_SIZE);
		set_size(overlay, wanted.size);
		wanted.data_offset = overlay->data_offset;
		wanted.checksum = checksum(&wanted);
		if (!create(overlay, path, &wanted, error, error_size))
			return false;
	}
	failure = read_at(overlay->file, header, sizeof(*header), 0);
	if (failure)
		return fail(error, error_size, "cannot read %s: %s", path, strerror(-failure));
	if (!check_header(header, &wanted, path, error, error_size))
		return false;
	set_size(overlay, header->size);
	if (header->data_offset != overlay->data_offset)
		return fail(error, error_size, "%s has its data at an unknown place", path);
	return true;
}

/* Loads the map to go on from, and makes the second map valid for this boot. */
static bool load_maps(
	struct overlay *overlay, const struct header *header, const char *path, char *error, size_t error_size)
{
	const uint64_t end = overlay->data_offset + overlay->size;
	char boot[40];
	int failure;

	boot_identity(boot);
	failure = read_at(overlay->file, overlay->synced, map_bytes(overlay), BLOCK_SIZE);
	if (!failure && boot[0] && memcmp(boot, header->boot, sizeof(boot)) == 0)
		failure = read_at(overlay->file, overlay->allocated, overlay->words * 8, now_offset(overlay));
	else
		memcpy(overlay->allocated, overlay->synced, overlay->words * 8);
	if (overlay->blocks % 64)
		overlay->allocated[overlay->words - 1] &= ~UINT64_C(0) >> (64 - overlay->blocks % 64);
	if (!failure && !overlay->read_only) {
		struct stat st;

		/* Room for the maps is taken now, so that a full disk never keeps a bit from being set. */
		if (posix_fallocate(overlay->file, 0, (off_t)overlay->data_offset) == ENOSPC)
			return fail(error, error_size, "no space for the maps of %s", path);
		if (fstat(overlay->file, &st) == 0 && (uint64_t)st.st_size < end &&
			ftruncate(overlay->file, (off_t)end) < 0)
			failure = -errno;
		if (!failure)
			failure = overlay_adopt(overlay);
		if (!failure)
			failure = write_at(overlay->file, boot, sizeof(boot), offsetof(struct header, boot));
	}
	if (failure)
		return fail(error, error_size, "cannot use %s: %s", path, strerror(-failure));
	return true;
}

static bool make_maps(struct overlay *overlay, char *error, size_t error_size)
{
	const uint64_t bytes = 2 * map_bytes(overlay);
	void *memory;

	overlay->maps = memfd_create("maps", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (overlay->maps < 0 || ftruncate(overlay->maps, (off_t)bytes) < 0 ||
		fcntl(overlay->maps, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
		return fail(error, error_size, "cannot make the maps: %s", strerror(errno));
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, overlay->maps, 0);
	overlay->synced = aligned_alloc(BLOCK_SIZE, map_bytes(overlay));
	if (memory == MAP_FAILED || !overlay->synced)
		return fail(error, error_size, "cannot map the maps: %s", strerror(errno));
	overlay->allocated = memory;
	overlay->dirty = (uint64_t *)((uint8_t *)memory + overlay->dirty_offset);
	return true;
}

static bool open_base(struct overlay *overlay, const char *path, char *error, size_t error_size)
{
	struct stat st;

	overlay->base = open(path, O_RDONLY | O_CLOEXEC);
	if (overlay->base < 0 || fstat(overlay->base, &st) < 0)
		return fail(error, error_size, "cannot open %s: %s", path, strerror(errno));
	if (S_ISREG(st.st_mode)) {
		overlay->base_size = (uint64_t)st.st_size;
	} else {
		off_t end = S_ISBLK(st.st_mode) ? lseek(overlay->base, 0, SEEK_END) : -1;

		if (end < 0)
			return fail(error, error_size, "%s is neither a file nor a block device", path);
		overlay->base_size = (uint64_t)end;
	}
	return true;
}

bool overlay_open(struct overlay *overlay, const struct overlay_options *options, char *error, size_t error_size)
{
	struct header header = {0};

	*overlay = (struct overlay){.base = -1, .file = -1, .maps = -1};
	overlay->read_only = options->read_only || !options->overlay;
	if (options->base && !open_base(overlay, options->base, error, error_size))
		return false;
	if (options->size > MAX_SIZE || overlay->base_size > MAX_SIZE)
		return fail(error, error_size, "a disk of more than 64T");
	if (options->size && options->size < overlay->base_size)
		return fail(error, error_size, "the size is smaller than the base's %llu bytes",
			(unsigned long long)overlay->base_size);
	if (!options->overlay) {
		set_size(overlay, options->size ? options->size : overlay->base_size);
		if (overlay->size == 0)
			return fail(error, error_size, "a disk without a base needs a size");
		return true;
	}
	if (!options->size && overlay->base_size == 0 && access(options->overlay, F_OK) < 0)
		return fail(error, error_size, "a disk without a base needs a size");
	return open_file(overlay, options, &header, error, error_size) && make_maps(overlay, error, error_size) &&
	       load_maps(overlay, &header, options->overlay, error, error_size);
}

void overlay_close(struct overlay *overlay)
{
	if (overlay->allocated)
		munmap(overlay->allocated, 2 * map_bytes(overlay));
	free(overlay->synced);
	if (overlay->maps >= 0)
		close(overlay->maps);
	if (overlay->file >= 0)
		close(overlay->file);
	if (overlay->base >= 0)
		close(overlay->base);
	*overlay = (struct overlay){.base = -1, .file = -1, .maps = -1};
}
