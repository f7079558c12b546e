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
#if defined(FN_EMULATE_TILES)
bool permits_amx() { return true; } // nothing is asked of the processor
#else
bool permits_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILE) || !(d & BF16))
        return false;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

bool has(Needs needs) {
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const bool amx = bf16 && permits_amx();
    return needs == NOTHING || (needs == AVX2 && avx2) || (needs == AVX512 && avx512) ||
           (needs == AVX512_BF16 && bf16) || (needs == AMX && amx);
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

constexpr int64_t MOST_CHANNELS = 1 << 20;

// Throw what names the value and what is allowed.
void check_range(const std::string &name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
        throw Refusal{name + " must be from " + std::to_string(low) + " to " + std::to_string(high) + ", not " +
                      std::to_string(value)};
}

void check_kernel(const fn_layer &l, bool first, const std::string &name) {
    const int64_t k = l.kernel_size;
    const std::string what = name + " has kernel_size " + std::to_string(k);
    if (l.kind != FN_PATCH) {
        if (k < 1 || k >= MAX_SEGMENTS || k % 2 == 0)
            throw Refusal{what + ": it must be odd and from 1 to " + std::to_string(MAX_SEGMENTS - 1)};
        check_range(name + " partial_channels", l.partial_channels, 1, l.in_channels);
        check_range(name + " partial_start", l.partial_start, 0, l.in_channels - l.partial_channels);
        return;
    }
    check_range(name + " kernel_size", k, 1, MAX_SEGMENTS);
    if (first && k * l.in_channels > MAX_SEGMENTS)
        throw Refusal{what + " and " + std::to_string(l.in_channels) + " channels: their product may be " +
                      std::to_string(MAX_SEGMENTS) + " at most in the first layer"};
    if (!first && l.in_channels % PAD && k * k > MAX_SEGMENTS)
        throw Refusal{what + " and " + std::to_string(l.in_channels) + " channels, not a multiple of " +
                      std::to_string(PAD) + ": the square of kernel_size may then be " + std::to_string(MAX_SEGMENTS) +
                      " at most"};
}

void check_layer(const fn_layer &l, bool first, const std::string &name) {
    const bool partial = l.kind == FN_BLOCK || l.kind == FN_PCONV;
    check_range(name + " kind", l.kind, FN_PATCH, FN_HEAD);
    check_range(name + " in_channels", l.in_channels, 1, MOST_CHANNELS);
    check_range(name + " out_channels", l.out_channels, 1, MOST_CHANNELS);
    check_range(name + " activation", l.activation, FN_IDENTITY, FN_GELU);
    if (l.kind == FN_BLOCK || l.kind == FN_HEAD)
        check_range(name + " hidden_channels", l.hidden_channels, 1, MOST_CHANNELS);
    if ((partial || l.kind == FN_FEATURE) && l.out_channels != l.in_channels)
        throw Refusal{name + " must have out_channels equal to its in_channels, " + std::to_string(l.in_channels) +
                      ", not " + std::to_string(l.out_channels)};
    if (l.kind == FN_HEAD && !l.weight[1] && l.out_channels != l.hidden_channels)
        throw Refusal{name + " has no second weight: its out_channels must equal its hidden_channels, " +
                      std::to_string(l.hidden_channels) + ", not be " + std::to_string(l.out_channels)};
    if (l.kind == FN_PATCH || partial)
        check_kernel(l, first, name);
    const int weights = l.kind == FN_FEATURE ? 0 : l.kind == FN_BLOCK ? 3 : 1;
    for (int i = 0; i < weights; ++i)
        if (!l.weight[i])
            throw Refusal{name + " lacks weight[" + std::to_string(i) + "]"};
}

void check_layers(const fn_layer *layers, int32_t count) {
    if (count < 1)
        throw Refusal{"a network needs at least one layer, not " + std::to_string(count)};
    for (int32_t i = 0; i < count; ++i) {
        const std::string name = "layer " + std::to_string(i);
        check_layer(layers[i], i == 0, name);
        if (i && layers[i].in_channels != layers[i - 1].out_channels)
            throw Refusal{name + " takes " + std::to_string(layers[i].in_channels) +
                          " channels, the one before gives " + std::to_string(layers[i - 1].out_channels)};
        if (layers[i].kind == FN_HEAD && i + 1 != count)
            throw Refusal{name + " is a head, which must be the last of " + std::to_string(count) + " layers"};
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
    } catch (...) {
        return fail(FN_INVALID, "the CPU engine failed for a reason that it does not know");
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
                return bf16 ? "it computes in bf16 alone" : "it computes in fp32 alone";
            return "the library was built without it, by a compiler that does not know it or for another processor";
        }
    return "the instruction set is not one of portable, avx2, avx512, avx512_bf16, amx";
}

const char *fn_select(const char *precision) {
    for (const Choice &choice : CHOICES)
        if (same(choice.precision, precision) && has(choice.needs)) {
            const bool emulated = same(precision, "bf16") && choice.needs == NOTHING;
            return emulated ? nullptr : choice.isa;
        }
    return nullptr;
}

int32_t fn_interface(void) { return FN_INTERFACE; }

const char *fn_source(void) { return FN_SOURCE; }

double fn_measure_peak(const char *isa, const char *precision, double seconds) {
    const Choice *choice = find(isa, precision);
    return choice && has(choice->needs) ? choice->kernels->peak(seconds) : 0.0;
}

int fn_create(const fn_layer *layers, int32_t num_layers, const char *isa, const char *precision, fn_network **network,
              char *message, int64_t size) {
    return guard(message, size, [&] {
        if (const char *reason = fn_explain(isa, precision))
            throw Refusal{"instruction set " + std::string(isa ? isa : "NULL") + " cannot compute in " +
                          (precision ? precision : "NULL") + ": " + reason};
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

int64_t fn_num_bytes(const fn_network *network) { return network->network.num_bytes(); }

int fn_run(fn_network *network, const fn_input *input, float *const *outputs, int32_t threads, double *seconds,
           char *message, int64_t size) {
    return guard(message, size, [&] {
        if (threads < 1 || threads > 1024)
            throw Refusal{"threads must be from 1 to 1024, not " + std::to_string(threads)};
        network->network.run(*input, outputs, threads, seconds);
    });
}
