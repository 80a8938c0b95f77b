/* The scheduler behind common/emulate.h: fibers for the threads of one cluster at a time on each host thread. */
#include "common/device.cuh"
#include "common/gpu.h"

#include <cstdarg>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

thread_local kl_emulated_thread *kl_emulated;
thread_local dim3 kl_emulated_grid, kl_emulated_threads;
bool kl_emulated_runs = true;
bool kl_emulated_hopper = true;

struct fiber : kl_emulated_thread {
    void *stack_pointer;
    unsigned char *stack;
    bool done, asleep;
    const char *waits_for;
    bool (*ready)(void *);
    void *what;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
};

struct meeting {
    uint32_t mask, here;
    const char *name;
    void *args[32];
};

struct kl_emulated_warp {
    uint32_t live;
    meeting open[32];
    fiber *lanes[32];
};

struct kl_emulated_cluster {
    std::vector<kl_emulated_block> blocks;
    int arrived, generation, live;
};

namespace {

enum { STACK = 256 * 1024, SHARED_ROOM = 256 * 1024, CANARY = 64 };

struct machine {
    std::vector<fiber> fibers;
    std::vector<unsigned char *> stacks;
    std::vector<kl_emulated_warp> warps;
    kl_emulated_cluster cluster;
    std::vector<unsigned char> shared;
    const std::function<void()> *body;
    const char *name;
    void *scheduler;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
    ~machine()
    {
        for (unsigned char *s : stacks)
            munmap(s, STACK);
    }
};
thread_local machine *now;

fiber *self() { return (fiber *)kl_emulated; }

} // namespace

/* Saves the callee's registers on its stack, keeps the stack pointer in *from and goes on where `to` stands. */
#if defined(__x86_64__)
extern "C" void kl_emulated_switch(void **from, void *to);
asm(".text\n.globl kl_emulated_switch\n.type kl_emulated_switch,@function\nkl_emulated_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size kl_emulated_switch,.-kl_emulated_switch\n");
static void to_scheduler(fiber *f) { kl_emulated_switch(&f->stack_pointer, now->scheduler); }
static void to_fiber(fiber *f) { kl_emulated_switch(&now->scheduler, f->stack_pointer); }
#else
static void to_scheduler(fiber *f) { swapcontext(&f->context, &now->context); }
static void to_fiber(fiber *f) { swapcontext(&now->context, &f->context); }
#endif

void kl_emulated_fail(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fprintf(stderr, "emulated kernel %s: ", now ? now->name : "?");
    vfprintf(stderr, format, list);
    if (kl_emulated)
        fprintf(stderr, " [block %u,%u,%u thread %u]", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    fputc('\n', stderr);
    va_end(list);
    abort();
}

/* When the last lane of a mask has come, or the lanes still missing have returned from the kernel. */
static void try_meeting(kl_emulated_warp *w, meeting *m, kl_warp_work work)
{
    if ((m->here & m->mask & w->live) != (m->mask & w->live))
        return;
    work(m->args, m->mask);
    for (int lane = 0; lane < 32; lane++)
        if (m->here >> lane & 1)
            w->lanes[lane]->asleep = false;
    m->here = m->mask = 0;
    memset(m->args, 0, sizeof m->args);
}

void kl_emulated_collective(const char *name, uint32_t mask, void *args, kl_warp_work work)
{
    fiber *f = self();
    kl_emulated_warp *w = f->warp;
    if (!(mask >> f->lane & 1))
        kl_emulated_fail("%s: lane %d is not in its own mask %08x", name, f->lane, mask);
    meeting *m = NULL;
    for (meeting &o : w->open)
        if (o.mask == mask) {
            m = &o;
            break;
        }
    if (!m)
        for (meeting &o : w->open)
            if (!o.mask) {
                m = &o;
                *m = {};
                m->mask = mask;
                m->name = name;
                break;
            }
    if (m->name != name && strcmp(m->name, name))
        kl_emulated_fail("%s: lane %d came here while others of its warp wait in %s", name, f->lane, m->name);
    m->here |= 1u << f->lane;
    static int nothing;
    m->args[f->lane] = args ? args : &nothing;
    f->asleep = true;
    try_meeting(w, m, work);
    f->waits_for = name;
    while (f->asleep)
        to_scheduler(f);
}

void kl_emulated_wait(const char *name, bool (*ready)(void *), void *what)
{
    fiber *f = self();
    f->waits_for = name;
    f->ready = ready;
    f->what = what;
    to_scheduler(f);
    f->ready = NULL;
}

struct passed { int *generation, was; };
static bool has_passed(void *what) { return *((passed *)what)->generation != ((passed *)what)->was; }

void kl_emulated_block_barrier(int id, int threads, bool wait)
{
    kl_emulated_block *b = self()->block;
    int expected = threads ? threads : b->live;
    auto &bar = b->barrier[id];
    passed p = {&bar.generation, bar.generation};
    if (++bar.arrived >= expected) {
        bar.arrived = 0;
        bar.generation++;
    }
    if (wait && !has_passed(&p))
        kl_emulated_wait(id ? "named barrier" : "__syncthreads", has_passed, &p);
}

void kl_emulated_cluster_barrier()
{
    kl_emulated_cluster *c = self()->block->cluster;
    passed p = {&c->generation, c->generation};
    if (++c->arrived >= c->live) {
        c->arrived = 0;
        c->generation++;
    }
    if (!has_passed(&p))
        kl_emulated_wait("cluster barrier", has_passed, &p);
}

unsigned char *kl_emulated_peer(const void *shared, int rank)
{
    kl_emulated_block *b = self()->block;
    int64_t offset = (const unsigned char *)shared - b->shared;
    if (rank < 0 || rank >= (int)b->cluster->blocks.size() || offset < 0 || offset >= SHARED_ROOM)
        kl_emulated_fail("cluster: no such place: rank %d, offset %lld", rank, (long long)offset);
    return b->cluster->blocks[(size_t)rank].shared + offset;
}

static void fiber_main()
{
    (*now->body)();
    fiber *f = self();
    f->done = true;
    f->block->live--;
    f->block->cluster->live--;
    f->warp->live &= ~(1u << f->lane);
    for (;;)
        to_scheduler(f);
}

static void prepare(fiber *f)
{
    KL_UNPOISON(f->stack, STACK); /* what the fiber before it left */
#if defined(__x86_64__)
    void **top = (void **)(f->stack + STACK);
    *--top = NULL;                /* keeps the stack 16-byte aligned at entry */
    *--top = (void *)fiber_main;
    for (int i = 0; i < 6; i++)
        *--top = NULL;
    f->stack_pointer = top;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK;
    makecontext(&f->context, fiber_main, 0);
#endif
}

static void deadlock(machine &m)
{
    fprintf(stderr, "emulated kernel %s: every thread waits\n", m.name);
    for (kl_emulated_block &b : m.cluster.blocks) {
        const char *last = "";
        for (fiber &f : m.fibers)
            if (f.block == &b && !f.done && strcmp(last, f.waits_for)) {
                fprintf(stderr, "  block %u,%u,%u from thread %u: %s\n", b.index.x, b.index.y, b.index.z, f.index.x, f.waits_for);
                last = f.waits_for;
            }
    }
    abort();
}

/* One cluster: rounds over all fibers, each run until it waits, until none is left. */
static void run_cluster(machine &m, const kl_grid &g, int64_t first, unsigned y, unsigned z)
{
    size_t blocks = (size_t)g.cluster, threads = (size_t)g.threads, warps = (threads + 31) / 32;
    size_t stride = SHARED_ROOM + 1024;
    m.cluster.blocks.assign(blocks, {});
    m.cluster.arrived = m.cluster.generation = 0;
    m.cluster.live = (int)(blocks * threads);
    m.warps.assign(blocks * warps, {});
    m.shared.resize(blocks * stride + 2048);
    m.fibers.resize(blocks * threads);
    while (m.stacks.size() < blocks * threads) {
        void *s = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (s == MAP_FAILED)
            kl_emulated_fail("out of memory for the stacks of %zu threads", blocks * threads);
        m.stacks.push_back((unsigned char *)s);
    }
    unsigned char *base = (unsigned char *)(((uintptr_t)m.shared.data() + 2047) / 1024 * 1024);
    for (size_t i = 0; i < blocks; i++) {
        kl_emulated_block &b = m.cluster.blocks[i];
        b.shared = base + i * stride;
        memset(b.shared, 0xff, g.shared + CANARY);
        KL_POISON(b.shared + g.shared, SHARED_ROOM - g.shared);
        b.index.x = (unsigned)(first + (int64_t)i);
        b.index.y = y;
        b.index.z = z;
        b.rank = (int)i;
        b.live = (int)threads;
        b.cluster = &m.cluster;
    }
    for (size_t i = 0; i < blocks * threads; i++) {
        fiber &f = m.fibers[i];
        f = {};
        f.block = &m.cluster.blocks[i / threads];
        size_t thread = i % threads;
        f.warp = &m.warps[i / threads * warps + thread / 32];
        f.lane = (int)(thread % 32);
        f.index.x = (unsigned)thread;
        f.index.y = f.index.z = 0;
        f.warp->live |= 1u << f.lane;
        f.warp->lanes[f.lane] = &f;
        f.stack = m.stacks[i];
        f.waits_for = "nothing";
        prepare(&f);
    }
    size_t left = m.fibers.size();
    while (left) {
        bool moved = false;
        for (fiber &f : m.fibers) {
            if (f.done || f.asleep || (f.ready && !f.ready(f.what)))
                continue;
            moved = true;
            kl_emulated = &f;
            to_fiber(&f);
            left -= f.done;
        }
        if (!moved)
            deadlock(m);
    }
    kl_emulated = NULL;
    KL_UNPOISON(m.shared.data(), m.shared.size());
    for (kl_emulated_block &b : m.cluster.blocks)
        for (int i = 0; i < CANARY; i++)
            if (b.shared[g.shared + (size_t)i] != 0xff)
                kl_emulated_fail("a write beyond the %zu bytes of shared memory asked for", g.shared);
}

/* ---- what was launched ---- */

static std::mutex launched_lock;
static std::vector<std::pair<const char *, size_t>> launched;

static void remember(const char *name, size_t shared)
{
    std::lock_guard<std::mutex> held(launched_lock);
    for (auto &l : launched)
        if (!strcmp(l.first, name)) {
            l.second = max(l.second, shared);
            return;
        }
    launched.emplace_back(name, shared);
}

bool kl_gpu_launched(int i, const char **name, size_t *shared)
{
    std::lock_guard<std::mutex> held(launched_lock);
    if (i < 0 || (size_t)i >= launched.size())
        return false;
    *name = launched[(size_t)i].first;
    *shared = launched[(size_t)i].second;
    return true;
}

kl_status kl_emulated_run(const char *name, const kl_grid &grid, const std::function<void()> &body)
{
    kl_grid g = grid;
    if (g.resident)
        g.cluster = (int)(g.x < 16 ? g.x : 16); /* run together, as a cluster is; more than 16 do not fit */
    if (g.x <= 0 || g.y <= 0 || g.z <= 0)
        return kl_ok();
    if (g.x > INT32_MAX || g.y > 65535 || g.z > 65535)
        return kl_error(KL_EUNSUPPORTED, "%s: expected a grid of at most 2147483647 x 65535 x 65535, got %lld x %lld x %lld", name,
                        (long long)g.x, (long long)g.y, (long long)g.z);
    if (g.threads < 1 || g.threads > 1024 || g.shared > 227 * 1024 || g.cluster < 1 || g.cluster > 16 || g.x % g.cluster)
        return kl_error(KL_EDEVICE, "%s: no device takes %d threads, %zu bytes of shared memory and clusters of %d in %lld blocks", name,
                        g.threads, g.shared, g.cluster, (long long)g.x);
    remember(name, g.shared);
    if (!kl_emulated_runs)
        return kl_ok();
    int64_t clusters = g.x / g.cluster, all = clusters * g.y * g.z;
#pragma omp parallel
    {
        static thread_local machine own; /* its stacks serve the next launch too */
        machine *outer = now;
        now = &own;
        own.body = &body;
        own.name = name;
        kl_emulated_grid.x = (unsigned)g.x;
        kl_emulated_grid.y = (unsigned)g.y;
        kl_emulated_grid.z = (unsigned)g.z;
        kl_emulated_threads.x = (unsigned)g.threads;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < all; i++)
            run_cluster(own, g, i % clusters * g.cluster, (unsigned)(i / clusters % g.y), (unsigned)(i / clusters / g.y));
        now = outer;
    }
    return kl_ok();
}
