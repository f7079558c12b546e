#include "pack.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sys/mman.h>

namespace fn {
namespace {

constexpr size_t LINE = 64, HUGE_PAGE = size_t(1) << 21;

uint16_t to_bf16(float x) { // nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x)
        return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Split columns into panels of nearly equal numbers of vectors; the last vector is narrow where that holds the rest.
std::vector<Panel> split(const Kernels &kernels, int64_t columns) {
    const int64_t rest = columns % kernels.lanes;
    const bool tail = rest > 0 && rest <= kernels.tail;
    const int64_t slots = columns / kernels.lanes + (rest > 0);
    const int64_t count = (slots + kernels.max_slots - 1) / kernels.max_slots;
    std::vector<Panel> panels;
    for (int64_t n = 0, slot = 0; n < count; ++n) {
        const int64_t take = (slots - slot + count - n - 1) / (count - n);
        panels.push_back({int32_t(slot * kernels.lanes), int32_t(take), tail && n == count - 1, nullptr, nullptr});
        slot += take;
    }
    return panels;
}

// One segment of all, filled up to a multiple.
Order join(const Order &order, int64_t multiple) {
    Order joined(1);
    for (const auto &segment : order)
        joined[0].insert(joined[0].end(), segment.begin(), segment.end());
    joined[0].resize(size_t(round_up(int64_t(joined[0].size()), multiple)), -1);
    return joined;
}

} // namespace

std::unique_ptr<void, void (*)(void *)> allocate(size_t bytes) {
    const bool huge = bytes >= HUGE_PAGE;
    const size_t alignment = huge ? HUGE_PAGE : LINE, size = (bytes + alignment - 1) / alignment * alignment;
    void *memory = size < bytes ? nullptr : std::aligned_alloc(alignment, size ? size : alignment);
    if (!memory)
        throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (huge)
        madvise(memory, size, MADV_HUGEPAGE); // only a wish
#endif
    std::memset(memory, 0, size);
    return {memory, std::free};
}

void *Arena::take(size_t bytes) {
    bytes = (bytes + LINE - 1) / LINE * LINE;
    if (bytes > left_) {
        const size_t chunk = std::max(bytes, chunks_.empty() ? hint_ : hint_ / 8);
        chunks_.push_back(allocate(chunk));
        next_ = static_cast<char *>(chunks_.back().get());
        left_ = chunk, size_ += chunk;
    }
    void *taken = next_;
    next_ += bytes, left_ -= bytes;
    return taken;
}

Product pack(const Kernels &kernels, Arena &arena, const float *weights, int64_t rows, int64_t depth,
             const Order &inputs, const float *bias, int64_t columns) {
    const Order order = kernels.depth_multiple > 1 ? join(inputs, kernels.depth_multiple) : inputs;
    std::vector<Panel> panels = split(kernels, columns);
    Product product{};
    product.num_panels = int32_t(panels.size()), product.columns = int32_t(columns);
    for (const auto &segment : inputs)
        product.depth += int64_t(segment.size());
    int64_t words = 0;
    for (const auto &segment : order)
        words += (int64_t(segment.size()) + kernels.word - 1) / kernels.word;
    for (Panel &panel : panels) {
        const int64_t width = panel.slots * kernels.lanes - (panel.tail ? kernels.lanes - kernels.tail : 0);
        const size_t excess = panel.tail ? size_t(kernels.lanes - kernels.tail) * 4 : 0; // tiles read whole vectors
        char *to = static_cast<char *>(arena.take(size_t(words * width) * 4 + excess));
        float *biases = static_cast<float *>(arena.take(size_t(width) * 4));
        panel.weights = to, panel.bias = biases;
        for (int64_t j = 0; j < width && panel.column + j < rows; ++j)
            biases[j] = bias ? bias[panel.column + j] : 0.0f;
        for (const auto &segment : order)
            for (size_t k = 0; k < segment.size(); k += size_t(kernels.word), to += 4 * width)
                for (int64_t j = 0; j < width && panel.column + j < rows; ++j)
                    for (size_t i = k; i < k + size_t(kernels.word) && i < segment.size(); ++i) {
                        if (segment[i] < 0)
                            continue;
                        const float w = weights[(panel.column + j) * depth + segment[i]];
                        if (kernels.word == 1)
                            std::memcpy(to + 4 * j, &w, 4);
                        else {
                            const uint16_t half = to_bf16(w);
                            std::memcpy(to + 4 * j + 2 * (i - k), &half, 2);
                        }
                    }
    }
    product.panels = static_cast<Panel *>(arena.take(panels.size() * sizeof(Panel)));
    std::memcpy(product.panels, panels.data(), panels.size() * sizeof(Panel));
    return product;
}

} // namespace fn
