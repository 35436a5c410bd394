/* Runs the C kernels in a process of another architecture, on the memory of the one that asks: tests/helpers/emulated.py.
 *
 * Both have 64-bit addresses, so a pointer of the asking process names the same address here. Nothing is mapped there at
 * first: a fault fetches the page of 4,096 bytes, and some after it, through a pipe. Bytes that the kernel changed are sent back when it
 * returns, and all pages are dropped. Messages in: which function, 24 arguments. Messages out: kind, address or result,
 * bytes.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, AHEAD = 8, MOST = 1 << 16, ARGUMENTS = 24 };
enum { WANTED = 1, CHANGED, DONE, TAKEN, OUTSIDE };

int kvcomp_level(void);
const char *kvcomp_sources(void);
int kvcomp_attend(const void *);
int kvcomp_vector_dots(const void *);
int kvcomp_encode(const void *);
int kvcomp_code_dots(const void *, const void *, const void *, int64_t, int64_t, const void *, int64_t, const void *, int64_t,
                     int64_t, int64_t, int64_t, int64_t, int64_t, void *);
int kvcomp_choose(const void *, float, const void *, int64_t, int64_t, int64_t, int64_t, int64_t, const void *, int64_t,
                  int64_t, int64_t, void *);
int kvcomp_append(void *, void *, const void *, const void *, void *, int64_t, int64_t, int64_t, int64_t, int64_t);
int kvcomp_shares(const void *, const void *, int64_t, int64_t, int64_t, void *);
int kvcomp_largest(const void *, const void *, int64_t, int64_t, int64_t, void *);
int kvcomp_regroup(const void *, int64_t, int64_t, const void *, int64_t, int64_t, const void *, int64_t, int64_t, int64_t,
                   const void *, const void *, int64_t, void *, int64_t);
int kvcomp_runs(const void *, int64_t, const void *, int64_t, int64_t, int64_t, void *);

static uint8_t *mirrored[MOST], *copies; /* pages at their addresses; what they held when they came */
static int64_t held;

static void out(const void *from, int64_t n) {
    for (int64_t at = 0, done; at < n; at += done)
        if ((done = write(1, (const uint8_t *)from + at, n - at)) <= 0) _exit(3);
}

static void in(void *to, int64_t n) {
    for (int64_t at = 0, done; at < n; at += done)
        if ((done = read(0, (uint8_t *)to + at, n - at)) <= 0) _exit(0);
}

static void tell(uint64_t kind, uint64_t what, uint64_t bytes) {
    uint64_t message[3] = {kind, what, bytes};
    out(message, sizeof message);
}

static void fetch(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    uint8_t *at = (uint8_t *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1));
    uint64_t pages = 0;
    tell(WANTED, (uintptr_t)at, AHEAD);
    in(&pages, sizeof pages);
    if (!pages || held + AHEAD > MOST) tell(OUTSIDE, (uintptr_t)info->si_addr, 0), _exit(4);
    for (uint64_t i = 0; i < pages; i++, at += PAGE) {
        in(copies + held * PAGE, PAGE);
        uint8_t *there = mmap(at, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (there == at) {
            memcpy(at, copies + held * PAGE, PAGE);
            mirrored[held++] = at;
        } else if (i) { /* here already, or never needed */
            munmap(there, PAGE);
        } else {
            tell(TAKEN, (uintptr_t)at, 0), _exit(5);
        }
    }
}

static void give_back(void) {
    for (int64_t i = 0; i < held; i++) {
        const uint8_t *now = mirrored[i], *was = copies + i * PAGE;
        for (int from = 0, to; memcmp(now, was, PAGE) && from < PAGE; from = to) {
            to = from + 1;
            if (now[from] == was[from]) continue;
            while (to < PAGE && now[to] != was[to]) to++;
            tell(CHANGED, (uintptr_t)(now + from), to - from);
            out(now + from, to - from);
        }
        munmap(mirrored[i], PAGE);
    }
    held = 0;
}

static int called(uint64_t which, const uint64_t *x) {
#define P(i) ((void *)(uintptr_t)x[i])
#define N(i) ((int64_t)x[i])
    float scale;
    memcpy(&scale, &x[1], sizeof scale);
    switch (which) {
    case 0: return kvcomp_level();
    case 1: return kvcomp_attend(P(0));
    case 2: return kvcomp_vector_dots(P(0));
    case 3: return kvcomp_encode(P(0));
    case 4: return kvcomp_code_dots(P(0), P(1), P(2), N(3), N(4), P(5), N(6), P(7), N(8), N(9), N(10), N(11), N(12), N(13), P(14));
    case 5: return kvcomp_choose(P(0), scale, P(2), N(3), N(4), N(5), N(6), N(7), P(8), N(9), N(10), N(11), P(12));
    case 6: return kvcomp_append(P(0), P(1), P(2), P(3), P(4), N(5), N(6), N(7), N(8), N(9));
    case 7: return kvcomp_shares(P(0), P(1), N(2), N(3), N(4), P(5));
    case 8: return kvcomp_largest(P(0), P(1), N(2), N(3), N(4), P(5));
    case 9: return kvcomp_regroup(P(0), N(1), N(2), P(3), N(4), N(5), P(6), N(7), N(8), N(9), P(10), P(11), N(12), P(13), N(14));
    case 10: return kvcomp_runs(P(0), N(1), P(2), N(3), N(4), N(5), P(6));
    default: _exit(6);
    }
}

int main(void) {
    struct sigaction action = {.sa_sigaction = fetch, .sa_flags = SA_SIGINFO};
    copies = mmap(0, (int64_t)MOST * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (copies == MAP_FAILED) return 1;
    sigaction(SIGSEGV, &action, 0), sigaction(SIGBUS, &action, 0);
    for (uint64_t message[1 + ARGUMENTS];;) {
        in(message, sizeof message);
        int code = called(message[0], message + 1);
        give_back();
        tell(DONE, (uint64_t)code, 0);
    }
}
