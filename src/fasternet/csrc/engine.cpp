// The C interface: which code runs here, checks at the edge, errors as sentences.
#include "fasternet.h"

#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <system_error>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "network.h"

struct fn_network {
    fn::Network network;
};

namespace fn {

namespace portable { extern const Kernels FP32, BF16; }
namespace avx2 { extern const Kernels FP32; }
namespace avx512 { extern const Kernels FP32; }
namespace avx512_bf16 { extern const Kernels BF16; }
namespace amx { extern const Kernels BF16; }

namespace {

enum Needs { NOTHING, AVX2, AVX512, AVX512_BF16, AMX };

// By instruction set and precision, the fastest first.
struct Choice {
    const char *isa, *precision;
    const Kernels *kernels;
    Needs needs;
    const char *missing;
};

const Choice CHOICES[] = {
#if defined(FN_HAVE_AMX)
    {"amx", "bf16", &amx::BF16, AMX, "the processor has no AMX with bf16, or the system does not permit it"},
#endif
#if defined(FN_HAVE_AVX512_BF16)
    {"avx512_bf16", "bf16", &avx512_bf16::BF16, AVX512_BF16, "the processor has no AVX-512 with bf16"},
#endif
#if defined(FN_HAVE_AVX512)
    {"avx512", "fp32", &avx512::FP32, AVX512, "the processor has no AVX-512 (F, BW, DQ, VL)"},
#endif
#if defined(FN_HAVE_AVX2)
    {"avx2", "fp32", &avx2::FP32, AVX2, "the processor has no AVX2 with FMA"},
#endif
    {"portable", "fp32", &portable::FP32, NOTHING, nullptr},
    {"portable", "bf16", &portable::BF16, NOTHING, nullptr},
};

#if defined(__x86_64__)
bool permits_amx() {
#if defined(FN_EMULATE_TILES)
    return true; // nothing is asked of the processor
#endif
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILE) || !(d & BF16))
        return false;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

bool has(Needs needs) {
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const bool amx = bf16 && permits_amx();
    return needs == NOTHING || (needs == AVX2 && avx2) || (needs == AVX512 && avx512) || (needs == AVX512_BF16 && bf16) ||
           (needs == AMX && amx);
}
#else
bool has(Needs needs) { return needs == NOTHING; }
#endif

bool same(const char *a, const char *b) { return a && b && std::strcmp(a, b) == 0; }

const Choice *find(const char *isa, const char *precision) {
    for (const Choice &choice : CHOICES)
        if (same(choice.isa, isa) && same(choice.precision, precision))
            return &choice;
    return nullptr;
}

void check_layers(const fn_layer *layers, int32_t count) {
    if (count < 1)
        throw Refusal{"a network needs at least one layer"};
    for (int32_t i = 0; i < count; ++i) {
        const fn_layer &l = layers[i];
        const std::string name = "layer " + std::to_string(i);
        const bool partial = l.kind == FN_BLOCK || l.kind == FN_PCONV;
        if (l.kind < FN_PATCH || l.kind > FN_HEAD)
            throw Refusal{name + " is of unknown kind " + std::to_string(l.kind)};
        if (l.in_channels < 1 || l.out_channels < 1 || l.in_channels > (1 << 20) || l.out_channels > (1 << 20))
            throw Refusal{name + " must have from 1 to 2^20 channels"};
        if (i && l.in_channels != layers[i - 1].out_channels)
            throw Refusal{name + " takes " + std::to_string(l.in_channels) + " channels, the one before gives " +
                          std::to_string(layers[i - 1].out_channels)};
        if ((l.kind == FN_PATCH || partial) && (l.kernel_size < 1 || (partial && l.kernel_size % 2 == 0)))
            throw Refusal{name + " has a kernel_size of " + std::to_string(l.kernel_size) + ", which is not allowed"};
        if (l.kind == FN_PATCH && (i ? 1 : l.in_channels) * int64_t(l.kernel_size) > MAX_SEGMENTS)
            throw Refusal{name + " has too many channels or too large a kernel: their product may be 64 at most"};
        if (partial && (l.kernel_size > MAX_SEGMENTS || l.partial_channels < 1 || l.partial_start < 0 ||
                        int64_t(l.partial_start) + l.partial_channels > l.in_channels))
            throw Refusal{name + " convolves channels that it does not have, or with a kernel above 64"};
        if (l.kind == FN_HEAD && i + 1 != count)
            throw Refusal{name + " is a head, which must be the last layer"};
        if ((l.kind == FN_BLOCK || l.kind == FN_HEAD) && (l.hidden_channels < 1 || l.hidden_channels > (1 << 20)))
            throw Refusal{name + " must have from 1 to 2^20 hidden channels"};
        if (l.activation < FN_IDENTITY || l.activation > FN_GELU)
            throw Refusal{name + " has unknown activation " + std::to_string(l.activation)};
        const bool complete = l.kind == FN_FEATURE || (l.weight[0] && (l.kind != FN_BLOCK || (l.weight[1] && l.weight[2])));
        if (!complete)
            throw Refusal{name + " lacks weights"};
    }
}

template <class Action> int guard(char *message, int64_t size, Action action) {
    auto fail = [&](int status, const char *text) {
        if (message && size > 0)
            std::snprintf(message, size_t(size), "%s", text);
        return status;
    };
    try {
        action();
        return FN_OK;
    } catch (const Refusal &refusal) {
        return fail(FN_INVALID, refusal.message.c_str());
    } catch (const std::bad_alloc &) {
        return fail(FN_OUT_OF_MEMORY, "there is not enough memory for this network at this batch and size");
    } catch (const std::system_error &) {
        return fail(FN_OUT_OF_MEMORY, "the system starts no more threads");
    }
}

} // namespace
} // namespace fn

using namespace fn;

const char *fn_explain(const char *isa, const char *precision) {
    static const char *const SETS[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
    if (const Choice *choice = find(isa, precision))
        return has(choice->needs) ? nullptr : choice->missing;
    if (!same(precision, "fp32") && !same(precision, "bf16"))
        return "the precision is not one of fp32, bf16";
    for (const char *set : SETS)
        if (same(set, isa)) {
            const bool bf16 = same(set, "avx512_bf16") || same(set, "amx");
            if (bf16 != same(precision, "bf16"))
                return bf16 ? "this instruction set computes in bf16 alone" : "this instruction set computes in fp32 alone";
            return "the library was built without this instruction set";
        }
    return "the instruction set is not one of portable, avx2, avx512, avx512_bf16, amx";
}

const char *fn_select(const char *precision) {
    for (const Choice &choice : CHOICES)
        if (same(choice.precision, precision) && has(choice.needs) && !(same(precision, "bf16") && choice.needs == NOTHING))
            return choice.isa;
    return nullptr;
}

int32_t fn_interface(void) { return FN_INTERFACE; }

double fn_measure_peak(const char *isa, const char *precision, double seconds) {
    const Choice *choice = find(isa, precision);
    return choice && has(choice->needs) ? choice->kernels->peak(seconds) : 0.0;
}

int fn_create(const fn_layer *layers, int32_t num_layers, const char *isa, const char *precision, fn_network **network,
              char *message, int64_t size) {
    return guard(message, size, [&] {
        if (const char *reason = fn_explain(isa, precision))
            throw Refusal{reason};
        check_layers(layers, num_layers);
        *network = new fn_network{Network(layers, num_layers, *find(isa, precision)->kernels)};
    });
}

void fn_destroy(fn_network *network) { delete network; }

int32_t fn_num_outputs(const fn_network *network) { return network->network.num_outputs(); }

int fn_output_shape(const fn_network *network, const fn_input *input, int32_t output, int64_t shape[4], char *message,
                    int64_t size) {
    return guard(message, size, [&] { network->network.output_shape(*input, output, shape); });
}

int64_t fn_num_bytes(const fn_network *network) { return const_cast<fn_network *>(network)->network.num_bytes(); }

int fn_run(fn_network *network, const fn_input *input, float *const *outputs, int32_t threads, double *seconds,
           char *message, int64_t size) {
    return guard(message, size, [&] {
        if (threads < 1 || threads > 1024)
            throw Refusal{"threads must be from 1 to 1024, got " + std::to_string(threads)};
        network->network.run(*input, outputs, threads, seconds);
    });
}
