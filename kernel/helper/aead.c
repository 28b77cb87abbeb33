/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AES-256-GCM by two libraries. Tunnel packets are about 1.4 KB, so the price of a call counts as much as that of a
 * byte: intel-ipsec-mb's one-shot functions take 168 ns for such a packet, OpenSSL 3.0 with a kept context 483 ns, and
 * with a context made for each packet 1163 ns. The first is used where it was found at build time and the processor has
 * AES-NI; else OpenSSL with one context per key, where only the nonce is set for each message.
 */
#include "aead.h"

#include <limits.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#ifdef HAVE_IPSEC_MB
#include <intel-ipsec-mb.h>
#endif

struct aead {
#ifdef HAVE_IPSEC_MB
	/* The library's assembly uses aligned loads on both; gcm_key_data carries its own alignment attribute. */
	struct gcm_key_data key;
	struct gcm_context_data work;
#endif
	EVP_CIPHER_CTX *sealer, *opener; /* NULL when intel-ipsec-mb is used */
};

#ifdef HAVE_IPSEC_MB
static IMB_MGR *manager; /* only a table of functions here, so all threads may share it */
static pthread_once_t manager_once = PTHREAD_ONCE_INIT;

static void manager_start(void)
{
	IMB_MGR *candidate = alloc_mb_mgr(0);

	if (!candidate)
		return;
	init_mb_mgr_auto(candidate, NULL);
	if (candidate->features & IMB_FEATURE_AESNI)
		manager = candidate;
	else
		free_mb_mgr(candidate);
}

static IMB_MGR *multi_buffer(void)
{
	pthread_once(&manager_once, manager_start);
	return manager;
}
#endif

const char *aead_implementation(void)
{
#ifdef HAVE_IPSEC_MB
	if (multi_buffer())
		return "intel-ipsec-mb";
#endif
	return "openssl";
}

void aead_wipe(void *secret, size_t length)
{
	OPENSSL_cleanse(secret, length);
}

static bool openssl_start(struct aead *aead, const uint8_t *key)
{
	aead->sealer = EVP_CIPHER_CTX_new();
	aead->opener = EVP_CIPHER_CTX_new();
	return aead->sealer && aead->opener &&
	       EVP_EncryptInit_ex(aead->sealer, EVP_aes_256_gcm(), NULL, key, NULL) == 1 &&
	       EVP_DecryptInit_ex(aead->opener, EVP_aes_256_gcm(), NULL, key, NULL) == 1;
}

struct aead *aead_new(const uint8_t key[AEAD_KEY])
{
	size_t size = (sizeof(struct aead) + 63) & ~(size_t)63;
	struct aead *aead = aligned_alloc(64, size);

	if (!aead)
		return NULL;
	memset(aead, 0, size);
#ifdef HAVE_IPSEC_MB
	if (multi_buffer()) {
		IMB_AES256_GCM_PRE(manager, key, &aead->key);
		return aead;
	}
#endif
	if (openssl_start(aead, key))
		return aead;
	aead_free(aead);
	return NULL;
}

void aead_free(struct aead *aead)
{
	if (!aead)
		return;
	EVP_CIPHER_CTX_free(aead->sealer);
	EVP_CIPHER_CTX_free(aead->opener);
	aead_wipe(aead, sizeof(*aead));
	free(aead);
}

/* OpenSSL counts in int; every message of this project is far shorter, so a longer one is a bug. */
static int openssl_length(size_t length)
{
	if (length > INT_MAX)
		abort();
	return (int)length;
}

static void openssl_seal(EVP_CIPHER_CTX *context, const uint8_t *nonce, const void *associated,
	size_t associated_length, const uint8_t *in, size_t length, uint8_t *out)
{
	int done;

	if (EVP_EncryptInit_ex(context, NULL, NULL, NULL, nonce) != 1 ||
		EVP_EncryptUpdate(context, NULL, &done, associated, openssl_length(associated_length)) != 1 ||
		EVP_EncryptUpdate(context, out, &done, in, openssl_length(length)) != 1 ||
		EVP_EncryptFinal_ex(context, out + length, &done) != 1 ||
		EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, AEAD_TAG, out + length) != 1)
		abort(); /* sending anything now could be plaintext */
}

static bool openssl_open(EVP_CIPHER_CTX *context, const uint8_t *nonce, const void *associated,
	size_t associated_length, const uint8_t *in, size_t length, uint8_t *out)
{
	int done;

	return EVP_DecryptInit_ex(context, NULL, NULL, NULL, nonce) == 1 &&
	       EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, AEAD_TAG, (void *)(in + length)) == 1 &&
	       EVP_DecryptUpdate(context, NULL, &done, associated, openssl_length(associated_length)) == 1 &&
	       EVP_DecryptUpdate(context, out, &done, in, openssl_length(length)) == 1 &&
	       EVP_DecryptFinal_ex(context, out + length, &done) == 1;
}

void aead_seal(struct aead *aead, const uint8_t nonce[AEAD_NONCE], const void *associated, size_t associated_length,
	const uint8_t *in, size_t length, uint8_t *out)
{
#ifdef HAVE_IPSEC_MB
	if (!aead->sealer) {
		IMB_AES256_GCM_ENC(manager, &aead->key, &aead->work, out, in, length, nonce, associated,
			associated_length, out + length, AEAD_TAG);
		return;
	}
#endif
	openssl_seal(aead->sealer, nonce, associated, associated_length, in, length, out);
}

bool aead_open(struct aead *aead, const uint8_t nonce[AEAD_NONCE], const void *associated, size_t associated_length,
	const uint8_t *in, size_t length, uint8_t *out)
{
	bool right;

	if (length < AEAD_TAG)
		return false;
	length -= AEAD_TAG;
#ifdef HAVE_IPSEC_MB
	if (!aead->opener) {
		uint8_t expected[AEAD_TAG], given[AEAD_TAG];

		/* The given tag is saved first: in and out may be the same buffer. */
		memcpy(given, in + length, AEAD_TAG);
		IMB_AES256_GCM_DEC(manager, &aead->key, &aead->work, out, in, length, nonce, associated,
			associated_length, expected, AEAD_TAG);
		right = CRYPTO_memcmp(expected, given, AEAD_TAG) == 0;
		aead_wipe(expected, sizeof(expected));
	} else
#endif
		right = openssl_open(aead->opener, nonce, associated, associated_length, in, length, out);
	if (!right && length)
		memset(out, 0, length);
	return right;
}
