// Vectors of one instruction set, and the two arithmetics: fp32, and bf16 products summed in fp32.
//
// Included by isa.cpp alone, inside a namespace of that instruction set: the same inline function compiled with other
// flags must never be linked in its place.

#if defined(FN_ISA_AVX512) || defined(FN_ISA_AVX512_BF16) || defined(FN_ISA_AMX)
constexpr int LANES = 16, TAIL = 8, REGISTERS = 32;
#define REGISTERS_HOLD_TABLES 1
#elif defined(FN_ISA_AVX2)
constexpr int LANES = 8, TAIL = 4, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, TAIL = 0, REGISTERS = 32;
#else
constexpr int LANES = 4, TAIL = 0, REGISTERS = 16;
#endif
#if defined(FN_ISA_AVX512_BF16) || defined(FN_ISA_AMX)
#define FN_HAS_DPBF16 1
#endif

#if defined(__x86_64__)
#define FN_IN_REGISTER(x) "+v"(x)
#elif defined(__aarch64__)
#define FN_IN_REGISTER(x) "+w"(x)
#else
#define FN_IN_REGISTER(x) "+m"(x)
#endif

typedef uint16_t bf16;

template <int L> struct Vector;
#define FN_VECTOR(L)                                                                                                   \
    template <> struct Vector<L> {                                                                                     \
        typedef float F __attribute__((vector_size(4 * L)));                                                           \
        typedef uint32_t W __attribute__((vector_size(4 * L)));                                                        \
        typedef uint16_t H __attribute__((vector_size(2 * L)));                                                        \
        typedef uint8_t B __attribute__((vector_size(L)));                                                             \
    };
FN_VECTOR(4)
FN_VECTOR(8)
FN_VECTOR(16)
template <int L> using Floats = typename Vector<L>::F;
template <int L> using Words = typename Vector<L>::W;
template <int L> using Halves = typename Vector<L>::H;
template <int L> using Bytes = typename Vector<L>::B;

template <class V> inline V load_as(const void *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V> inline void store_as(void *p, V v) { __builtin_memcpy(p, &v, sizeof v); }

template <int L, class T> inline auto splat(T x) {
    using V = std::conditional_t<std::is_same_v<T, float>, Floats<L>, Words<L>>;
    if constexpr (L == 4)
        return V{x, x, x, x};
    else if constexpr (L == 8)
        return V{x, x, x, x, x, x, x, x};
    else
        return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

// Both keep NaN. The processor's minimum and maximum give their second operand then; compilers do not dare to use them.
template <class V> inline V at_least(V x, V low) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64)
        return (V)_mm512_max_ps((__m512)low, (__m512)x);
#endif
#if defined(__AVX__)
    if constexpr (sizeof(V) == 32)
        return (V)_mm256_max_ps((__m256)low, (__m256)x);
#endif
    return x < low ? low : x;
}
template <class V> inline V at_most(V x, V high) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64)
        return (V)_mm512_min_ps((__m512)high, (__m512)x);
#endif
#if defined(__AVX__)
    if constexpr (sizeof(V) == 32)
        return (V)_mm256_min_ps((__m256)high, (__m256)x);
#endif
    return x > high ? high : x;
}

template <int L> inline Floats<L> widen(Words<L> halves) { return (Floats<L>)(halves << 16); }

inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}

// Round to nearest even; NaN stays NaN.
template <int L> inline Words<L> round_to_bf16(Floats<L> x) {
    const Words<L> bits = (Words<L>)x;
    const Words<L> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x == x ? rounded : ((bits >> 16) | 0x40);
}

template <int L> inline Floats<L> load(const float *p) { return load_as<Floats<L>>(p); }
template <int L> inline Floats<L> load(const bf16 *p) {
#if defined(__AVX512F__)
    if constexpr (L == 16)
        return widen<L>((Words<L>)_mm512_cvtepu16_epi32(load_as<__m256i>(p)));
#endif
    return widen<L>(__builtin_convertvector(load_as<Halves<L>>(p), Words<L>));
}
template <int L> inline void store(float *p, Floats<L> x) { store_as(p, x); }
template <int L> inline void store(bf16 *p, Floats<L> x) {
#if defined(FN_HAS_DPBF16)
    if constexpr (L == 16)
        return store_as(p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
    if constexpr (L == 8)
        return store_as(p, (__m128i)_mm256_cvtneps_pbh((__m256)x));
#endif
    store_as(p, __builtin_convertvector(round_to_bf16<L>(x), Halves<L>));
}

// A word is what one step of a product reads of a pixel and of a column: a float, or two neighbouring bf16.
struct Fp32 {
    using Element = float;
    using Word = float;
    static constexpr int UNIT = 1;
    template <int L> using Weights = Floats<L>;
    static inline Word read(const Element *p) { return *p; }
    static inline Word read_last(const Element *p) { return *p; }
    template <int L> static inline auto spread(Word x) { return splat<L>(x); }
    template <int L> static inline Floats<L> multiply_add(Floats<L> x, Weights<L> w, Floats<L> sum) {
        return sum + x * w;
    }
};

struct Bf16 {
    using Element = bf16;
    using Word = uint32_t;
    static constexpr int UNIT = 2;
    template <int L> using Weights = Words<L>;
    static inline Word read(const Element *p) {
        Word x;
        __builtin_memcpy(&x, p, 4);
        return x;
    }
    static inline Word read_last(const Element *p) { return *p; } // its partner is zero
    template <int L> static inline auto spread(Word x) { return splat<L>(x); }
    template <int L> static inline Floats<L> multiply_add(Words<L> x, Weights<L> w, Floats<L> sum) {
#if defined(FN_HAS_DPBF16)
        if constexpr (L == 16)
            return (Floats<L>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
        if constexpr (L == 8)
            return (Floats<L>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)x, (__m256bh)w);
#endif
        const Words<L> high = splat<L>(uint32_t(0xffff0000));
        sum += (Floats<L>)(x & high) * (Floats<L>)(w & high);
        return sum + (Floats<L>)(x << 16) * (Floats<L>)(w << 16);
    }
};

// GELU = x / 2 (1 + erf(x / sqrt 2)), erf as z p(z^2) with z = x cut to [-R, R], p a polynomial in t = 2 z^2 / R^2 - 1,
// fitted for the least largest error of GELU itself: at most 3e-7 (1 + |x|) of degree 12, 1.2e-4 (1 + |x|) of degree 6,
// a tenth of what rounding to bf16 costs. GELU(-inf) is NaN, as in PyTorch.
template <int L, bool EXACT> inline Floats<L> gelu_polynomial(Floats<L> x) {
    using V = Floats<L>;
    constexpr float R = EXACT ? 5.0f : 4.0f;
    const V z = at_most<V>(at_least<V>(x, splat<L>(-R)), splat<L>(R));
    const V t = z * z * splat<L>(2 / (R * R)) - splat<L>(1.0f);
    constexpr float exact[] = {
        0.282727569f, -0.140593305f, 0.103042841f, -0.0808658972f, 0.0628524572f, -0.0466734618f, 0.0329953134f,
        -0.0219464637f, 0.012330859f, -0.00583134685f, 0.00400372269f, -0.00302830711f, 0.000985938124f};
    constexpr float rough[] = {
        0.351940423f, -0.168853238f, 0.110820383f, -0.0709246993f, 0.0481821224f, -0.0331017748f, 0.0119440435f};
    constexpr int degree = EXACT ? 12 : 6;
    const float *c = EXACT ? exact : rough;
    V p = splat<L>(c[degree]);
#pragma GCC unroll 12
    for (int i = degree - 1; i >= 0; --i)
        p = p * t + splat<L>(c[i]);
    const V phi = z * p * splat<L>(0.5f) + splat<L>(0.5f);
    return x * (x < splat<L>(-R) ? splat<L>(0.0f) : phi);
}

#if defined(REGISTERS_HOLD_TABLES)
// GELU = x / 2 + |x| (Phi(|x|) - 1/2), the latter from a table of 16 polynomials: 10.6 cycles for a vector on Zen 4,
// the polynomial above takes 18.5. The error is at most 1.1e-7 (1 + |x|), in rough 2e-5 (1 + |x|).
template <bool EXACT> inline Floats<16> gelu_table(Floats<16> x) {
    constexpr int DEGREE = EXACT ? 4 : 2;
    constexpr float WIDTH = EXACT ? EXACT_WIDTH : ROUGH_WIDTH;
    const auto &table = []() -> auto & {
        if constexpr (EXACT)
            return PHI.exact;
        else
            return PHI.rough;
    }();
    const Floats<16> size = (Floats<16>)_mm512_abs_ps((__m512)x);
    const Floats<16> position = at_most(size * splat<16>(1 / WIDTH), splat<16>(PIECES - 1.0f));
    const Floats<16> f = (Floats<16>)_mm512_reduce_ps((__m512)position, 0); // less the nearest integer
    const __m512i piece = _mm512_cvtps_epi32((__m512)position);
    auto look_up = [&](int i) { return (Floats<16>)_mm512_permutexvar_ps(piece, _mm512_load_ps(table[i])); };
    Floats<16> p = look_up(DEGREE);
#pragma GCC unroll 4
    for (int i = DEGREE - 1; i >= 0; --i)
        p = p * f + look_up(i);
    return x * splat<16>(0.5f) + size * p;
}
#endif

template <int L, bool EXACT> inline Floats<L> gelu(Floats<L> x) {
#if defined(REGISTERS_HOLD_TABLES)
    if constexpr (L == 16) {
        return gelu_table<EXACT>(x);
    } else {
        const Floats<16> wide = gelu_table<EXACT>((Floats<16>)_mm512_castps256_ps512((__m256)x));
        return load_as<Floats<L>>(&wide);
    }
#else
    return gelu_polynomial<L, EXACT>(x);
#endif
}
