/* Ranks of one host that share memory: a barrier, sums over all ranks' buffers, and queues of bytes between two ranks.
 *
 * Every wait is bounded: it returns 1 if nothing happened for a while, and the caller looks after its peers and calls
 * again. Sums are taken in rank order, element by element, so they do not depend on who arrives first. */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LINE 64 /* bytes of a cache line: what one rank writes must not share a line with what another writes */
#define BLOCK 4096 /* bytes of each rank's buffer that are summed at a time: they stay in the nearest cache */

#define YIELDING 100000 /* nanoseconds: to be woken from sleep takes a good part of that */

typedef struct {
    _Alignas(LINE) _Atomic uint32_t value;
    _Atomic uint32_t sleepers;
} bell; /* a number that one side raises and the other waits for */

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static inline void pause_a_little(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void ring(bell *b, uint32_t value) {
    atomic_store(&b->value, value);
    if (atomic_load(&b->sleepers)) syscall(SYS_futex, &b->value, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* For a bell that several raise. */
static void strike(bell *b) {
    atomic_fetch_add(&b->value, 1);
    if (atomic_load(&b->sleepers)) syscall(SYS_futex, &b->value, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Wait until the bell's value is no longer `seen`: spin for a moment, which is in vain if the other side shares this
 * core; then let others run, which costs nothing if there are none; then sleep, at most `nanoseconds` in all. */
static int wait_beyond(bell *b, uint32_t seen, int spins, int64_t nanoseconds) {
    for (int i = 0; i < spins; i++) {
        if (atomic_load_explicit(&b->value, memory_order_acquire) != seen) return 0;
        pause_a_little();
    }
    int64_t begun = now(), deadline = begun + nanoseconds, left;
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(&b->value, memory_order_acquire) != seen) return 0;
            sched_yield();
        }
    } while (now() - begun < YIELDING);
    atomic_fetch_add(&b->sleepers, 1);
    while (atomic_load(&b->value) == seen && (left = deadline - now()) > 0) {
        struct timespec t = {left / 1000000000, left % 1000000000};
        syscall(SYS_futex, &b->value, FUTEX_WAIT, seen, &t, NULL, 0);
    }
    atomic_fetch_sub(&b->sleepers, 1);
    return atomic_load(&b->value) == seen;
}

/* The barrier: rank r raises bells[r]; everyone waits for everyone's. `entered` says that this rank's has been raised
 * already, by a call that returned 1. Returns 0, or 1 if a rank has not come yet. */
int dl_barrier(bell *bells, int rank, int ranks, uint32_t round, int entered, int spins, int64_t nanoseconds) {
    if (!entered) ring(&bells[rank], round);
    for (int i = 1; i < ranks; i++) {
        int peer = (rank + i) % ranks;
        uint32_t seen;
        while ((int32_t)((seen = atomic_load_explicit(&bells[peer].value, memory_order_acquire)) - round) < 0) {
            if (wait_beyond(&bells[peer], seen, spins, nanoseconds)) return 1;
        }
    }
    return 0;
}

uint32_t dl_arrived(bell *bells, int rank) { return atomic_load(&bells[rank].value); }

#define SUM(NAME, T)                                                                                                  \
    /* Sum elements start..stop of all `ranks` buffers; write them to `writes` of the buffers at `to`. */             \
    void NAME(T *const *from, int ranks, T *const *to, int writes, int64_t start, int64_t stop) {                     \
        enum { N = BLOCK / sizeof(T) };                                                                               \
        T sum[N];                                                                                                     \
        for (int64_t at = start; at < stop; at += N) {                                                                \
            int64_t n = stop - at < N ? stop - at : N;                                                                \
            const T *restrict a = from[0] + at, *restrict b = from[ranks > 1] + at;                                   \
            if (ranks == 1)                                                                                           \
                memcpy(sum, a, n * sizeof(T));                                                                        \
            else                                                                                                      \
                for (int64_t i = 0; i < n; i++) sum[i] = a[i] + b[i];                                                 \
            for (int r = 2; r < ranks; r++) {                                                                         \
                const T *restrict c = from[r] + at;                                                                   \
                for (int64_t i = 0; i < n; i++) sum[i] += c[i];                                                       \
            }                                                                                                         \
            for (int w = 0; w < writes; w++) memcpy(to[w] + at, sum, n * sizeof(T));                                  \
        }                                                                                                             \
    }
SUM(dl_sum_float, float)
SUM(dl_sum_double, double)

/* All-reduce of a small buffer through one slot per rank: copy in, meet, sum all slots. One barrier, because slots of
 * two calls in a row are not the same: nobody reaches the next but one call before everyone has left this one. */
#define SMALL(NAME, T, SUM_ALL)                                                                                       \
    int NAME(T *own, T *const *slots, int64_t n, bell *bells, int rank, int ranks, uint32_t round, int entered,       \
             int spins, int64_t nanoseconds) {                                                                        \
        if (!entered) memcpy(slots[rank], own, n * sizeof(T));                                                        \
        if (dl_barrier(bells, rank, ranks, round, entered, spins, nanoseconds)) return 1;                             \
        T *const to[1] = {own};                                                                                       \
        SUM_ALL(slots, ranks, to, 1, 0, n);                                                                           \
        return 0;                                                                                                     \
    }
SMALL(dl_small_float, float, dl_sum_float)
SMALL(dl_small_double, double, dl_sum_double)

/* A queue of bytes from one rank to another. Only the writer changes `tail`, only the reader `head`. */
typedef struct {
    _Alignas(LINE) _Atomic uint64_t head;
    _Alignas(LINE) _Atomic uint64_t tail;
    _Alignas(LINE) uint64_t capacity;
    _Alignas(LINE) unsigned char data[];
} queue;

void dl_queue_init(queue *q, int64_t bytes) { q->capacity = bytes - sizeof(queue); }

/* Write what fits of `n` bytes, and tell the reader; return how many. */
int64_t dl_queue_write(queue *q, const unsigned char *from, int64_t n, bell *reader) {
    uint64_t tail = atomic_load_explicit(&q->tail, memory_order_relaxed);
    uint64_t room = q->capacity - (tail - atomic_load_explicit(&q->head, memory_order_acquire));
    if ((uint64_t)n > room) n = room;
    if (!n) return 0;
    uint64_t at = tail % q->capacity, first = q->capacity - at < (uint64_t)n ? q->capacity - at : (uint64_t)n;
    memcpy(q->data + at, from, first);
    memcpy(q->data, from + first, n - first);
    atomic_store_explicit(&q->tail, tail + n, memory_order_release);
    strike(reader);
    return n;
}

/* Read what is there of `n` bytes, and tell the writer that there is room; return how many. */
int64_t dl_queue_read(queue *q, unsigned char *to, int64_t n, bell *writer) {
    uint64_t head = atomic_load_explicit(&q->head, memory_order_relaxed);
    uint64_t there = atomic_load_explicit(&q->tail, memory_order_acquire) - head;
    if ((uint64_t)n > there) n = there;
    if (!n) return 0;
    uint64_t at = head % q->capacity, first = q->capacity - at < (uint64_t)n ? q->capacity - at : (uint64_t)n;
    memcpy(to, q->data + at, first);
    memcpy(to + first, q->data, n - first);
    atomic_store_explicit(&q->head, head + n, memory_order_release);
    strike(writer);
    return n;
}

uint32_t dl_bell(bell *b) { return atomic_load(&b->value); }

int dl_wait(bell *b, uint32_t seen, int spins, int64_t nanoseconds) { return wait_beyond(b, seen, spins, nanoseconds); }
