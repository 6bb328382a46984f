// An Ethernet switch between TAP devices that delays every frame, for kernels without netem.
//
//     switch NAME PORTS
//
// makes the devices NAME0, NAME1, ... in this network namespace and then prints "ready". The host behind port i must have
// the hardware address 02:00:00:00:00:i, so there is nothing to learn. Commands are read from standard input, each
// answered by "ok", and the switch ends at the end of that input, so that it never outlives who started it:
//
//     delay MICROSECONDS       from now on, between any two hosts, one way
//     rate BITS_PER_SECOND     of the link from the switch to each host; 0 for no limit
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST_PORTS = 64, LARGEST_FRAME = 70000, FRAMES_AT_ONCE = 16 };
static const int64_t LONGEST_QUEUE = 100000000;  // ns; what would wait longer for a limited link is dropped

typedef struct Frame {
    struct Frame *next;
    int64_t due;  // ns
    int length;
    unsigned char bytes[];  // a virtio header, then the Ethernet frame
} Frame;

typedef struct {
    int fd;
    int64_t free_at;  // when the link to this host has sent all that waits
    Frame *first, **last;
} Port;

static Port ports[MOST_PORTS];
static int count;
static int64_t delay;  // ns
static double rate;    // bit/s

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// The bytes on the wire: the kernel hands over many segments as one frame with one header.
static int64_t wire_bytes(const unsigned char *bytes, int length) {
    const struct virtio_net_hdr *header = (const void *)bytes;
    int64_t frame = length - (int64_t)sizeof *header;
    if (header->gso_type == VIRTIO_NET_HDR_GSO_NONE || header->gso_size == 0) return frame;
    int64_t payload = frame - header->hdr_len, segments = (payload + header->gso_size - 1) / header->gso_size;
    return frame + (segments > 1 ? (segments - 1) * header->hdr_len : 0);
}

static void enqueue(Port *port, const unsigned char *bytes, int length, int64_t arrived) {
    int64_t start = arrived + delay;
    if (rate > 0 && port->free_at - start > LONGEST_QUEUE) return;
    if (start < port->free_at) start = port->free_at;  // in order, also after the delay was lowered
    port->free_at = start + (rate > 0 ? (int64_t)(8e9 * (double)wire_bytes(bytes, length) / rate) : 0);
    Frame *frame = malloc(sizeof *frame + (size_t)length);
    if (frame == NULL) return;
    frame->next = NULL, frame->due = port->free_at, frame->length = length;
    memcpy(frame->bytes, bytes, (size_t)length);
    *port->last = frame, port->last = &frame->next;
}

static void take_in(int from) {
    static unsigned char bytes[LARGEST_FRAME];
    const unsigned char *target = bytes + sizeof(struct virtio_net_hdr);
    for (int i = 0; i < FRAMES_AT_ONCE; i++) {
        int length = (int)read(ports[from].fd, bytes, sizeof bytes);
        if (length < (int)sizeof(struct virtio_net_hdr) + 14) return;
        int64_t arrived = now();
        int everyone = target[0] & 1;
        for (int to = 0; to < count; to++)
            if (to != from && (everyone || target[5] == to)) enqueue(&ports[to], bytes, length, arrived);
    }
}

// Deliver what is due; return when the next frame is, or -1.
static int64_t deliver(void) {
    int64_t next = -1;
    for (int i = 0; i < count; i++) {
        Port *port = &ports[i];
        while (port->first != NULL && port->first->due <= now()) {
            Frame *frame = port->first;
            if (write(port->fd, frame->bytes, (size_t)frame->length) < 0) { /* lost, as on any network */ }
            port->first = frame->next;
            if (port->first == NULL) port->last = &port->first;
            free(frame);
        }
        if (port->first != NULL && (next < 0 || port->first->due < next)) next = port->first->due;
    }
    return next;
}

static int obey(void) {
    char line[100];
    double value;
    if (fgets(line, sizeof line, stdin) == NULL) return 0;
    if (sscanf(line, "delay %lf", &value) == 1) delay = (int64_t)(value * 1000);
    else if (sscanf(line, "rate %lf", &value) == 1) rate = value;
    puts("ok");
    return 1;
}

static int open_port(const char *name, int number) {
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    snprintf(request.ifr_name, IFNAMSIZ, "%s%d", name, number);
    Port *port = &ports[number];
    port->last = &port->first;
    port->fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (port->fd < 0 || ioctl(port->fd, TUNSETIFF, &request) < 0) return 0;
    return ioctl(port->fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) == 0;
}

int main(int arguments, char **values) {
    count = arguments == 3 ? atoi(values[2]) : 0;
    if (count < 1 || count > MOST_PORTS) return 2;
    setvbuf(stdin, NULL, _IONBF, 0), setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_TIMERSLACK, 1000);  // ns
    struct pollfd waits[MOST_PORTS + 1];
    for (int i = 0; i < count; i++) {
        if (!open_port(values[1], i)) return perror("/dev/net/tun"), 1;
        waits[i] = (struct pollfd){.fd = ports[i].fd, .events = POLLIN};
    }
    waits[count] = (struct pollfd){.fd = 0, .events = POLLIN};
    puts("ready");
    for (;;) {
        int64_t next = deliver(), left = next < 0 ? 0 : next - now();
        if (left < 0) left = 0;
        struct timespec limit = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
        if (ppoll(waits, (nfds_t)count + 1, next < 0 ? NULL : &limit, NULL) <= 0) continue;
        if (waits[count].revents && !obey()) return 0;
        for (int i = 0; i < count; i++)
            if (waits[i].revents & POLLIN) take_in(i);
    }
}
