/* The CPU engine's C interface: a network is a list of layers, given once, run many times.
 *
 * Activations between layers are NHWC. Every pointer is the caller's; weights are copied (packed) by fn_create.
 * Functions that can fail return 0, or an fn_status and one sentence in `message` (NUL-terminated, cut to `size`).
 */
#ifndef FASTERNET_H
#define FASTERNET_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FN_API __attribute__((visibility("default")))
#define FN_INTERFACE 2 /* raised with every change of this file */

enum fn_status { FN_OK = 0, FN_INVALID = 1, FN_OUT_OF_MEMORY = 2 };
enum fn_kind {
    FN_PATCH = 0,   /* embedding, merging: k x k convolution with stride k, plus bias */
    FN_BLOCK = 1,   /* FasterNet block: x + W2 * act(W1 * pconv(x) + b1) + b2 */
    FN_PCONV = 2,   /* partial convolution alone */
    FN_FEATURE = 3, /* gives the map to the caller, maybe times a scale plus a shift; the trunk goes on without it */
    FN_HEAD = 4     /* global average pooling, linear, activation, and a classifier where there is one */
};
enum fn_activation { FN_IDENTITY = 0, FN_RELU = 1, FN_GELU = 2 };
enum fn_dtype { FN_FLOAT32 = 0, FN_UINT8 = 1 };
enum fn_layout { FN_NCHW = 0, FN_NHWC = 1 };

/* One layer. Weights are float32 and dense, in PyTorch's order; a pointer that is not named is NULL.
 * Channels are from 1 to 2^20. An embedding's kernel_size * in_channels is at most 64; a merging's kernel_size is, and
 * its square where in_channels is not a multiple of 8.
 *   FN_PATCH    weight[0] (out, in, k, k), bias[0] (out) or NULL; in the first layer mean, std (in) or NULL: what a
 *               uint8 picture, divided by 255, is normalised with (NULL: a uint8 picture is refused)
 *   FN_BLOCK    weight[0] (Cp, Cp, k, k), weight[1] (hidden, C), bias[1] or NULL, weight[2] (C, hidden), bias[2] or
 *               NULL; out_channels == in_channels; padding k / 2, k odd
 *   FN_PCONV    weight[0] (Cp, Cp, k, k); out_channels == in_channels
 *   FN_FEATURE  weight[0] (C) or NULL, bias[0] (C) or NULL; out_channels == in_channels
 *   FN_HEAD     weight[0] (hidden, C), bias[0] or NULL; weight[1] (out, hidden) or NULL (then out == hidden),
 *               bias[1] (out) or NULL; activation is after the first
 */
typedef struct {
    int32_t kind, in_channels, out_channels, hidden_channels;
    int32_t kernel_size, partial_channels, partial_start, activation;
    const float *weight[3], *bias[3], *mean, *std;
} fn_layer;

typedef struct {
    const void *data; /* dense; uint8 is NHWC or NCHW as float32 is */
    int32_t dtype, layout;
    int64_t n, c, h, w;
} fn_input;

typedef struct fn_network fn_network;

/* Which instruction sets there are: portable, avx2, avx512, avx512_bf16, amx. NULL where `isa` can run here in
 * `precision` ("fp32", "bf16"), else one sentence why not, with static storage. */
FN_API const char *fn_explain(const char *isa, const char *precision);
/* The fastest that runs here in a precision, or NULL: bf16 is never emulated unless portable is asked for. */
FN_API const char *fn_select(const char *precision);
FN_API int32_t fn_interface(void);
/* SHA-256 of the sources that the library was built from (CMakeLists.txt). */
FN_API const char *fn_source(void);

/* Multiply-adds per second of one core in registers: the floor under every latency. Runs for about `seconds`. */
FN_API double fn_measure_peak(const char *isa, const char *precision, double seconds);

/* An input of the first layer FN_PATCH is a batch of pictures; of any other kind, a map, float32 and NHWC. */
FN_API int fn_create(const fn_layer *layers, int32_t num_layers, const char *isa, const char *precision,
                     fn_network **network, char *message, int64_t size);
FN_API void fn_destroy(fn_network *network);

/* Outputs are the FN_FEATURE layers in order, float32 NHWC (N, H, W, C), and FN_HEAD, float32 (N, out): shape is
 * (N, H, W, C) or (N, 1, 1, out). */
FN_API int32_t fn_num_outputs(const fn_network *network);
FN_API int fn_output_shape(const fn_network *network, const fn_input *input, int32_t output, int64_t shape[4],
                           char *message, int64_t size);
FN_API int64_t fn_num_bytes(const fn_network *network); /* packed weights and buffers, now */

/* Run a batch. Calls of one network from several threads wait for each other; several networks do not.
 * `seconds` (num_layers) or NULL: where the time went; the time of all threads, divided by their number. */
FN_API int fn_run(fn_network *network, const fn_input *input, float *const *outputs, int32_t threads, double *seconds,
                  char *message, int64_t size);

#ifdef __cplusplus
}
#endif
#endif
