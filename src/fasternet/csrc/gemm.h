// The micro-kernel: up to MAX_ROWS pixels times one panel of weights, sums in registers over the whole depth.
//
// A row's channels come from a few segments of memory, each read where it lies. The sums start from the bias, or from
// the shortcut and the bias; the activation is applied before they are written.

// Pixels whose sums fit the registers beside a panel's weights, by slots.
constexpr int ROWS_32[] = {0, 14, 14, 9, 7}, ROWS_16[] = {0, 8, 6, 4, 0};
constexpr int SLOTS = REGISTERS == 32 ? 4 : 3;
constexpr int MAX_ROWS = 14;
constexpr int count_rows(int slots) { return REGISTERS == 32 ? ROWS_32[slots] : ROWS_16[slots]; }

template <int ROWS, int FULL, int NARROW> struct Sums {
    Floats<LANES> full[ROWS][FULL ? FULL : 1];
    Floats<NARROW ? TAIL : LANES> narrow[ROWS];
};

template <class A, int ROWS, int FULL, int NARROW>
inline void step(Sums<ROWS, FULL, NARROW> &sums, const typename A::Word *words, const char *weights) {
    constexpr int N = NARROW ? TAIL : LANES;
    typename A::template Weights<LANES> w[FULL ? FULL : 1];
    typename A::template Weights<N> v;
#pragma GCC unroll 4
    for (int j = 0; j < FULL; ++j)
        w[j] = load_as<typename A::template Weights<LANES>>(weights + 4 * LANES * j);
    if constexpr (NARROW)
        v = load_as<typename A::template Weights<N>>(weights + 4 * LANES * FULL);
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; ++i) {
        const auto x = A::template spread<LANES>(words[i]);
#pragma GCC unroll 4
        for (int j = 0; j < FULL; ++j)
            sums.full[i][j] = A::template multiply_add<LANES>(x, w[j], sums.full[i][j]);
        if constexpr (NARROW)
            sums.narrow[i] =
                A::template multiply_add<N>(load_as<typename A::template Weights<N>>(&x), v, sums.narrow[i]);
    }
}

template <class A, int ROWS, int FULL, int NARROW> inline void accumulate(
    Sums<ROWS, FULL, NARROW> &sums, const Job &job, const char *weights, int64_t first, const char *ahead) {
    using Element = typename A::Element;
    constexpr int64_t BYTES = 4 * (LANES * FULL + (NARROW ? TAIL : 0)); // of a word of every column
    for (int s = 0; s < job.num_segments; ++s) {
        const Segment &segment = job.segments[s];
        const Element *rows[ROWS];
#pragma GCC unroll 14
        for (int i = 0; i < ROWS; ++i)
            rows[i] = (const Element *)segment.data + (first + i) * segment.stride;
        int64_t k = 0;
        for (; k + A::UNIT <= segment.length; k += A::UNIT) {
            typename A::Word words[ROWS];
#pragma GCC unroll 14
            for (int i = 0; i < ROWS; ++i)
                words[i] = A::read(rows[i] + k);
            __builtin_prefetch(ahead, 0, 2);
            ahead += 64;
            step<A, ROWS, FULL, NARROW>(sums, words, weights);
            weights += BYTES;
        }
        if (A::UNIT > 1 && k < segment.length) {
            typename A::Word words[ROWS];
#pragma GCC unroll 14
            for (int i = 0; i < ROWS; ++i)
                words[i] = A::read_last(rows[i] + k);
            step<A, ROWS, FULL, NARROW>(sums, words, weights);
            weights += BYTES;
        }
    }
}

template <int L, class T>
inline void begin(Floats<L> &sum, const Job &job, const float *bias, int64_t row, int64_t column) {
    sum = load<L>(bias);
    if (job.shortcut)
        sum += load<L>((const T *)job.shortcut + row * job.shortcut_stride + column);
}

template <int L, class A> inline void finish(Floats<L> sum, const Job &job, int64_t row, int64_t column) {
    using Element = typename A::Element;
    if (job.activation == 1)
        sum = at_least<Floats<L>>(sum, splat<L>(0.0f));
    if (job.out_float)
        store<L>((float *)job.out + row * job.out_stride + column, sum);
    else
        store<L>((Element *)job.out + row * job.out_stride + column, sum);
}

template <class A, int ROWS, int FULL, int NARROW>
void multiply(const Job &job, const Panel &panel, int64_t first, const char *ahead) {
    using Element = typename A::Element;
    constexpr int N = NARROW ? TAIL : LANES;
    Sums<ROWS, FULL, NARROW> sums;
    const int64_t column = panel.column, last = column + LANES * FULL;
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < FULL; ++j)
            begin<LANES, Element>(sums.full[i][j], job, panel.bias + LANES * j, first + i, column + LANES * j);
        if constexpr (NARROW)
            begin<N, Element>(sums.narrow[i], job, panel.bias + LANES * FULL, first + i, last);
    }
    accumulate<A, ROWS, FULL, NARROW>(sums, job, (const char *)panel.weights, first, ahead);
    if (job.activation == 2) { // through memory: unrolled over all sums, the polynomial would not fit the code cache
        const Sums<ROWS, FULL, NARROW> kept = sums;
#pragma GCC unroll 1
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 1
            for (int j = 0; j < FULL; ++j)
                finish<LANES, A>(gelu<LANES, A::UNIT == 1>(kept.full[i][j]), job, first + i, column + LANES * j);
            if constexpr (NARROW)
                finish<N, A>(gelu<N, A::UNIT == 1>(kept.narrow[i]), job, first + i, last);
        }
        return;
    }
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < FULL; ++j)
            finish<LANES, A>(sums.full[i][j], job, first + i, column + LANES * j);
        if constexpr (NARROW)
            finish<N, A>(sums.narrow[i], job, first + i, last);
    }
}

using Kernel = void (*)(const Job &, const Panel &, int64_t first, const char *ahead);

template <class A, int FULL, int NARROW, int... I> constexpr void fill(Kernel *row, std::integer_sequence<int, I...>) {
    ((row[I + 1] = multiply<A, I + 1, FULL, NARROW>), ...);
}

// Kernels by slots, narrow or not, and rows.
template <class A> struct KernelTable {
    Kernel at[SLOTS + 1][2][MAX_ROWS + 1] = {};
    constexpr KernelTable() {
        add<1>(), add<2>(), add<3>();
        if constexpr (SLOTS > 3)
            add<4>();
    }
    template <int S> constexpr void add() {
        fill<A, S, 0>(at[S][0], std::make_integer_sequence<int, count_rows(S)>());
        if constexpr (TAIL > 0)
            fill<A, S - 1, 1>(at[S][1], std::make_integer_sequence<int, count_rows(S)>());
    }
};
template <class A> inline constexpr KernelTable<A> KERNELS{};

// Weights that are too many to stay in the L2 cache are fetched ahead: a line for each step of the panel
// before. Measured: half a percent of T1 and T2; more lines at once, or smaller weights too, make it slower.
constexpr int64_t AHEAD_BYTES = 256 << 10;

// Apply panels [first_panel, last_panel) to pixels [first, last). A panel stays in the cache while the pixels pass.
template <class A>
inline void apply(const Product &product, const Job &job, int64_t first, int64_t last, int first_panel,
                  int last_panel) {
    for (int n = first_panel; n < last_panel; ++n) {
        const Panel &panel = product.panels[n];
        const int64_t most = count_rows(panel.slots), groups = (last - first + most - 1) / most;
        const int64_t words = (product.depth + A::UNIT - 1) / A::UNIT;
        const int64_t bytes = 4 * words * (panel.slots * LANES - (panel.tail ? LANES - TAIL : 0));
        const bool large = bytes * product.num_panels > AHEAD_BYTES;
        const char *next = (const char *)panel.weights + bytes, *end = next + bytes;
        int64_t row = first;
        for (int64_t g = groups; g > 0; --g) { // groups as equal as they can be
            const int64_t rows = (last - row + g - 1) / g;
            const char *ahead = large && next < end ? next : (const char *)panel.weights;
            KERNELS<A>.at[panel.slots][panel.tail][rows](job, panel, row, ahead);
            next += 64 * words;
            row += rows;
        }
    }
}

template <class A> inline void apply(const Product &product, const Job &job, int64_t first, int64_t last) {
    apply<A>(product, job, first, last, 0, product.num_panels);
}
