#include "threads.h"

#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds SPIN{300}; // layers and calls follow each other faster than a thread wakes up
constexpr int PAUSES = 64;                     // between looks at the clock

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Wait until `value` differs from `old`: a while awake, if `spins`, then asleep.
unsigned await(const std::atomic<unsigned> &value, unsigned old, bool spins) {
    if (const unsigned now = value.load(std::memory_order_acquire); now != old)
        return now;
    for (const auto end = Clock::now() + SPIN; spins && Clock::now() < end;)
        for (int n = 0; n < PAUSES; ++n) {
            pause();
            if (const unsigned now = value.load(std::memory_order_acquire); now != old)
                return now;
        }
    value.wait(old, std::memory_order_acquire);
    return value.load(std::memory_order_acquire);
}

// The processors that a thread may run on.
#if defined(__linux__)
struct Affinity {
    cpu_set_t set;
    bool known; // not where there are more than a cpu_set_t holds

    Affinity() { known = sched_getaffinity(0, sizeof set, &set) == 0; }
    int count() const { return known ? CPU_COUNT(&set) : int(std::thread::hardware_concurrency()); }
    bool differs(const Affinity &other) const { return known && other.known && !CPU_EQUAL(&set, &other.set); }
    void apply(pthread_t thread) const { pthread_setaffinity_np(thread, sizeof set, &set); }
};
#else
struct Affinity {
    int count() const { return int(std::thread::hardware_concurrency()); }
    bool differs(const Affinity &) const { return false; }
    void apply(std::thread::native_handle_type) const {}
};
#endif

// Sums that underflow would otherwise cost a hundred cycles each.
class FlushDenormals {
  public:
#if defined(__x86_64__)
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }
    const unsigned before_;
#elif defined(__aarch64__)
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ | (1 << 24)));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
    unsigned long before_;
#else
    FlushDenormals() {} // not defaulted: it would be unused
#endif
};

struct Worker {
    std::atomic<unsigned> started{0}, finished{0};
    std::atomic<bool> spins{true};
    void (*call)(const void *, int) = nullptr;
    const void *work = nullptr;
    int index = 0;
    Affinity affinity; // of who hired it last; a new thread inherits it
    std::thread::native_handle_type handle{};

    void serve() {
        for (unsigned seen = 0;;) {
            seen = await(started, seen, spins.load(std::memory_order_relaxed));
            {
                FlushDenormals flush;
                call(work, index);
            }
            finished.store(seen, std::memory_order_release);
            finished.notify_one();
        }
    }
};

struct Registry {
    std::mutex mutex;
    std::vector<std::unique_ptr<Worker>> all;
    std::vector<Worker *> idle;
    pid_t process = getpid();
};

// Never destroyed: its threads outlive main. A forked child has none of its parent's threads, and starts over.
Registry &registry() {
    static std::atomic<Registry *> current{new Registry};
    Registry *found = current.load();
    if (found->process != getpid()) {
        auto fresh = std::make_unique<Registry>();
        if (current.compare_exchange_strong(found, fresh.get()))
            found = fresh.release();
    }
    return *found;
}

Worker *hire(Registry &pool, const Affinity &affinity) {
    if (!pool.idle.empty()) {
        Worker *worker = pool.idle.back();
        pool.idle.pop_back();
        if (affinity.differs(worker->affinity))
            affinity.apply(worker->handle), worker->affinity = affinity;
        return worker;
    }
    pool.idle.reserve(pool.all.size() + 1);
    pool.all.push_back(std::make_unique<Worker>());
    Worker *worker = pool.all.back().get();
    try {
        std::thread thread([worker] { worker->serve(); });
        worker->handle = thread.native_handle();
        thread.detach();
    } catch (...) {
        pool.all.pop_back();
        throw;
    }
    return worker;
}

} // namespace

bool have_processors(int threads) { return threads == 1 || threads <= Affinity().count(); }

void Barrier::wait() {
    const unsigned round = round_.load(std::memory_order_acquire);
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        missing_.store(threads_, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        round_.notify_all();
    } else {
        await(round_, round, spins_);
    }
}

void run_team(int threads, void (*call)(const void *, int), const void *work) {
    FlushDenormals flush;
    if (threads == 1)
        return call(work, 0);
    Registry &pool = registry();
    const Affinity affinity;
    const bool spins = threads <= affinity.count();
    thread_local std::vector<Worker *> team; // keeps its memory
    team.clear();
    {
        std::lock_guard lock(pool.mutex);
        team.reserve(size_t(threads - 1));
        try {
            while (team.size() < size_t(threads - 1))
                team.push_back(hire(pool, affinity));
        } catch (...) {
            pool.idle.insert(pool.idle.end(), team.begin(), team.end());
            throw;
        }
    }
    for (int t = 1; t < threads; ++t) {
        Worker &worker = *team[size_t(t - 1)];
        worker.call = call, worker.work = work, worker.index = t;
        worker.spins.store(spins, std::memory_order_relaxed);
        worker.started.store(worker.finished.load(std::memory_order_relaxed) + 1, std::memory_order_release);
        worker.started.notify_one();
    }
    call(work, 0);
    for (Worker *worker : team)
        await(worker->finished, worker->started.load(std::memory_order_relaxed) - 1, spins);
    std::lock_guard lock(pool.mutex);
    pool.idle.insert(pool.idle.end(), team.begin(), team.end());
}

} // namespace fn
