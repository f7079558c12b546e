// What a layer is once its weights are packed: plain data, read by the code of every instruction set.
//
// One micro-kernel does all the arithmetic: rows of pixels times a panel of packed weights. A row is a list of
// segments, contiguous runs of channels; a convolution, a merging or a PWConv over two buffers differ in their segments
// alone, so that nothing is ever gathered or concatenated.
#pragma once

#include <stdint.h>

namespace fn {

constexpr int MAX_SEGMENTS = 64;
constexpr int PAD = 8; // channels of a map are padded to a multiple, so that whole vectors are read and written

// A run of channels of every pixel of a row: element `k` of pixel `p` lies at data[p * stride + k].
struct Segment {
    const void *data;
    int64_t stride, length; // in elements
};

// Columns of a weight matrix that fit the registers: `slots` vectors, the last of them narrow where `tail`.
struct Panel {
    int32_t column, slots, tail;
    const void *weights; // [word of k][column], a word is one float, or a pair of bf16
    const float *bias;   // per column, zeros where there is none
};

// A weight matrix (out x in), packed.
struct Product {
    Panel *panels;
    int32_t num_panels, columns;
    int64_t depth; // sum of the segments' lengths
};

// How a product is applied to a row of pixels.
struct Job {
    Segment segments[MAX_SEGMENTS];
    int32_t num_segments = 0, activation = 0;
    const void *shortcut = nullptr; // added, or null; may be `out`
    void *out = nullptr;
    int64_t shortcut_stride = 0, out_stride = 0; // in elements
    int32_t out_float = 0;                       // `out` is float whatever the precision
};

// An activation: dense NHWC, `stride` elements a pixel; what lies beyond `channels` is written, and never matters.
struct Map {
    void *data;
    int64_t height, width, channels, stride;
};

// The channels that the next partial convolution reads, with a border of zeros: dense (H + 2b, W + 2b, Cp).
struct Plane {
    void *data;
    int64_t border, start, channels; // channels == 0: nobody reads it
};

struct BlockPlan {
    Product partial, expand, project; // of a partial convolution alone, the first
    int64_t kernel_size, start, partial_channels, hidden_stride, partial_stride;
    int32_t activation;
};

// Where a thread works: pixels [first, last) of the output map, with memory of its own.
struct Work {
    int64_t first, last, tile; // pixels; `tile` at a time
    void *partial, *hidden;    // (tile, partial_stride), (tile, hidden_stride)
};

// Pictures as they come: rows of `channels` planes (planar), or of pixels.
struct Picture {
    const void *data;
    int64_t height, width, channels;
    int32_t is_uint8, is_planar;
};

// The code of one instruction set in one precision.
struct Kernels {
    const char *isa, *precision;
    int32_t lanes, tail, word; // floats of a vector, of a narrow one (0: none); elements of a word
    int32_t max_slots;

    // The first embedding, from a picture; `rows` holds k converted rows where the picture is not what is computed in.
    void (*embed)(const Product *, int64_t k, const Picture *, const Map *out, const Plane *next, const Work *);
    void (*merge)(const Product *, int64_t k, const Map *in, const Map *out, const Plane *next, const Work *);
    void (*block)(const BlockPlan *, const Plane *current, const Map *, const Plane *next, const Work *);
    void (*pconv)(const BlockPlan *, const Plane *current, const Map *, const Plane *next, const Work *);
    void (*load)(const float *in, const Map *, const Plane *next, const Work *);
    void (*store)(const Map *, const float *scale, const float *shift, float *out, const Work *);
    void (*pool)(const Map *, void *out);
    void (*linear)(const Product *, const void *in, int64_t in_stride, void *out, int64_t out_stride, int32_t out_float,
                   int32_t activation, int64_t rows, int32_t first_panel, int32_t last_panel);
    double (*peak)(double seconds);

    // More than one: segments follow each other without a gap, and words of zeros fill up the last of so many inputs.
    int64_t depth_multiple = 1;
};

} // namespace fn
