// Packing weight matrices into panels, once, ahead of all runs.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "plan.h"

namespace fn {

// Memory that grows and never moves, for weights; large amounts lie in huge pages.
class Arena {
  public:
    explicit Arena(size_t hint) : hint_(hint) {} // bytes of the first chunk, eight times the others
    void *take(size_t bytes); // zeroed, aligned to a cache line; throws std::bad_alloc
    size_t size() const { return size_; }

  private:
    const size_t hint_;
    size_t size_ = 0, left_ = 0;
    char *next_ = nullptr;
    std::vector<std::unique_ptr<void, void (*)(void *)>> chunks_;
};

// Zeroed memory aligned to a cache line, of huge pages where it is large; throws std::bad_alloc.
std::unique_ptr<void, void (*)(void *)> allocate(size_t bytes);

// Which inputs a product reads, segment by segment: indices into a row of the weight matrix, -1 where it is filled up.
using Order = std::vector<std::vector<int64_t>>;

// Pack a weight matrix of `rows` outputs, each a dense row of `depth`, whose inputs arrive as `inputs` says.
Product pack(const Kernels &kernels, Arena &arena, const float *weights, int64_t rows, int64_t depth,
             const Order &inputs, const float *bias, int64_t columns);

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

} // namespace fn
