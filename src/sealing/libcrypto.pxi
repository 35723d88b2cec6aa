# What is used of libcrypto: OpenSSL 3's EVP interface, its library contexts and providers.

cdef extern from "<openssl/crypto.h>" nogil:
    int CRYPTO_memcmp(const void *left, const void *right, size_t size)
    void OPENSSL_cleanse(void *at, size_t size)
    ctypedef struct OSSL_LIB_CTX:
        pass
    OSSL_LIB_CTX *OSSL_LIB_CTX_new()
    void OSSL_LIB_CTX_free(OSSL_LIB_CTX *library)

cdef extern from "<openssl/provider.h>" nogil:
    ctypedef struct OSSL_PROVIDER:
        pass
    OSSL_PROVIDER *OSSL_PROVIDER_load(OSSL_LIB_CTX *library, const char *name)

cdef extern from "<openssl/err.h>" nogil:
    int ERR_set_mark()
    int ERR_pop_to_mark()
    void ERR_clear_error()

cdef extern from "<openssl/params.h>" nogil:
    ctypedef struct OSSL_PARAM:
        pass
    OSSL_PARAM OSSL_PARAM_construct_utf8_string(const char *key, char *value, size_t size)
    OSSL_PARAM OSSL_PARAM_construct_octet_string(const char *key, void *value, size_t size)
    OSSL_PARAM OSSL_PARAM_construct_end()

cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_CIPHER:
        pass
    ctypedef struct EVP_CIPHER_CTX:
        pass
    ctypedef struct EVP_MD:
        pass
    ctypedef struct EVP_MD_CTX:
        pass
    ctypedef struct EVP_KDF:
        pass
    ctypedef struct EVP_KDF_CTX:
        pass
    int EVP_default_properties_is_fips_enabled(OSSL_LIB_CTX *library)
    EVP_CIPHER *EVP_CIPHER_fetch(OSSL_LIB_CTX *library, const char *name, const char *properties)
    EVP_CIPHER_CTX *EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *context)
    int EVP_CIPHER_CTX_set_padding(EVP_CIPHER_CTX *context, int pad)
    int EVP_CipherInit_ex2(
        EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, const unsigned char *key, const unsigned char *iv,
        int encrypt, const OSSL_PARAM *parameters,
    )
    int EVP_CipherUpdate(
        EVP_CIPHER_CTX *context, unsigned char *to, int *written, const unsigned char *source, int size
    )
    EVP_MD *EVP_MD_fetch(OSSL_LIB_CTX *library, const char *name, const char *properties)
    EVP_MD_CTX *EVP_MD_CTX_new()
    void EVP_MD_CTX_free(EVP_MD_CTX *context)
    int EVP_MD_CTX_copy_ex(EVP_MD_CTX *to, const EVP_MD_CTX *source)
    int EVP_DigestInit_ex2(EVP_MD_CTX *context, const EVP_MD *digest, const OSSL_PARAM *parameters)
    int EVP_DigestUpdate(EVP_MD_CTX *context, const void *source, size_t size)
    int EVP_DigestFinal_ex(EVP_MD_CTX *context, unsigned char *to, unsigned int *size)

cdef extern from "<openssl/kdf.h>" nogil:
    EVP_KDF *EVP_KDF_fetch(OSSL_LIB_CTX *library, const char *name, const char *properties)
    EVP_KDF_CTX *EVP_KDF_CTX_new(EVP_KDF *kdf)
    void EVP_KDF_CTX_free(EVP_KDF_CTX *context)
    int EVP_KDF_derive(EVP_KDF_CTX *context, unsigned char *to, size_t size, const OSSL_PARAM *parameters)
