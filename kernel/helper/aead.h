/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOBI_AEAD_H
#define MOBI_AEAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * AES-256-GCM with the key prepared once: authenticated encryption of one message per call. The caller makes sure that
 * a nonce is never used twice with one key. A struct aead is used by one thread at a time; different ones by any.
 */
enum { AEAD_KEY = 32, AEAD_NONCE = 12, AEAD_TAG = 16 };

struct aead;

/* A context for one key, or NULL without memory. aead_free() wipes it; NULL is allowed. */
struct aead *aead_new(const uint8_t key[AEAD_KEY]);
void aead_free(struct aead *aead);

/*
 * Writes length bytes of ciphertext and AEAD_TAG bytes of tag to out; associated data is authenticated only. in and out
 * may be the same address, else they must not overlap.
 */
void aead_seal(struct aead *aead, const uint8_t nonce[AEAD_NONCE], const void *associated, size_t associated_length,
	const uint8_t *in, size_t length, uint8_t *out);

/*
 * The reverse: length counts the tag at the end of in, length - AEAD_TAG bytes are written to out. False, with these
 * bytes zeroed, when anything was changed or the message is shorter than a tag. The tag is compared in constant time.
 */
bool aead_open(struct aead *aead, const uint8_t nonce[AEAD_NONCE], const void *associated, size_t associated_length,
	const uint8_t *in, size_t length, uint8_t *out);

/* "intel-ipsec-mb" or "openssl": which of the two does the work here. */
const char *aead_implementation(void);

/* Overwrites a secret in a way that the compiler does not remove. */
void aead_wipe(void *secret, size_t length);

#endif
