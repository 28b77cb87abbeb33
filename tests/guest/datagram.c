// SPDX-License-Identifier: Apache-2.0
/*
 * A UDP netcat for guests whose image has none.
 *
 *   datagram hear PORT           every datagram that comes, to standard output
 *   datagram say ADDRESS PORT    every read of standard input, as one datagram; nobody need be there to hear it
 */
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	char data[2048];
	ssize_t n;

	if (argc == 3 && strcmp(argv[1], "hear") == 0) {
		address.sin_port = htons((unsigned short)atoi(argv[2]));
		if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
			return 1;
		while ((n = recv(fd, data, sizeof(data), 0)) >= 0)
			if (write(1, data, (size_t)n) != n)
				return 1;
	} else if (argc == 4 && strcmp(argv[1], "say") == 0 && inet_pton(AF_INET, argv[2], &address.sin_addr) == 1) {
		address.sin_port = htons((unsigned short)atoi(argv[3]));
		while ((n = read(0, data, sizeof(data))) > 0)
			(void)!sendto(fd, data, (size_t)n, 0, (struct sockaddr *)&address, sizeof(address));
		return 0;
	}
	return 2;
}
