// SPDX-License-Identifier: Apache-2.0
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define QUIET_MS 200 /* output of a daemon left behind by a finished program is waited for this long */
#define CHUNK 32768
#define OUTPUT_BURST 16

enum kind { FREE, EXEC, GET, PUT };

struct end {
	int fd;          /* -1: closed */
	uint32_t credit; /* bytes we may still send (outputs) */
};

struct session {
	enum kind kind;
	uint32_t id;
	struct end ends[3];
	/* what the host sent and nobody has taken yet */
	uint8_t *pending;
	uint32_t pending_start, pending_end;
	bool pending_eof;
	/* exec */
	pid_t pid;
	bool exited, silent, tty;
	int status;
	int64_t quiet_since_ms;
	/* get, put */
	int64_t size;
	mode_t mode;
	char *path, *temporary;
};

static struct session sessions[SESSIONS_MAX];

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static struct session *find(uint32_t id)
{
	for (size_t i = 0; i < SESSIONS_MAX; i++)
		if (sessions[i].kind != FREE && !sessions[i].silent && sessions[i].id == id)
			return &sessions[i];
	return NULL;
}

static void close_end(struct end *end)
{
	if (end->fd >= 0)
		close(end->fd);
	end->fd = -1;
}

static void release(struct session *s)
{
	for (int i = 0; i < 3; i++)
		close_end(&s->ends[i]);
	if (s->temporary) {
		unlink(s->temporary);
		free(s->temporary);
	}
	free(s->path);
	free(s->pending);
	memset(s, 0, sizeof *s);
}

/* A free session with this id, or NULL after having told the host why not. */
static struct session *begin(uint32_t id, enum kind kind)
{
	if (find(id)) {
		result_error(id, "exists", "session %u is already open", id);
		return NULL;
	}
	for (size_t i = 0; i < SESSIONS_MAX; i++) {
		struct session *s = &sessions[i];

		if (s->kind != FREE)
			continue;
		memset(s, 0, sizeof *s);
		s->kind = kind;
		s->id = id;
		for (int e = 0; e < 3; e++)
			s->ends[e] = (struct end){.fd = -1, .credit = CREDIT_WINDOW};
		s->pending = malloc(CREDIT_WINDOW);
		if (s->pending)
			return s;
		s->kind = FREE;
		break;
	}
	result_error(id, "limit", "the agent runs at most %d programs and transfers at a time", SESSIONS_MAX);
	return NULL;
}

/* ---- programs ---- */

struct program {
	char **argv, *cwd;
	const msgpack_object_map *environment;
	char **base_environment;
	int in, out, err;
	bool tty;
	int report; /* gets errno when the program cannot be started */
};

static void child(const struct program *p)
{
	sigset_t none;
	int error;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setsid();
	dup2(p->in, 0);
	dup2(p->out, 1);
	dup2(p->err, 2);
	if (p->tty)
		ioctl(0, TIOCSCTTY, 0);
	clearenv();
	for (char **e = p->base_environment; e && *e; e++)
		putenv(*e);
	for (uint32_t i = 0; p->environment && i < p->environment->size; i++) {
		char *key = object_string(&p->environment->ptr[i].key);
		char *value = object_string(&p->environment->ptr[i].val);

		if (key && value)
			setenv(key, value, 1);
	}
	if (chdir(p->cwd ? p->cwd : "/root") && chdir("/"))
		error = errno;
	else if (execvp(p->argv[0], p->argv))
		error = errno;
	if (write(p->report, &error, sizeof error) < 0)
		_exit(126);
	_exit(127);
}

static bool open_pipe(int *ours, int *theirs, bool we_write)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC))
		return false;
	*ours = ends[we_write];
	*theirs = ends[!we_write];
	return true;
}

static bool open_streams(struct session *s, struct program *p)
{
	if (p->tty) {
		int master, slave;

		if (openpty(&master, &slave, NULL, NULL, NULL))
			return false;
		fcntl(master, F_SETFD, FD_CLOEXEC);
		s->ends[1].fd = master;
		s->ends[0].fd = fcntl(master, F_DUPFD_CLOEXEC, 3);
		p->in = slave;
		p->out = fcntl(slave, F_DUPFD_CLOEXEC, 3);
		p->err = fcntl(slave, F_DUPFD_CLOEXEC, 3);
	} else if (!open_pipe(&s->ends[0].fd, &p->in, true) || !open_pipe(&s->ends[1].fd, &p->out, false) ||
		   !open_pipe(&s->ends[2].fd, &p->err, false)) {
		return false;
	}
	for (int i = 0; i < 3; i++)
		if (s->ends[i].fd >= 0)
			fcntl(s->ends[i].fd, F_SETFL, O_NONBLOCK);
	return true;
}

static void close_child_ends(struct program *p)
{
	const int fds[] = {p->in, p->out, p->err};

	for (int i = 0; i < 3; i++)
		if (fds[i] >= 0)
			close(fds[i]);
}

static void start_program(struct session *s, struct program *p)
{
	int report[2], error = 0;

	if (!open_streams(s, p) || pipe2(report, O_CLOEXEC)) {
		result_error(s->id, "limit", "cannot make pipes for %s: %s", p->argv[0], strerror(errno));
		close_child_ends(p);
		release(s);
		return;
	}
	p->report = report[1];
	s->pid = fork();
	if (s->pid == 0)
		child(p);
	close(report[1]);
	close_child_ends(p);
	if (s->pid < 0)
		error = errno;
	else if (read(report[0], &error, sizeof error) != sizeof error)
		error = 0;
	close(report[0]);
	if (error) {
		result_error(s->id, error == ENOENT ? "not-found" : "failed", "cannot run %s: %s", p->argv[0],
			strerror(error));
		release(s);
	}
}

void session_exec(struct request *request, char **base_environment)
{
	const msgpack_object *environment = map_get(request->map, "env");
	struct program p = {.argv = map_strings(request->map, "argv"),
		.cwd = map_string(request->map, "cwd"),
		.tty = map_bool(request->map, "tty", false),
		.base_environment = base_environment,
		.in = -1,
		.out = -1,
		.err = -1};
	struct session *s;

	if (environment && environment->type == MSGPACK_OBJECT_MAP)
		p.environment = &environment->via.map;
	if (!p.argv || !p.argv[0])
		result_error(request->session, "bad-argument", "exec needs argv, a list of strings");
	else if ((s = begin(request->session, EXEC))) {
		s->tty = p.tty;
		start_program(s, &p);
	}
	strings_free(p.argv);
	free(p.cwd);
}

static void finish_program(struct session *s)
{
	struct reply reply;

	if (!s->silent) {
		reply_open(&reply, s->id, 3);
		reply_bool(&reply, "ok", true);
		reply_int(&reply, "code", WIFEXITED(s->status) ? WEXITSTATUS(s->status) : 128 + WTERMSIG(s->status));
		reply_int(&reply, "signal", WIFSIGNALED(s->status) ? WTERMSIG(s->status) : 0);
		reply_send(&reply, FRAME_RESULT);
	}
	release(s);
}

void session_reaped(pid_t pid, int status)
{
	for (size_t i = 0; i < SESSIONS_MAX; i++)
		if (sessions[i].kind == EXEC && sessions[i].pid == pid) {
			sessions[i].exited = true;
			sessions[i].status = status;
			sessions[i].quiet_since_ms = now_ms();
			close_end(&sessions[i].ends[0]);
		}
}

void session_signal(const struct frame *frame)
{
	struct request request;
	struct session *s = find(frame->session);

	if (request_open(&request, frame->session, frame->payload, frame->length) && s) {
		if (s->kind != EXEC) {
			result_error(
				s->id, "cancelled", "the transfer of %s was cancelled", s->path ? s->path : "the file");
			release(s);
		} else if (!s->exited) {
			kill(-s->pid, (int)map_int(request.map, "signal", SIGTERM));
		}
	}
	request_done(&request);
}

/* ---- files ---- */

void session_get(struct request *request)
{
	char *path = map_string(request->map, "path");
	struct session *s;
	struct stat st;
	int fd;

	if (!path) {
		result_error(request->session, "bad-argument", "get needs a path");
		return;
	}
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0 || fstat(fd, &st))
		result_error(request->session, "not-found", "cannot open %s: %s", path, strerror(errno));
	else if (!S_ISREG(st.st_mode))
		result_error(request->session, "bad-argument", "%s is not a regular file", path);
	else if ((s = begin(request->session, GET))) {
		s->ends[1].fd = fd;
		s->mode = st.st_mode & 07777;
		fd = -1;
	}
	if (fd >= 0)
		close(fd);
	free(path);
}

void session_put(struct request *request)
{
	struct session *s;

	s = begin(request->session, PUT);
	if (!s)
		return;
	s->path = map_string(request->map, "path");
	s->mode = (mode_t)map_int(request->map, "mode", 0644) & 07777;
	if (!s->path || asprintf(&s->temporary, "%s.mobi-put", s->path) < 0) {
		s->temporary = NULL;
		result_error(s->id, "bad-argument", "put needs a path");
		release(s);
		return;
	}
	s->ends[0].fd = open(s->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (s->ends[0].fd < 0) {
		result_error(s->id, "failed", "cannot write %s: %s", s->path, strerror(errno));
		free(s->temporary);
		s->temporary = NULL;
		release(s);
	}
}

static void finish_get(struct session *s)
{
	struct reply reply;

	reply_open(&reply, s->id, 3);
	reply_bool(&reply, "ok", true);
	reply_int(&reply, "mode", s->mode);
	reply_int(&reply, "size", s->size);
	reply_send(&reply, FRAME_RESULT);
	release(s);
}

static void finish_put(struct session *s)
{
	if (fchmod(s->ends[0].fd, s->mode) || fsync(s->ends[0].fd) || rename(s->temporary, s->path))
		result_error(s->id, "failed", "cannot write %s: %s", s->path, strerror(errno));
	else {
		struct reply reply;

		free(s->temporary);
		s->temporary = NULL;
		reply_open(&reply, s->id, 2);
		reply_bool(&reply, "ok", true);
		reply_int(&reply, "size", s->size);
		reply_send(&reply, FRAME_RESULT);
	}
	release(s);
}

/* ---- data ---- */

void session_stream(const struct frame *frame)
{
	struct session *s = find(frame->session);
	uint32_t n = frame->length - 1;

	if (!s || frame->length < 1 || frame->payload[0] != 0 || (s->kind != EXEC && s->kind != PUT))
		return;
	if (n == 0) {
		s->pending_eof = true;
		return;
	}
	if (s->pending_start == s->pending_end)
		s->pending_start = s->pending_end = 0;
	if (s->pending_start && s->pending_end + n > CREDIT_WINDOW) {
		memmove(s->pending, s->pending + s->pending_start, s->pending_end - s->pending_start);
		s->pending_end -= s->pending_start;
		s->pending_start = 0;
	}
	if (n > CREDIT_WINDOW - s->pending_end) {
		if (s->kind == EXEC && !s->exited)
			kill(-s->pid, SIGKILL);
		result_error(s->id, "limit", "more input than there was credit for");
		s->silent = true;
		return;
	}
	memcpy(s->pending + s->pending_end, frame->payload + 1, n);
	s->pending_end += n;
}

void session_credit(const struct frame *frame)
{
	struct session *s = find(frame->session);
	uint32_t more;

	if (!s || frame->length != 5 || frame->payload[0] > 2)
		return;
	memcpy(&more, frame->payload + 1, sizeof more);
	if (more <= CREDIT_WINDOW && s->ends[frame->payload[0]].credit <= CREDIT_WINDOW - more)
		s->ends[frame->payload[0]].credit += more;
}

static void give_credit(struct session *s, uint32_t bytes)
{
	uint8_t payload[5] = {0};

	memcpy(payload + 1, &bytes, sizeof bytes);
	channel_send(FRAME_CREDIT, s->id, payload, sizeof payload);
}

/* Host → program or file. */
static void move_input(struct session *s)
{
	struct end *in = &s->ends[0];
	ssize_t n = 0;

	if (s->pending_end > s->pending_start && in->fd >= 0 && channel_room() >= 64) {
		n = write(in->fd, s->pending + s->pending_start, s->pending_end - s->pending_start);
		if (n > 0) {
			s->pending_start += (uint32_t)n;
			if (!s->silent)
				give_credit(s, (uint32_t)n);
		} else if (n < 0 && errno != EAGAIN && errno != EINTR) {
			if (s->kind == PUT) {
				result_error(s->id, errno == ENOSPC ? "no-space" : "failed", "cannot write %s: %s",
					s->path, strerror(errno));
				release(s);
				return;
			}
			close_end(in); /* the program does not read any more */
		}
	}
	if (in->fd < 0 && s->pending_end > s->pending_start) {
		if (!s->silent)
			give_credit(s, s->pending_end - s->pending_start);
		s->pending_start = s->pending_end = 0;
	}
	if (!s->pending_eof || s->pending_start != s->pending_end)
		return;
	if (s->kind == PUT) {
		struct stat st;

		if (fstat(in->fd, &st) == 0)
			s->size = st.st_size;
		finish_put(s);
	} else {
		close_end(in);
	}
}

/* Program or file → host; true if something moved. */
static bool move_output(struct session *s, uint8_t channel)
{
	struct end *end = &s->ends[channel];
	uint8_t buffer[1 + CHUNK];
	size_t want = CHUNK;
	ssize_t n;

	if (end->fd < 0)
		return false;
	if (!s->silent) {
		if (want > end->credit)
			want = end->credit;
		if (want == 0 || channel_room() < want + 1)
			return false;
	}
	buffer[0] = channel;
	n = read(end->fd, buffer + 1, want);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (n < 0)
		n = 0; /* EIO of a pseudo-terminal whose other end is closed */
	if (!s->silent)
		channel_send(FRAME_STREAM, s->id, buffer, 1 + (size_t)n);
	if (n == 0) {
		close_end(end);
	} else {
		end->credit -= s->silent ? 0 : (uint32_t)n;
		s->size += n;
		s->quiet_since_ms = now_ms();
	}
	return true;
}

size_t sessions_watch(struct pollfd *watch)
{
	size_t n = 0;

	for (size_t i = 0; i < SESSIONS_MAX; i++) {
		struct session *s = &sessions[i];

		if (s->kind == EXEC && s->ends[0].fd >= 0 && s->pending_end > s->pending_start)
			watch[n++] = (struct pollfd){.fd = s->ends[0].fd, .events = POLLOUT};
		for (int e = 1; s->kind == EXEC && e < 3; e++)
			if (s->ends[e].fd >= 0 && (s->silent || s->ends[e].credit))
				watch[n++] = (struct pollfd){.fd = s->ends[e].fd, .events = POLLIN};
	}
	return n;
}

int sessions_turn(void)
{
	int wait = -1;

	for (size_t i = 0; i < SESSIONS_MAX; i++) {
		struct session *s = &sessions[i];
		int64_t quiet;

		if (s->kind == EXEC || s->kind == PUT)
			move_input(s);
		if (s->kind == GET && move_output(s, 1)) {
			if (s->ends[1].fd < 0)
				finish_get(s);
			else
				wait = 0;
		}
		if (s->kind != EXEC)
			continue;
		for (int burst = 0; move_output(s, 1) || move_output(s, 2); burst++)
			if (burst == OUTPUT_BURST) { /* a silent session has no credit to stop it */
				wait = 0;
				break;
			}
		if (!s->exited)
			continue;
		quiet = now_ms() - s->quiet_since_ms;
		if (!s->silent && (!s->ends[1].credit || !s->ends[2].credit))
			continue; /* the host is still reading */
		if ((s->ends[1].fd < 0 && s->ends[2].fd < 0) || quiet >= QUIET_MS)
			finish_program(s);
		else if (wait < 0 || wait > QUIET_MS - quiet)
			wait = (int)(QUIET_MS - quiet);
	}
	return wait;
}

void sessions_forget(void)
{
	for (size_t i = 0; i < SESSIONS_MAX; i++) {
		struct session *s = &sessions[i];

		if (s->kind == EXEC) {
			s->silent = true;
			s->pending_eof = true;
		} else if (s->kind != FREE) {
			release(s);
		}
	}
}

void sessions_garbled(void)
{
	for (size_t i = 0; i < SESSIONS_MAX; i++) {
		struct session *s = &sessions[i];

		if (s->kind == FREE || s->silent)
			continue;
		result_error(s->id, "garbled", "bytes were lost on the line to the guest");
		if (s->kind == EXEC) {
			if (!s->exited)
				kill(-s->pid, SIGKILL);
			s->silent = true;
			s->pending_eof = true;
		} else {
			release(s);
		}
	}
}
