/* SPDX-License-Identifier: Apache-2.0 */
#include "options.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SPECS_MAX 32
#define CODE_HELP 1000
#define CODE_VERSION 1001

int options_error(const char *role, const char *format, ...)
{
	va_list arguments;

	fprintf(stderr, "mobi-helper %s: ", role);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fprintf(stderr, " (--help shows the options)\n");
	return 2;
}

static bool parse_number(const char *text, uint64_t *number, const char **end)
{
	char *stop;

	if (!isdigit((unsigned char)*text))
		return false;
	errno = 0;
	*number = strtoull(text, &stop, 10);
	*end = stop;
	return errno == 0;
}

/* `64M`, `4096`; false if it is not a size or does not fit. */
static bool parse_size(const char *text, uint64_t *size)
{
	static const char units[] = "KMGT";
	const char *end, *unit;
	unsigned int shift = 0;

	if (!parse_number(text, size, &end))
		return false;
	if (*end) {
		unit = strchr(units, toupper((unsigned char)*end));
		if (!unit || end[1])
			return false;
		shift = 10 * (unsigned int)(unit - units + 1);
	}
	if (*size > UINT64_MAX >> shift)
		return false;
	*size <<= shift;
	return true;
}

static void print_help(const char *role, const char *summary, const struct option_spec *specs)
{
	printf("usage: mobi-helper %s [OPTIONS]\n%s\n\n", role, summary);
	for (const struct option_spec *spec = specs; spec->name; spec++)
		printf("  --%s%s%s\n        %s%s\n", spec->name, spec->value ? " " : "", spec->value ? spec->value : "",
			spec->help, spec->required ? " (required)" : "");
	printf("  --help\n  --version\n");
}

static int store(const char *role, const struct option_spec *spec, const char *value)
{
	struct option_list *list = spec->target;
	const char *end;

	if (spec->kind != OPTION_FLAG && !*value)
		return options_error(role, "--%s must not be empty", spec->name);
	switch (spec->kind) {
	case OPTION_FLAG:
		*(bool *)spec->target = true;
		return -1;
	case OPTION_STRING:
		*(const char **)spec->target = value;
		return -1;
	case OPTION_SIZE:
		if (!parse_size(value, spec->target))
			return options_error(role, "--%s: '%s' is not a size such as 64M", spec->name, value);
		return -1;
	case OPTION_NUMBER:
		if (!parse_number(value, spec->target, &end) || *end)
			return options_error(role, "--%s: '%s' is not a number", spec->name, value);
		return -1;
	case OPTION_LIST:
		if (list->count == OPTION_LIST_MAX)
			return options_error(role, "--%s: at most %d are possible", spec->name, OPTION_LIST_MAX);
		list->items[list->count++] = value;
		return -1;
	}
	return options_error(role, "--%s has no kind", spec->name);
}

int options_parse(const char *role, const char *summary, int argc, char **argv, const struct option_spec *specs)
{
	struct option long_options[SPECS_MAX + 3] = {0};
	bool seen[SPECS_MAX] = {false};
	int count = 0, code;

	for (; specs[count].name && count < SPECS_MAX; count++)
		long_options[count] = (struct option){specs[count].name,
			specs[count].kind == OPTION_FLAG ? no_argument : required_argument, NULL, count};
	long_options[count] = (struct option){"help", no_argument, NULL, CODE_HELP};
	long_options[count + 1] = (struct option){"version", no_argument, NULL, CODE_VERSION};
	opterr = 0;
	optind = 1;
	while ((code = getopt_long(argc, argv, "+:", long_options, NULL)) != -1) {
		int status;

		if (code == CODE_HELP) {
			print_help(role, summary, specs);
			return 0;
		}
		if (code == CODE_VERSION) {
			printf("mobi-helper %s\n", MOBI_VERSION);
			return 0;
		}
		if (code == ':')
			return options_error(role, "%s needs a value", argv[optind - 1]);
		if (code < 0 || code >= count)
			return options_error(role, "'%s' is no option of this role", argv[optind - 1]);
		status = store(role, &specs[code], optarg);
		if (status >= 0)
			return status;
		seen[code] = true;
	}
	if (optind < argc)
		return options_error(role, "'%s' is not an option", argv[optind]);
	for (int i = 0; i < count; i++)
		if (specs[i].required && !seen[i])
			return options_error(role, "--%s is required", specs[i].name);
	return -1;
}
