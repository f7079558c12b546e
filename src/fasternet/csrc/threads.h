// Threads that wait for work, shared by all networks of the process.
#pragma once

#include <atomic>

namespace fn {

// Whether so many threads have a processor each: else, one that waits awake takes the time of one that works.
bool have_processors(int threads);

// All threads of a team leave `wait` when the last one has come.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads), spins_(have_processors(threads)), missing_(threads) {}
    void wait();

  private:
    const int threads_;
    const bool spins_;
    std::atomic<int> missing_;
    std::atomic<unsigned> round_{0};
};

// Run call(work, 0) here and call(work, 1) ... call(work, threads - 1) in threads of their own; return when all have.
// Denormals are taken and given as zero meanwhile. Throws std::system_error where a thread cannot be started.
void run_team(int threads, void (*call)(const void *work, int thread), const void *work);

template <class Work> void run_team(int threads, const Work &work) {
    run_team(threads, [](const void *of, int thread) { (*static_cast<const Work *>(of))(thread); }, &work);
}

} // namespace fn
