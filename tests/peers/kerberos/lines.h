/*
 * What the two programs here share: a security context of GSS-API (RFC 2744), driven over stdin and stdout.
 *
 * One command is one line, and so is its answer. Bytes are in hexadecimal, none of them is "-".
 *
 *     step TOKEN             more TOKEN: go on     done TOKEN: established
 *     seal MESSAGE           ok TRAILER DATA       as EncryptMessage lays them out, or where gss_wrap's token is cut
 *     open TRAILER DATA      ok MESSAGE            refused if it was not encrypted
 *     wrap CONF MESSAGE      ok TOKEN              gss_wrap as it is; CONF is 0 or 1
 *     unwrap TOKEN           ok CONF MESSAGE
 *     key                    ok ENCTYPE KEY        of the key that protects the messages
 *     info                   ok FLAGS LIFETIME INITIATOR TARGET DELEGATED      FLAGS in decimal, names as bytes
 *
 * Whatever fails is answered by "error TOKEN TEXT": what the library wants the peer to be told, and what it tells us.
 * Before the first command there is one answer more, "ok" or the reason why there is no credential.
 */
#ifndef LINES_H
#define LINES_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <gssapi/gssapi.h>
#ifdef HEIMDAL
#include <gssapi/gssapi_krb5.h>
#include <krb5.h>
#else
#include <gssapi/gssapi_ext.h>
#endif

static gss_OID_desc krb5_oid = {9, "\x2a\x86\x48\x86\xf7\x12\x01\x02\x02"};
static gss_OID_desc spnego_oid = {6, "\x2b\x06\x01\x05\x05\x02"};
/* GSS_KRB5_NT_PRINCIPAL_NAME: a principal as it is written, which no library canonicalizes through the DNS. */
static gss_OID_desc principal_oid = {10, "\x2a\x86\x48\x86\xf7\x12\x01\x02\x02\x01"};

static gss_ctx_id_t context = GSS_C_NO_CONTEXT;
static gss_cred_id_t delegated = GSS_C_NO_CREDENTIAL;
static int established = 0;
static int use_iov = 0;

static void fatal(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

static void put_hex(const gss_buffer_desc *buffer)
{
    const unsigned char *byte = buffer->value;
    size_t i;

    putchar(' ');
    if (buffer->length == 0)
        putchar('-');
    for (i = 0; i < buffer->length; i++) {
        putchar("0123456789abcdef"[byte[i] >> 4]);
        putchar("0123456789abcdef"[byte[i] & 15]);
    }
}

static void end_line(void)
{
    putchar('\n');
    if (fflush(stdout) != 0)
        exit(1);
}

static int digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Decode in place: the bytes are never longer than the text. */
static gss_buffer_desc get_hex(char *word)
{
    gss_buffer_desc buffer = {0, word};

    if (word == NULL)
        fatal("a word is missing");
    if (strcmp(word, "-") == 0)
        return buffer;
    for (; word[0] != '\0'; word += 2) {
        int high = digit(word[0]), low = high < 0 ? -1 : digit(word[1]);
        if (low < 0)
            fatal("not hexadecimal");
        ((unsigned char *)buffer.value)[buffer.length++] = (unsigned char)(high << 4 | low);
    }
    return buffer;
}

static void put_status(OM_uint32 code, int type, gss_OID mechanism)
{
    OM_uint32 more = 0, minor;

    do {
        gss_buffer_desc text = GSS_C_EMPTY_BUFFER;
        size_t i;

        if (gss_display_status(&minor, code, type, mechanism, &more, &text) != GSS_S_COMPLETE)
            return;
        for (i = 0; i < text.length; i++) {
            char c = ((char *)text.value)[i];
            putchar(c == '\n' ? ' ' : c);
        }
        gss_release_buffer(&minor, &text);
        fputs(more ? ", " : "", stdout);
    } while (more != 0);
}

static void put_error(OM_uint32 major, OM_uint32 minor, const gss_buffer_desc *token)
{
    static const gss_buffer_desc nothing = GSS_C_EMPTY_BUFFER;

    fputs("error", stdout);
    put_hex(token != NULL ? token : &nothing);
    putchar(' ');
    put_status(major, GSS_C_GSS_CODE, GSS_C_NO_OID);
    fputs(": ", stdout);
    put_status(minor, GSS_C_MECH_CODE, &krb5_oid);
    end_line();
}

static void put_refusal(const char *text)
{
    printf("error - %s", text);
    end_line();
}

/* The answer to `step`. Frees the token. */
static void put_step(OM_uint32 major, OM_uint32 minor, gss_buffer_t token)
{
    OM_uint32 ignored;

    if (GSS_ERROR(major)) {
        put_error(major, minor, token);
    } else {
        established = (major & GSS_S_CONTINUE_NEEDED) == 0;
        fputs(established ? "done" : "more", stdout);
        put_hex(token);
        end_line();
    }
    gss_release_buffer(&ignored, token);
}

static void do_wrap(int confidential, gss_buffer_desc message, int cut)
{
    OM_uint32 major, minor;
    gss_buffer_desc token = GSS_C_EMPTY_BUFFER;
    int encrypted = 0;

    major = gss_wrap(&minor, context, confidential, GSS_C_QOP_DEFAULT, &message, &encrypted, &token);
    if (GSS_ERROR(major)) {
        put_error(major, minor, NULL);
        return;
    }
    if (encrypted != confidential) {
        put_refusal("gss_wrap did not do what it was asked for");
    } else if (cut) {
        /* RC4 pads, so its data can be longer than the message, never shorter. */
        gss_buffer_desc trailer = {token.length - message.length, token.value};
        gss_buffer_desc data = {message.length, (char *)token.value + trailer.length};
        fputs("ok", stdout);
        put_hex(&trailer);
        put_hex(&data);
        end_line();
    } else {
        fputs("ok", stdout);
        put_hex(&token);
        end_line();
    }
    gss_release_buffer(&minor, &token);
}

static void do_wrap_iov(gss_buffer_desc message)
{
    OM_uint32 major, minor;
    int encrypted = 0;
    gss_iov_buffer_desc iov[3];
    gss_buffer_desc data;

    memset(iov, 0, sizeof iov);
    iov[0].type = GSS_IOV_BUFFER_TYPE_HEADER | GSS_IOV_BUFFER_FLAG_ALLOCATE;
    iov[1].type = GSS_IOV_BUFFER_TYPE_DATA;
    iov[1].buffer = message;
    iov[2].type = GSS_IOV_BUFFER_TYPE_PADDING | GSS_IOV_BUFFER_FLAG_ALLOCATE;
    major = gss_wrap_iov(&minor, context, 1, GSS_C_QOP_DEFAULT, &encrypted, iov, 3);
    if (GSS_ERROR(major)) {
        put_error(major, minor, NULL);
        return;
    }
    data.length = iov[1].buffer.length + iov[2].buffer.length;
    data.value = malloc(data.length + 1);
    if (data.value == NULL || !encrypted)
        fatal("gss_wrap_iov did not do what it was asked for");
    memcpy(data.value, iov[1].buffer.value, iov[1].buffer.length);
    if (iov[2].buffer.length != 0)
        memcpy((char *)data.value + iov[1].buffer.length, iov[2].buffer.value, iov[2].buffer.length);
    fputs("ok", stdout);
    put_hex(&iov[0].buffer);
    put_hex(&data);
    end_line();
    free(data.value);
    gss_release_iov_buffer(&minor, iov, 3);
}

static void do_unwrap(gss_buffer_desc token, int opening)
{
    OM_uint32 major, minor;
    gss_buffer_desc message = GSS_C_EMPTY_BUFFER;
    int encrypted = 0;

    major = gss_unwrap(&minor, context, &token, &message, &encrypted, NULL);
    /* A supplementary bit says that the token is a duplicate, old, or came after a gap. */
    if (major != GSS_S_COMPLETE) {
        put_error(major, minor, NULL);
    } else if (opening && !encrypted) {
        put_refusal("the message was signed and not sealed");
    } else {
        fputs(opening ? "ok" : encrypted ? "ok 1" : "ok 0", stdout);
        put_hex(&message);
        end_line();
    }
    gss_release_buffer(&minor, &message);
}

static void do_unwrap_iov(gss_buffer_desc trailer, gss_buffer_desc data)
{
    OM_uint32 major, minor;
    int encrypted = 0;
    gss_iov_buffer_desc iov[3];

    memset(iov, 0, sizeof iov);
    iov[0].type = GSS_IOV_BUFFER_TYPE_HEADER;
    iov[0].buffer = trailer;
    iov[1].type = GSS_IOV_BUFFER_TYPE_DATA;
    iov[1].buffer = data;
    iov[2].type = GSS_IOV_BUFFER_TYPE_PADDING;
    major = gss_unwrap_iov(&minor, context, &encrypted, NULL, iov, 3);
    if (major != GSS_S_COMPLETE) {
        put_error(major, minor, NULL);
    } else if (!encrypted) {
        put_refusal("the message was signed and not sealed");
    } else {
        fputs("ok", stdout);
        put_hex(&iov[1].buffer);
        end_line();
    }
}

static void do_open(gss_buffer_desc trailer, gss_buffer_desc data)
{
    gss_buffer_desc token;

    if (use_iov) {
        do_unwrap_iov(trailer, data);
        return;
    }
    token.length = trailer.length + data.length;
    token.value = malloc(token.length + 1);
    if (token.value == NULL)
        fatal("out of memory");
    memcpy(token.value, trailer.value, trailer.length);
    memcpy((char *)token.value + trailer.length, data.value, data.length);
    do_unwrap(token, 1);
    free(token.value);
}

#ifdef HEIMDAL

static void do_key(void)
{
    OM_uint32 major, minor;
    krb5_keyblock *key = NULL;

    major = gsskrb5_get_subkey(&minor, context, &key);
    if (GSS_ERROR(major)) {
        put_error(major, minor, NULL);
    } else {
        /* Not freed: that takes a krb5_context, and this process lives for one login. */
        gss_buffer_desc value = {key->keyvalue.length, key->keyvalue.data};
        printf("ok %d", (int)key->keytype);
        put_hex(&value);
        end_line();
    }
}

#else

static void do_key(void)
{
    OM_uint32 major, minor;
    gss_buffer_set_t keys = GSS_C_NO_BUFFER_SET;

    major = gss_inquire_sec_context_by_oid(&minor, context, GSS_C_INQ_SSPI_SESSION_KEY, &keys);
    if (GSS_ERROR(major)) {
        put_error(major, minor, NULL);
    } else if (keys->count < 2 || keys->elements[1].length == 0) {
        put_refusal("no enctype beside the key");
    } else {
        /* An OID, whose last arc is the enctype. */
        const gss_buffer_desc *oid = &keys->elements[1];
        printf("ok %d", ((unsigned char *)oid->value)[oid->length - 1]);
        put_hex(&keys->elements[0]);
        end_line();
    }
    gss_release_buffer_set(&minor, &keys);
}

#endif

static void put_name(gss_name_t name)
{
    OM_uint32 minor;
    gss_buffer_desc text = GSS_C_EMPTY_BUFFER;

    if (name != GSS_C_NO_NAME)
        gss_display_name(&minor, name, &text, NULL);
    put_hex(&text);
    gss_release_buffer(&minor, &text);
    gss_release_name(&minor, &name);
}

static void do_info(void)
{
    OM_uint32 major, minor, lifetime = 0, flags = 0;
    gss_name_t initiator = GSS_C_NO_NAME, target = GSS_C_NO_NAME, owner = GSS_C_NO_NAME;

    major = gss_inquire_context(&minor, context, &initiator, &target, &lifetime, NULL, &flags, NULL, NULL);
    if (GSS_ERROR(major)) {
        put_error(major, minor, NULL);
        return;
    }
    if (delegated != GSS_C_NO_CREDENTIAL)
        gss_inquire_cred(&minor, delegated, &owner, NULL, NULL, NULL);
    printf("ok %lu %lu", (unsigned long)flags, (unsigned long)lifetime);
    put_name(initiator);
    put_name(target);
    put_name(owner);
    end_line();
}

/* One command that is the same on both sides. */
static void do_command(const char *verb, char *first, char *second)
{
    if (!established)
        put_refusal("not established");
    else if (strcmp(verb, "seal") == 0 && use_iov)
        do_wrap_iov(get_hex(first));
    else if (strcmp(verb, "seal") == 0)
        do_wrap(1, get_hex(first), 1);
    else if (strcmp(verb, "open") == 0)
        do_open(get_hex(first), get_hex(second));
    else if (strcmp(verb, "wrap") == 0)
        do_wrap(first != NULL && strcmp(first, "1") == 0, get_hex(second), 0);
    else if (strcmp(verb, "unwrap") == 0)
        do_unwrap(get_hex(first), 0);
    else if (strcmp(verb, "key") == 0)
        do_key();
    else if (strcmp(verb, "info") == 0)
        do_info();
    else
        fatal("unknown command: %s", verb);
}

/* The answer before the first command: what came of acquiring the credential. */
static void put_greeting(OM_uint32 major, OM_uint32 minor)
{
    if (GSS_ERROR(major)) {
        put_error(major, minor, NULL);
    } else {
        fputs("ok", stdout);
        end_line();
    }
}

/* Commands until the end of the input; `step` is the one side's or the other's. */
static void serve(void (*step)(gss_buffer_desc token))
{
    char *line = NULL;
    size_t size = 0;

    while (getline(&line, &size, stdin) > 0) {
        char *verb = strtok(line, " \n"), *first = strtok(NULL, " \n"), *second = strtok(NULL, " \n");
        if (verb == NULL)
            fatal("an empty line");
        if (strcmp(verb, "step") == 0)
            step(get_hex(first));
        else
            do_command(verb, first, second);
    }
    free(line);
}

static gss_name_t import_principal(char *text)
{
    OM_uint32 major, minor;
    gss_buffer_desc buffer = {strlen(text), text};
    gss_name_t name = GSS_C_NO_NAME;

    major = gss_import_name(&minor, &buffer, &principal_oid, &name);
    if (GSS_ERROR(major))
        fatal("no such name: %s", text);
    return name;
}

/* An option that has a value; the next argument, and `*i` moves on to it. */
static char *value_of(int argc, char **argv, int *i)
{
    if (*i + 1 >= argc)
        fatal("%s needs a value", argv[*i]);
    return argv[++*i];
}

static gss_OID mechanism_named(const char *name)
{
    if (strcmp(name, "kerberos") == 0)
        return &krb5_oid;
    if (strcmp(name, "spnego") == 0)
        return &spnego_oid;
    fatal("unknown mechanism: %s", name);
    return GSS_C_NO_OID;
}

static gss_channel_bindings_t bindings_of(char *hex)
{
    static struct gss_channel_bindings_struct bindings;

    bindings.application_data = get_hex(hex);
    return &bindings;
}

#endif
