#include "threads.h"

#include <memory>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fn {
namespace {

constexpr int SPINS = 20000; // about 0.3 ms: layers and calls follow each other faster than a thread wakes up

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Wait until `value` differs from `old`: a while awake, then asleep.
int await(const std::atomic<int> &value, int old) {
    for (int n = 0; n < SPINS; ++n) {
        if (const int now = value.load(std::memory_order_acquire); now != old)
            return now;
        pause();
    }
    value.wait(old, std::memory_order_acquire);
    return value.load(std::memory_order_acquire);
}

// Sums that underflow would otherwise cost a hundred cycles each.
class FlushDenormals {
  public:
#if defined(__x86_64__)
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }
    const unsigned before_;
#elif defined(__aarch64__)
    FlushDenormals() : before_(__builtin_aarch64_get_fpcr64()) { __builtin_aarch64_set_fpcr64(before_ | (1 << 24)); }
    ~FlushDenormals() { __builtin_aarch64_set_fpcr64(before_); }
    const unsigned long before_;
#endif
};

struct Worker {
    std::atomic<int> started{0}, finished{0};
    const std::function<void(int)> *work = nullptr;
    int index = 0;

    void serve() {
        for (int seen = 0;;) {
            seen = await(started, seen);
            {
                FlushDenormals flush;
                (*work)(index);
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
    if (found->process != getpid())
        current.store(found = new Registry);
    return *found;
}

Worker *hire(Registry &pool) {
    if (!pool.idle.empty()) {
        Worker *worker = pool.idle.back();
        pool.idle.pop_back();
        return worker;
    }
    pool.idle.reserve(pool.all.size() + 1);
    pool.all.push_back(std::make_unique<Worker>());
    Worker *worker = pool.all.back().get();
    try {
        std::thread([worker] { worker->serve(); }).detach();
    } catch (...) {
        pool.all.pop_back();
        throw;
    }
    return worker;
}

} // namespace

void Barrier::wait() {
    const int round = round_.load(std::memory_order_acquire);
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        missing_.store(threads_, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        round_.notify_all();
    } else {
        await(round_, round);
    }
}

void run_team(int threads, const std::function<void(int)> &work) {
    FlushDenormals flush;
    if (threads == 1)
        return work(0);
    Registry &pool = registry();
    std::vector<Worker *> team;
    {
        std::lock_guard lock(pool.mutex);
        team.reserve(size_t(threads - 1));
        try {
            while (team.size() < size_t(threads - 1))
                team.push_back(hire(pool));
        } catch (...) {
            pool.idle.insert(pool.idle.end(), team.begin(), team.end());
            throw;
        }
    }
    for (int t = 1; t < threads; ++t) {
        Worker &worker = *team[size_t(t - 1)];
        worker.work = &work, worker.index = t;
        worker.started.store(worker.finished.load(std::memory_order_relaxed) + 1, std::memory_order_release);
        worker.started.notify_one();
    }
    work(0);
    for (Worker *worker : team)
        await(worker->finished, worker->started.load(std::memory_order_relaxed) - 1);
    std::lock_guard lock(pool.mutex);
    pool.idle.insert(pool.idle.end(), team.begin(), team.end());
}

} // namespace fn
