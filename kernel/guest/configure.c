// SPDX-License-Identifier: Apache-2.0
#include "configure.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ipv6.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define SERVICES "/etc/mobi/start"
#define ENVIRONMENT_MAX 128

static char *environment[ENVIRONMENT_MAX + 1];

char **configured_environment(void)
{
	return environment;
}

static void set_environment(const char *key, const char *value)
{
	size_t length = strlen(key), i;
	char *entry;

	if (asprintf(&entry, "%s=%s", key, value) < 0)
		return;
	for (i = 0; environment[i]; i++)
		if (strncmp(environment[i], key, length) == 0 && environment[i][length] == '=')
			break;
	if (i == ENVIRONMENT_MAX) {
		free(entry);
		return;
	}
	free(environment[i]);
	environment[i] = entry;
}

static int control_socket(int family)
{
	return socket(family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
}

/* The kernel's present name of the interface with this MAC ("aa:bb:…"). */
static bool name_of_mac(const char *mac, char name[IFNAMSIZ])
{
	DIR *directory = opendir("/sys/class/net");
	struct dirent *entry;
	bool found = false;

	while (directory && !found && (entry = readdir(directory))) {
		char path[300], address[32] = "";
		FILE *file;

		snprintf(path, sizeof path, "/sys/class/net/%s/address", entry->d_name);
		file = fopen(path, "re");
		if (!file)
			continue;
		if (fgets(address, sizeof address, file) && strncasecmp(address, mac, strlen(mac)) == 0) {
			snprintf(name, IFNAMSIZ, "%.15s", entry->d_name);
			found = true;
		}
		fclose(file);
	}
	if (directory)
		closedir(directory);
	return found;
}

static int set_flags(int fd, const char *name, short on, short off)
{
	struct ifreq request = {0};

	snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
	if (ioctl(fd, SIOCGIFFLAGS, &request))
		return -1;
	request.ifr_flags = (short)((request.ifr_flags | on) & ~off);
	return ioctl(fd, SIOCSIFFLAGS, &request);
}

static int rename_device(int fd, const char *from, const char *to)
{
	struct ifreq request = {0};

	snprintf(request.ifr_name, IFNAMSIZ, "%s", from);
	snprintf(request.ifr_newname, IFNAMSIZ, "%s", to);
	if (set_flags(fd, from, 0, IFF_UP))
		return -1;
	return ioctl(fd, SIOCSIFNAME, &request);
}

/* The kernel numbered the devices; one of them may have the name that another is to get, and steps aside. */
static int rename_interface(int fd, const char *from, const char *to)
{
	static unsigned int aside;
	char name[IFNAMSIZ];

	if (strcmp(from, to) == 0)
		return 0;
	if (if_nametoindex(to)) {
		snprintf(name, sizeof name, "aside%u", aside++);
		if (rename_device(fd, to, name))
			return -1;
	}
	return rename_device(fd, from, to);
}

static int set_mtu(int fd, const char *name, int mtu)
{
	struct ifreq request = {.ifr_mtu = mtu};

	snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
	return ioctl(fd, SIOCSIFMTU, &request);
}

static int add_ipv4(const char *name, struct in_addr address, int prefix)
{
	struct ifreq request = {0};
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr = address};
	int fd = control_socket(AF_INET), failed;

	snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
	memcpy(&request.ifr_addr, &in, sizeof in);
	failed = ioctl(fd, SIOCSIFADDR, &request);
	if (!failed) {
		in.sin_addr.s_addr = prefix ? htonl(~0u << (32 - prefix)) : 0;
		memcpy(&request.ifr_netmask, &in, sizeof in);
		failed = ioctl(fd, SIOCSIFNETMASK, &request);
	}
	close(fd);
	return failed;
}

static int add_ipv6(const char *name, struct in6_addr address, int prefix)
{
	struct in6_ifreq request = {
		.ifr6_addr = address, .ifr6_prefixlen = (uint32_t)prefix, .ifr6_ifindex = (int)if_nametoindex(name)};
	int fd = control_socket(AF_INET6);
	int failed = ioctl(fd, SIOCSIFADDR, &request);

	if (failed && errno == EEXIST)
		failed = 0;
	close(fd);
	return failed;
}

/* "a/len"; false with errno set. */
static bool add_address(const char *name, const char *text)
{
	char address[64];
	const char *slash = strchr(text, '/');
	struct in6_addr six;
	struct in_addr four;
	int prefix = slash ? atoi(slash + 1) : -1;

	snprintf(address, sizeof address, "%.*s", (int)(slash ? slash - text : (long)strlen(text)), text);
	errno = EINVAL;
	if (inet_pton(AF_INET, address, &four) == 1 && prefix <= 32)
		return add_ipv4(name, four, prefix < 0 ? 32 : prefix) == 0;
	if (inet_pton(AF_INET6, address, &six) == 1 && prefix <= 128)
		return add_ipv6(name, six, prefix < 0 ? 128 : prefix) == 0;
	return false;
}

static bool configure_interface(struct request *request, const msgpack_object_map *map)
{
	char *mac = map_string(map, "mac"), *name = map_string(map, "name");
	char **addresses = map_strings(map, "addresses");
	int mtu = (int)map_int(map, "mtu", 0), fd = control_socket(AF_INET);
	char present[IFNAMSIZ];
	const char *step = NULL;

	if (!mac || !name || strlen(name) >= IFNAMSIZ)
		step = "understand the interface";
	else if (!name_of_mac(mac, present))
		step = "find a device with the MAC of";
	else if (rename_interface(fd, present, name))
		step = "rename";
	else if (mtu && set_mtu(fd, name, mtu))
		step = "set the MTU of";
	else if (set_flags(fd, name, IFF_UP, 0))
		step = "bring up";
	for (char **a = addresses; !step && a && *a; a++)
		if (!add_address(name, *a))
			step = "give its address to";
	if (step)
		result_error(request->session, "failed", "cannot %s %s: %s", step, name ? name : "?", strerror(errno));
	strings_free(addresses);
	free(mac);
	free(name);
	close(fd);
	return !step;
}

static bool write_file(const char *path, const char *content)
{
	FILE *file = fopen(path, "we");

	if (!file)
		return false;
	fputs(content, file);
	return fclose(file) == 0;
}

static bool write_hosts(const msgpack_object_map *hosts, const char *hostname)
{
	FILE *file = fopen("/etc/hosts.new", "we");

	if (!file)
		return false;
	fprintf(file, "127.0.0.1 localhost\n::1 localhost\n");
	if (hostname)
		fprintf(file, "127.0.1.1 %s\n", hostname);
	for (uint32_t i = 0; hosts && i < hosts->size; i++) {
		char *name = object_string(&hosts->ptr[i].key);
		const msgpack_object *list = &hosts->ptr[i].val;

		for (uint32_t j = 0; name && list->type == MSGPACK_OBJECT_ARRAY && j < list->via.array.size; j++) {
			char *address = object_string(&list->via.array.ptr[j]);

			if (address)
				fprintf(file, "%s %s\n", address, name);
			free(address);
		}
		free(name);
	}
	return fclose(file) == 0 && rename("/etc/hosts.new", "/etc/hosts") == 0;
}

static const msgpack_object_map *sub_map(const msgpack_object_map *map, const char *key)
{
	const msgpack_object *value = map_get(map, key);

	return value && value->type == MSGPACK_OBJECT_MAP ? &value->via.map : NULL;
}

static void take_environment(const msgpack_object_map *map)
{
	for (uint32_t i = 0; map && i < map->size; i++) {
		char *key = object_string(&map->ptr[i].key), *value = object_string(&map->ptr[i].val);

		if (key && value && *key && !strchr(key, '='))
			set_environment(key, value);
		free(key);
		free(value);
	}
}

void configure(struct request *request)
{
	const msgpack_object *interfaces = map_get(request->map, "interfaces");
	char *hostname = map_string(request->map, "hostname");
	bool ok = true;
	int fd = control_socket(AF_INET);

	set_environment("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
	set_environment("HOME", "/root");
	set_environment("LANG", "C.UTF-8");
	take_environment(sub_map(request->map, "env"));
	set_flags(fd, "lo", IFF_UP, 0);
	close(fd);
	if (hostname) {
		sethostname(hostname, strlen(hostname));
		write_file("/etc/hostname", hostname);
	}
	if (interfaces && interfaces->type == MSGPACK_OBJECT_ARRAY)
		for (uint32_t i = 0; ok && i < interfaces->via.array.size; i++)
			ok = interfaces->via.array.ptr[i].type == MSGPACK_OBJECT_MAP &&
			     configure_interface(request, &interfaces->via.array.ptr[i].via.map);
	if (ok && !write_hosts(sub_map(request->map, "hosts"), hostname)) {
		result_error(request->session, "failed", "cannot write /etc/hosts: %s", strerror(errno));
		ok = false;
	}
	if (ok) {
		result_ok(request->session);
		configure_start_services();
	}
	free(hostname);
}

void configure_start_services(void)
{
	static bool started;
	sigset_t none;

	if (started || access(SERVICES, X_OK))
		return;
	started = true;
	if (fork())
		return;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setsid();
	clearenv();
	for (char **e = environment; *e; e++)
		putenv(*e);
	execl(SERVICES, SERVICES, (char *)NULL);
	fprintf(stderr, "mobi-agent: cannot run %s: %s\n", SERVICES, strerror(errno));
	_exit(127);
}
