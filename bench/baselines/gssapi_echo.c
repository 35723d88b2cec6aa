/*
 * An echo server of the framed format in C, on epoll and the system's libgssapi: one thread, no allocation per message
 * but the library's own, a batch per read.
 *
 *     gssapi_echo
 *
 * The keys are those of KRB5_KTNAME; SPNEGO and raw Kerberos are taken alike. gss_wrap's tokens are cut so that the
 * ciphertext is as long as the message; they are not turned as Windows turns them, which an RFC 4121 peer need not mind.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <gssapi/gssapi.h>

enum { READ_SIZE = 65536, EVENTS = 256, LENGTH_MAX = 1 << 21, PREFIX = 4 };

struct buffer {
    unsigned char *bytes;
    size_t size, room;
};

/* What did not fit: the beginning of a frame, the end of an answer. While `unsent` is not empty, nothing is read. */
struct connection {
    int fd;
    int established;
    gss_ctx_id_t context;
    struct buffer unread, unsent;
};

static gss_cred_id_t credential;
static int epoll;
/* Where a read goes, and the answers to it: an idle connection has no buffers. */
static unsigned char arrived[READ_SIZE];
static struct buffer answers;

static void fatal(const char *what)
{
    perror(what);
    exit(1);
}

static unsigned char *append(struct buffer *buffer, const void *bytes, size_t size)
{
    if (buffer->size + size > buffer->room) {
        buffer->room = 2 * (buffer->size + size);
        buffer->bytes = realloc(buffer->bytes, buffer->room);
        if (buffer->bytes == NULL)
            fatal("realloc");
    }
    if (bytes != NULL)
        memcpy(buffer->bytes + buffer->size, bytes, size);
    buffer->size += size;
    return buffer->bytes + buffer->size - size;
}

static void empty(struct buffer *buffer)
{
    free(buffer->bytes);
    memset(buffer, 0, sizeof *buffer);
}

static uint32_t load_u32(const unsigned char *at)
{
    return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static void append_u32(struct buffer *buffer, size_t value)
{
    unsigned char bytes[PREFIX] = {value & 255, value >> 8 & 255, value >> 16 & 255, value >> 24 & 255};

    append(buffer, bytes, sizeof bytes);
}

static void say(const char *what, OM_uint32 major, OM_uint32 minor)
{
    fprintf(stderr, "%s: GSS-API error %lx, %lx\n", what, (unsigned long)major, (unsigned long)minor);
}

static int step(struct connection *peer, const unsigned char *token, size_t size)
{
    OM_uint32 major, minor, ignored;
    gss_buffer_desc given = {size, (void *)token}, answer = GSS_C_EMPTY_BUFFER;

    major = gss_accept_sec_context(&minor, &peer->context, credential, &given, GSS_C_NO_CHANNEL_BINDINGS, NULL, NULL,
                                   &answer, NULL, NULL, NULL);
    if (GSS_ERROR(major)) {
        say("login refused", major, minor);
        return -1;
    }
    peer->established = major == GSS_S_COMPLETE;
    if (answer.length != 0) {
        append_u32(&answers, answer.length);
        append(&answers, answer.value, answer.length);
    }
    gss_release_buffer(&ignored, &answer);
    return 0;
}

/* A record is opened where it lies: trailer and ciphertext together are the token. */
static int echo(struct connection *peer, const unsigned char *record, size_t size)
{
    OM_uint32 major, minor;
    gss_buffer_desc token = {size - PREFIX, (void *)(record + PREFIX)};
    gss_buffer_desc message = GSS_C_EMPTY_BUFFER, answer = GSS_C_EMPTY_BUFFER;
    int encrypted = 0;

    if (size < PREFIX || load_u32(record) > token.length)
        return -1;
    major = gss_unwrap(&minor, peer->context, &token, &message, &encrypted, NULL);
    if (major != GSS_S_COMPLETE || !encrypted) {
        say("a message did not open", major, minor);
        return -1;
    }
    if (message.length == 0)
        return -1; /* the goodbye */
    major = gss_wrap(&minor, peer->context, 1, GSS_C_QOP_DEFAULT, &message, &encrypted, &answer);
    if (GSS_ERROR(major)) {
        say("a message was not sealed", major, minor);
        return -1;
    }
    append_u32(&answers, PREFIX + answer.length);
    append_u32(&answers, answer.length - message.length);
    append(&answers, answer.value, answer.length);
    gss_release_buffer(&minor, &message);
    gss_release_buffer(&minor, &answer);
    return 0;
}

/* Take every whole frame; how many bytes they were, or -1. */
static ssize_t take_frames(struct connection *peer, const unsigned char *bytes, size_t size)
{
    size_t at = 0;

    while (size - at >= PREFIX) {
        size_t length = load_u32(bytes + at);
        if (length > LENGTH_MAX)
            return -1;
        if (length > size - at - PREFIX)
            break;
        at += PREFIX;
        if ((peer->established ? echo : step)(peer, bytes + at, length) < 0)
            return -1;
        at += length;
    }
    return (ssize_t)at;
}

static int wait_for(struct connection *peer, uint32_t events, int operation)
{
    struct epoll_event event = {events, {peer}};

    return epoll_ctl(epoll, operation, peer->fd, &event);
}

/* How much of it the kernel took, or -1. */
static ssize_t write_some(struct connection *peer, const unsigned char *bytes, size_t size)
{
    size_t at = 0;

    while (at < size) {
        ssize_t written = send(peer->fd, bytes + at, size - at, MSG_NOSIGNAL);
        if (written < 0)
            return errno == EAGAIN ? (ssize_t)at : -1;
        at += (size_t)written;
    }
    return (ssize_t)at;
}

static int write_answers(struct connection *peer)
{
    ssize_t written = write_some(peer, answers.bytes, answers.size);

    if (written < 0)
        return -1;
    if ((size_t)written == answers.size)
        return 0;
    append(&peer->unsent, answers.bytes + written, answers.size - (size_t)written);
    return wait_for(peer, EPOLLOUT, EPOLL_CTL_MOD);
}

static int on_readable(struct connection *peer)
{
    unsigned char *bytes = arrived;
    size_t size, left;
    ssize_t taken, got = recv(peer->fd, arrived, sizeof arrived, 0);

    if (got <= 0)
        return got < 0 && errno == EAGAIN ? 0 : -1;
    size = (size_t)got;
    if (peer->unread.size != 0) {
        append(&peer->unread, arrived, size);
        bytes = peer->unread.bytes;
        size = peer->unread.size;
    }
    answers.size = 0;
    taken = take_frames(peer, bytes, size);
    if (taken < 0)
        return -1;
    left = size - (size_t)taken;
    if (bytes != arrived) {
        memmove(bytes, bytes + taken, left);
        peer->unread.size = left;
        if (left == 0)
            empty(&peer->unread);
    } else if (left != 0) {
        append(&peer->unread, arrived + taken, left);
    }
    return write_answers(peer);
}

static int on_writable(struct connection *peer)
{
    ssize_t written = write_some(peer, peer->unsent.bytes, peer->unsent.size);

    if (written < 0)
        return -1;
    peer->unsent.size -= (size_t)written;
    memmove(peer->unsent.bytes, peer->unsent.bytes + written, peer->unsent.size);
    if (peer->unsent.size != 0)
        return 0;
    empty(&peer->unsent);
    return wait_for(peer, EPOLLIN, EPOLL_CTL_MOD);
}

static void leave(struct connection *peer)
{
    OM_uint32 minor;

    close(peer->fd);
    gss_delete_sec_context(&minor, &peer->context, GSS_C_NO_BUFFER);
    empty(&peer->unread);
    empty(&peer->unsent);
    free(peer);
}

static void accept_all(int listener)
{
    int one = 1, fd;

    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct connection *peer = calloc(1, sizeof *peer);
        if (peer == NULL)
            fatal("calloc");
        peer->fd = fd;
        peer->context = GSS_C_NO_CONTEXT;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (wait_for(peer, EPOLLIN, EPOLL_CTL_ADD) < 0)
            fatal("epoll_ctl");
    }
}

static int listen_anywhere(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

    if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) < 0 || listen(fd, 1024) < 0 ||
        getsockname(fd, (struct sockaddr *)&address, &size) < 0)
        fatal("listen");
    printf("listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(void)
{
    static struct epoll_event events[EVENTS];
    struct rlimit files;
    OM_uint32 major, minor;
    int listener, count, i;

    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    major = gss_acquire_cred(&minor, GSS_C_NO_NAME, GSS_C_INDEFINITE, GSS_C_NO_OID_SET, GSS_C_ACCEPT, &credential, NULL,
                             NULL);
    if (GSS_ERROR(major)) {
        say("no credential", major, minor);
        return 1;
    }
    epoll = epoll_create1(0);
    listener = listen_anywhere();
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &(struct epoll_event){EPOLLIN, {NULL}}) < 0)
        fatal("epoll_ctl");
    for (;;) {
        count = epoll_wait(epoll, events, EVENTS, -1);
        for (i = 0; i < count; i++) {
            struct connection *peer = events[i].data.ptr;
            if (peer == NULL)
                accept_all(listener);
            else if ((events[i].events & EPOLLOUT ? on_writable : on_readable)(peer) < 0)
                leave(peer);
        }
    }
}
