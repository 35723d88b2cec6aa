/*
 * A client of GSS-API (RFC 2744), over stdin and stdout: see lines.h.
 *
 *     initiator --mech kerberos|spnego --target host/server@REALM [--flags mutual,conf,...] [--layout wrap|iov]
 *               [--bindings HEX] [--user PRINCIPAL]
 *
 * The tickets are those of KRB5CCNAME. With --user the first line of the input is the password, in hexadecimal.
 */
#include "lines.h"

#ifndef GSS_C_DCE_STYLE
#define GSS_C_DCE_STYLE 4096
#endif

static gss_OID mechanism = &krb5_oid;
static gss_name_t target = GSS_C_NO_NAME;
static gss_cred_id_t credential = GSS_C_NO_CREDENTIAL;
static gss_channel_bindings_t bindings = GSS_C_NO_CHANNEL_BINDINGS;
static OM_uint32 wanted = 0;

static const struct {
    const char *name;
    OM_uint32 flag;
} flag_names[] = {
    {"delegate", GSS_C_DELEG_FLAG}, {"mutual", GSS_C_MUTUAL_FLAG}, {"replay", GSS_C_REPLAY_FLAG},
    {"sequence", GSS_C_SEQUENCE_FLAG}, {"conf", GSS_C_CONF_FLAG}, {"integ", GSS_C_INTEG_FLAG},
    {"dce", GSS_C_DCE_STYLE},
};

static OM_uint32 flags_named(char *list)
{
    OM_uint32 flags = 0;
    char *name;

    for (name = strtok(list, ","); name != NULL; name = strtok(NULL, ",")) {
        size_t i, count = sizeof flag_names / sizeof flag_names[0];
        for (i = 0; i < count && strcmp(name, flag_names[i].name) != 0; i++)
            ;
        if (i == count)
            fatal("unknown flag: %s", name);
        flags |= flag_names[i].flag;
    }
    return flags;
}

static void acquire_by_password(char *user)
{
    OM_uint32 major, minor;
    gss_OID_set_desc mechanisms = {1, mechanism};
    gss_name_t name = import_principal(user);
    char *line = NULL;
    size_t size = 0;
    gss_buffer_desc password;

    if (getline(&line, &size, stdin) <= 0)
        fatal("no password");
    password = get_hex(strtok(line, "\n"));
    major = gss_acquire_cred_with_password(&minor, name, &password, GSS_C_INDEFINITE, &mechanisms, GSS_C_INITIATE,
                                           &credential, NULL, NULL);
    put_greeting(major, minor);
    free(line);
    gss_release_name(&minor, &name);
}

static void step(gss_buffer_desc token)
{
    OM_uint32 major, minor;
    gss_buffer_desc answer = GSS_C_EMPTY_BUFFER;

    major = gss_init_sec_context(&minor, credential, &context, target, mechanism, wanted, GSS_C_INDEFINITE, bindings,
                                 &token, NULL, &answer, NULL, NULL);
    put_step(major, minor, &answer);
}

int main(int argc, char **argv)
{
    char *user = NULL;
    int i;

    for (i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--mech") == 0)
            mechanism = mechanism_named(value_of(argc, argv, &i));
        else if (strcmp(argv[i], "--target") == 0)
            target = import_principal(value_of(argc, argv, &i));
        else if (strcmp(argv[i], "--flags") == 0)
            wanted = flags_named(value_of(argc, argv, &i));
        else if (strcmp(argv[i], "--layout") == 0)
            use_iov = strcmp(value_of(argc, argv, &i), "iov") == 0;
        else if (strcmp(argv[i], "--bindings") == 0)
            bindings = bindings_of(value_of(argc, argv, &i));
        else if (strcmp(argv[i], "--user") == 0)
            user = value_of(argc, argv, &i);
        else
            fatal("unknown option: %s", argv[i]);
    }
    if (target == GSS_C_NO_NAME)
        fatal("no target");
    if (user != NULL)
        acquire_by_password(user);
    else
        put_greeting(GSS_S_COMPLETE, 0);
    serve(step);
    return 0;
}
