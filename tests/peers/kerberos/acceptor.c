/*
 * A server of GSS-API (RFC 2744), over stdin and stdout: see lines.h.
 *
 *     acceptor [--mech kerberos|spnego] [--layout wrap|iov] [--bindings HEX] [--name host/server@REALM]
 *
 * The keys are those of KRB5_KTNAME. Without --name every service in there is us.
 */
#include "lines.h"

static gss_cred_id_t credential = GSS_C_NO_CREDENTIAL;
static gss_channel_bindings_t bindings = GSS_C_NO_CHANNEL_BINDINGS;

static void step(gss_buffer_desc token)
{
    OM_uint32 major, minor;
    gss_buffer_desc answer = GSS_C_EMPTY_BUFFER;

    major = gss_accept_sec_context(&minor, &context, credential, &token, bindings, NULL, NULL, &answer, NULL, NULL,
                                   &delegated);
    put_step(major, minor, &answer);
}

int main(int argc, char **argv)
{
    OM_uint32 major, minor;
    gss_OID_set_desc mechanisms = {1, &krb5_oid};
    gss_name_t name = GSS_C_NO_NAME;
    int i;

    for (i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--mech") == 0) {
            mechanisms.elements = mechanism_named(value_of(argc, argv, &i));
        } else if (strcmp(argv[i], "--layout") == 0) {
            use_iov = strcmp(value_of(argc, argv, &i), "iov") == 0;
        } else if (strcmp(argv[i], "--bindings") == 0) {
            bindings = bindings_of(value_of(argc, argv, &i));
        } else if (strcmp(argv[i], "--name") == 0) {
            name = import_principal(value_of(argc, argv, &i));
        } else {
            fatal("unknown option: %s", argv[i]);
        }
    }
    major = gss_acquire_cred(&minor, name, GSS_C_INDEFINITE, &mechanisms, GSS_C_ACCEPT, &credential, NULL, NULL);
    put_greeting(major, minor);
    serve(step);
    return 0;
}
