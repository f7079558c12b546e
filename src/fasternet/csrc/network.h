// A network: its layers with packed weights, its memory, and how both are shared among threads.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "fasternet.h"
#include "pack.h"
#include "threads.h"

namespace fn {

// A request that cannot be met; the message is one sentence.
struct Refusal {
    std::string message;
};

struct Layer {
    fn_layer facts; // without its pointers
    Product products[4];
    BlockPlan block{};
    std::vector<float> scale, shift;

    bool is_partial() const { return facts.kind == FN_BLOCK || facts.kind == FN_PCONV; }
    bool makes_map() const { return facts.kind <= FN_PCONV; }
};

// Where a layer finds its input and leaves its output in one picture's memory.
struct Place {
    Map in, out;
    Plane current, next;
    int64_t output; // number of the caller's output, -1: none
    struct {
        int64_t in, out, current, next;
    } offsets; // in the picture's memory
};

class Network {
  public:
    Network(const fn_layer *layers, int32_t count, const Kernels &kernels);

    int32_t num_outputs() const { return num_outputs_; }
    void output_shape(const fn_input &input, int32_t output, int64_t shape[4]) const;
    int64_t num_bytes() const;
    void run(const fn_input &input, float *const *outputs, int threads, double *seconds);

  private:
    struct Shape {
        int64_t h, w, pictures, threads;
        bool operator==(const Shape &) const = default;
    };
    struct Bytes { // of a picture: its maps, then its planes; of a thread: partial sums, hidden channels
        size_t maps, planes, partial, hidden;
    };
    void add(const fn_layer &facts);
    void pack_patch(Layer &layer, bool first);
    void pack_block(Layer &layer);
    void pack_head(Layer &layer);
    void check(const fn_input &input) const;
    void check_size(const fn_input &input) const;
    bool takes_pictures() const { return layers_[0].facts.kind == FN_PATCH; }
    bool can_write_in_place() const;
    void follow(int64_t h, int64_t w, std::vector<Place> &places) const;
    Bytes lay_out(int64_t h, int64_t w, std::vector<Place> &places) const;
    int64_t choose_tile(const Layer &layer, int64_t pixels) const;
    void measure_scratch(const std::vector<Place> &places, int64_t width, Bytes &bytes) const;
    void prepare(const fn_input &input, int threads);
    void run_picture(const fn_input &input, float *const *outputs, int64_t n, int lane, int thread, int team,
                     Barrier *barrier, double *seconds);
    void run_layer(const Layer &layer, const Place &place, const fn_input &input, float *const *outputs, int64_t n,
                   Work &work);
    void run_head(int64_t n, float *out, int thread, int team, Barrier &barrier);

    const Kernels &kernels_;
    const int64_t element_;
    Arena arena_;
    std::vector<Layer> layers_;
    int32_t num_outputs_ = 0;
    bool takes_uint8_ = false, in_place_ = false;

    mutable std::mutex mutex_; // of what follows
    Shape shape_{};
    std::vector<std::vector<Place>> lanes_; // memory of a picture: one for each picture at work
    std::vector<std::pair<char *, char *>> scratch_; // of a thread: partial sums, hidden channels
    char *pooled_ = nullptr, *hidden_ = nullptr, *logits_ = nullptr;
    std::unique_ptr<void, void (*)(void *)> memory_{nullptr, nullptr};
    size_t capacity_ = 0;
};

} // namespace fn
