// The code of one instruction set. Compiled once for each, with that set's flags and one of FN_ISA_*.
#include <stdint.h>
#include <time.h>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // its own header begins with an undefined value on purpose
#endif
#include <immintrin.h>
#endif

#include "gelu.h"
#include "plan.h"

#if defined(FN_ISA_PORTABLE)
#define FN_NAMESPACE portable
#elif defined(FN_ISA_AVX2)
#define FN_NAMESPACE avx2
#elif defined(FN_ISA_AVX512)
#define FN_NAMESPACE avx512
#elif defined(FN_ISA_AVX512_BF16)
#define FN_NAMESPACE avx512_bf16
#elif defined(FN_ISA_AMX)
#define FN_NAMESPACE amx
#endif
#define FN_STRING(x) FN_QUOTE(x)
#define FN_QUOTE(x) #x

namespace fn::FN_NAMESPACE {

inline double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

#include "vec.h"

#include "gemm.h"

#include "layers.h"

#if defined(FN_ISA_AMX)
#include "amx.h"
extern constinit const Kernels BF16 = create_tile_kernels(FN_STRING(FN_NAMESPACE));
#elif defined(FN_HAS_DPBF16)
extern constinit const Kernels BF16 = create_kernels<Bf16>(FN_STRING(FN_NAMESPACE), "bf16");
#else
extern constinit const Kernels FP32 = create_kernels<Fp32>(FN_STRING(FN_NAMESPACE), "fp32");
#if defined(FN_ISA_PORTABLE)
extern constinit const Kernels BF16 = create_kernels<Bf16>(FN_STRING(FN_NAMESPACE), "bf16");
#endif
#endif

} // namespace fn::FN_NAMESPACE
