// Threads that wait for work, shared by all networks of the process.
#pragma once

#include <atomic>
#include <functional>

namespace fn {

// All threads of a team leave `wait` when the last one has come.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads), missing_(threads) {}
    void wait();

  private:
    const int threads_;
    std::atomic<int> missing_, round_{0};
};

// Run work(0) here and work(1) ... work(threads - 1) in threads of their own; return when all have.
// Denormals are taken and given as zero meanwhile. Throws std::system_error where a thread cannot be started.
void run_team(int threads, const std::function<void(int)> &work);

} // namespace fn
