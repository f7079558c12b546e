// Products in bf16 on AMX tiles: 32 pixels x 32 columns of sums in four tiles, 32 channels a step.
//
// The time of a tile product is its rows of pixels, so that pixels are split into tiles of equal height; channels and
// columns are padded. Pixels are read where they lie if whole steps lie there, else they are gathered first. Sums come
// back through memory; the vectors that add bias and shortcut to them work while the tiles multiply what follows.
// Instructions are written out: some compilers' intrinsics let stores pass the tile loads that depend on them.

constexpr int64_t TILE_DEPTH = 32;       // bf16 of a tile's row
constexpr int64_t TILE_ROWS = 16;        // at most
constexpr int64_t GATHERED_DEPTH = 1152; // at a time: lies on the stack
constexpr int FIRST_OPERAND = 4, FIRST_WEIGHTS = 6; // tiles 0 to 3 are sums

// What LDTILECFG reads.
struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

#if defined(FN_EMULATE_TILES)
// The instructions in plain C++, for processors without them: the same shapes, the same sums in the same order; what
// the processor would refuse, traps. Denormals are flushed by whoever calls.
struct EmulatedTiles {
    TileShapes shapes;
    alignas(64) char data[8][TILE_ROWS][64];
};
static thread_local EmulatedTiles TILES;

inline void check_tile(bool allowed) {
    if (!allowed)
        __builtin_trap();
}
inline void tile_configure(const TileShapes &shapes) {
    TILES = EmulatedTiles{shapes, {}};
    check_tile(shapes.palette == 1 && shapes.start_row == 0);
    for (int t = 0; t < 8; ++t)
        check_tile(shapes.rows[t] <= TILE_ROWS && shapes.bytes[t] <= 64 && !shapes.rows[t] == !shapes.bytes[t]);
}
inline void tile_release() { TILES = {}; }
template <int T> inline void tile_zero() {
    check_tile(TILES.shapes.rows[T] > 0);
    __builtin_memset(TILES.data[T], 0, sizeof TILES.data[T]);
}
template <int T> inline void tile_load(const void *from, int64_t stride) {
    tile_zero<T>();
    for (int i = 0; i < TILES.shapes.rows[T]; ++i)
        __builtin_memcpy(TILES.data[T][i], (const char *)from + i * stride, TILES.shapes.bytes[T]);
}
template <int T> inline void tile_store(void *to, int64_t stride) {
    check_tile(TILES.shapes.rows[T] > 0);
    for (int i = 0; i < TILES.shapes.rows[T]; ++i)
        __builtin_memcpy((char *)to + i * stride, TILES.data[T][i], TILES.shapes.bytes[T]);
}
// Even and odd channels are summed apart from zero on, then both added to the sum.
template <int SUM, int A, int B> inline void tile_multiply() {
    const TileShapes &shapes = TILES.shapes;
    const int rows = shapes.rows[SUM], words = shapes.rows[B], columns = shapes.bytes[SUM] / 4;
    check_tile(rows > 0 && shapes.rows[A] == rows && shapes.bytes[A] == 4 * words && shapes.bytes[B] == 4 * columns);
    for (int i = 0; i < rows; ++i) {
        float even[16] = {}, odd[16] = {}, sum[16];
        for (int k = 0; k < words; ++k) {
            bf16 x[2], w[32];
            __builtin_memcpy(x, TILES.data[A][i] + 4 * k, 4);
            __builtin_memcpy(w, TILES.data[B][k], 64);
            const float low = widen(x[0]), high = widen(x[1]);
            for (int j = 0; j < columns; ++j) {
                even[j] = __builtin_fmaf(low, widen(w[2 * j]), even[j]);
                odd[j] = __builtin_fmaf(high, widen(w[2 * j + 1]), odd[j]);
            }
        }
        __builtin_memcpy(sum, TILES.data[SUM][i], 64);
        for (int j = 0; j < columns; ++j)
            sum[j] += even[j] + odd[j];
        __builtin_memcpy(TILES.data[SUM][i], sum, 64);
    }
}
#else
inline void tile_configure(const TileShapes &shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void tile_release() { asm volatile("tilerelease"); }
template <int T> inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> inline void tile_load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T> inline void tile_store(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}
template <int SUM, int A, int B> inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}
#endif

// Rows of the tiles that this thread has set up, 0: none. Setting up costs as much as three steps.
static thread_local int64_t TILE_HEIGHT = 0;

inline void set_tile_height(int64_t rows) {
    if (TILE_HEIGHT == rows)
        return;
    TileShapes shapes{};
    shapes.palette = 1;
    for (int t = 0; t < 8; ++t)
        shapes.bytes[t] = 64, shapes.rows[t] = uint8_t(t < FIRST_WEIGHTS ? rows : TILE_DEPTH / 2);
    tile_configure(shapes);
    TILE_HEIGHT = rows;
}

// A function of `Kernels` whose thread gives its tiles back at the end: they would slow every switch of threads.
template <auto FUNCTION> struct WithTiles;
template <class... Arguments, void (*FUNCTION)(Arguments...)> struct WithTiles<FUNCTION> {
    static void call(Arguments... arguments) {
        FUNCTION(arguments...);
        if (TILE_HEIGHT)
            tile_release();
        TILE_HEIGHT = 0;
    }
};

// The arithmetic: that of Bf16 but for `apply`. Also for few pixels: what comes out must not depend on how many come.
struct Tiles : Bf16 {};

// Pixels that are not all `stride` apart: after the first width - x, and every `width` from there on, `jump` more
// elements.
struct Lines {
    int64_t x, width, jump;
};
constexpr Lines ONE_LINE = {0, INT64_MAX, 0};

// Sums of two tiles' height of pixels and one or two tiles of columns, on their way from tiles to the output.
struct Sums32 {
    const Panel *panel;
    int slot, slots;
    int64_t first, rows, finished;
    alignas(64) float data[2 * TILE_ROWS][32]; // with one slot, two halves of its sums
};

template <int L, bool GELU>
inline void finish_slot(const Job &job, const Sums32 &sums, int j, int64_t first, int64_t last) {
    Job to; // a copy in registers: for all that the compiler knows, what is written might lie in `job`
    to.activation = job.activation, to.out = job.out, to.out_stride = job.out_stride, to.out_float = job.out_float;
    to.shortcut = job.shortcut, to.shortcut_stride = job.shortcut_stride;
    const int slot = sums.slot + j;
    const float *data = sums.data[first] + 16 * j, *bias = sums.panel->bias + 16 * slot;
    const int64_t column = sums.panel->column + 16 * slot, shift = sums.first;
    const bool halves = sums.slots == 1;
    for (int64_t row = first; row < last; ++row, data += 32) {
        Floats<L> sum;
        begin<L, bf16>(sum, to, bias, shift + row, column);
        sum += halves ? load<L>(data) + load<L>(data + 16) : load<L>(data);
        finish<L, Tiles>(GELU ? gelu<L, false>(sum) : sum, to, shift + row, column);
    }
}

template <bool GELU> inline void finish_rows(const Job &job, const Sums32 &sums, int64_t first, int64_t last) {
    const bool narrow = sums.panel->tail && sums.slot + sums.slots == sums.panel->slots;
    const int full = sums.slots - narrow;
    for (int j = 0; j < full; ++j)
        finish_slot<16, GELU>(job, sums, j, first, last);
    if (narrow)
        finish_slot<8, GELU>(job, sums, full, first, last);
}

// Give up to `rows` more to the output. Not inlined: the loop of tiles stays small.
__attribute__((noinline)) static void finish_some(const Job &job, Sums32 &sums, int64_t rows) {
    const int64_t first = sums.finished, last = first + rows < sums.rows ? first + rows : sums.rows;
    if (first == last)
        return;
    if (job.activation == 2)
        finish_rows<true>(job, sums, first, last);
    else
        finish_rows<false>(job, sums, first, last);
    sums.finished = last;
}

// Copy channels [begin, end) of pixels [first, last), zeros after them, into rows of `pitch`; of the room behind each
// row, a vector is overwritten.
inline void gather(const Job &job, const Lines &lines, int64_t first, int64_t last, int64_t begin, int64_t end,
                   bf16 *to, int64_t pitch) {
    int64_t x = (lines.x + first) % lines.width, jumped = (lines.x + first) / lines.width * lines.jump;
    for (int64_t p = first; p < last; ++p, to += pitch) {
        int64_t at = -begin; // of the segment in `to`
        for (int s = 0; s < job.num_segments && at < end - begin; at += job.segments[s++].length) {
            const Segment &segment = job.segments[s];
            const bf16 *from = (const bf16 *)segment.data + p * segment.stride + jumped;
            const int64_t stop = segment.length < end - begin - at ? segment.length : end - begin - at;
            for (int64_t k = at < 0 ? -at : 0; k < stop; k += TILE_DEPTH) {
                const __mmask32 mask = stop - k < TILE_DEPTH ? (1u << (stop - k)) - 1 : ~0u;
                _mm512_storeu_si512(to + at + k, _mm512_maskz_loadu_epi16(mask, from + k));
            }
        }
        _mm512_storeu_si512(to + (end - begin), _mm512_setzero_si512());
        if (++x == lines.width)
            x = 0, jumped += lines.jump;
    }
}

// One step of 32 channels; with one tile of columns, steps alternate between two sets of sums, which would else wait
// for themselves.
template <int COLUMNS, int SET>
inline void multiply_tiles(const char *x, int64_t stride, int64_t height, const char *weights, int64_t pitch) {
    constexpr int A = FIRST_OPERAND, B = FIRST_WEIGHTS;
    tile_load<B + SET>(weights, pitch);
    tile_load<A>(x, stride);
    tile_multiply<SET, A, B + SET>();
    if constexpr (COLUMNS == 2) {
        tile_load<B + 1>(weights + 64, pitch);
        tile_multiply<1, A, B + 1>();
    }
    tile_load<A + 1>(x + height * stride, stride);
    tile_multiply<2 + SET, A + 1, B + SET>();
    if constexpr (COLUMNS == 2)
        tile_multiply<3, A + 1, B + 1>();
}

// Pixels [first, last) as tiles read them: where they lie, `jumped` elements further, or gathered.
struct Group {
    int64_t first, last, height, jumped, pitch; // `height` of one of two tiles
    bool in_place, is_gathered;
    bf16 *gathered;
};

inline bool reads_in_place(const Job &job, const Lines &lines, const Group &group) {
    bool whole = group.last - group.first == 2 * group.height;
    whole = whole && (lines.x + group.first) / lines.width == (lines.x + group.last - 1) / lines.width;
    for (int s = 0; s < job.num_segments; ++s)
        whole = whole && job.segments[s].length % TILE_DEPTH == 0;
    return whole;
}

// Meanwhile the sums before, `share` rows a step, go to the output.
template <int COLUMNS>
inline void accumulate(const Segment *segments, int num_segments, const Group &group, int64_t step, const char *weights,
                       int64_t pitch, const Job &job, Sums32 &before, int64_t share) {
    weights += step * TILE_DEPTH / 2 * pitch;
    for (int s = 0; s < num_segments; ++s) {
        const Segment &segment = segments[s];
        const int64_t offset = group.in_place ? group.first * segment.stride + group.jumped : 0;
        const char *x = (const char *)((const bf16 *)segment.data + offset);
        const int64_t stride = 2 * segment.stride;
        for (int64_t k = 0; k < segment.length; k += TILE_DEPTH, ++step) {
            if (COLUMNS == 1 && step % 2)
                multiply_tiles<1, 1>(x, stride, group.height, weights, pitch);
            else
                multiply_tiles<COLUMNS, 0>(x, stride, group.height, weights, pitch);
            x += 2 * TILE_DEPTH, weights += TILE_DEPTH / 2 * pitch;
            if (before.finished < before.rows)
                finish_some(job, before, share);
        }
    }
}

// Without its outputs yet: `sums` are left for `finish_some`, whatever is left of those `before` is finished.
template <int COLUMNS>
inline void multiply_block(int64_t depth, const Job &job, const Lines &lines, Group &group, Sums32 &sums,
                           Sums32 &before) {
    const int64_t pitch = 64 * sums.panel->slots - 32 * sums.panel->tail, steps = (depth + TILE_DEPTH - 1) / TILE_DEPTH;
    const int64_t share = (before.rows + steps - 1) / steps;
    const char *weights = (const char *)sums.panel->weights + 64 * sums.slot;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    if (group.in_place)
        accumulate<COLUMNS>(job.segments, job.num_segments, group, 0, weights, pitch, job, before, share);
    for (int64_t k = 0; k < depth && !group.in_place; k += GATHERED_DEPTH) {
        const int64_t end = depth - k < GATHERED_DEPTH ? depth : k + GATHERED_DEPTH;
        if (!group.is_gathered)
            gather(job, lines, group.first, group.last, k, end, group.gathered, group.pitch);
        group.is_gathered = depth <= GATHERED_DEPTH;
        const Segment all = {group.gathered, group.pitch, end - k};
        accumulate<COLUMNS>(&all, 1, group, k / TILE_DEPTH, weights, pitch, job, before, share);
    }
    finish_some(job, before, before.rows);
    tile_store<0>(sums.data[0], 128);
    tile_store<1>(sums.data[0] + 16, 128);
    tile_store<2>(sums.data[group.height], 128);
    tile_store<3>(sums.data[group.height] + 16, 128);
}

// Apply panels [first_panel, last_panel) to pixels [first, last); the weights pass while the pixels stay in the cache.
inline void multiply_lines(const Product &product, const Job &job, const Lines &lines, int64_t first, int64_t last,
                           int first_panel, int last_panel) {
    constexpr int64_t PITCH = GATHERED_DEPTH + TILE_DEPTH; // the odd number of lines spreads rows over the cache's sets
    const int64_t groups = (last - first + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
    if (groups <= 0)
        return;
    const int64_t height = ((last - first + groups - 1) / groups + 1) / 2;
    set_tile_height(height);
    alignas(64) bf16 gathered[2 * TILE_ROWS * PITCH]; // rows that nobody asks for are multiplied as they are
    Sums32 sums[2];
    sums[1].rows = sums[1].finished = 0;
    int turn = 0;
    const int64_t whole = (product.depth + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    for (int64_t row = first; row < last; row += 2 * height) {
        const int64_t end = last - row < 2 * height ? last : row + 2 * height;
        Group group{row, end, height, (lines.x + row) / lines.width * lines.jump, PITCH, false, false, gathered};
        if (whole < GATHERED_DEPTH)
            group.pitch = whole + TILE_DEPTH;
        group.in_place = reads_in_place(job, lines, group);
        for (int n = first_panel; n < last_panel; ++n)
            for (int slot = 0; slot < product.panels[n].slots; slot += 2, turn ^= 1) {
                const int slots = product.panels[n].slots - slot < 2 ? 1 : 2;
                Sums32 &own = sums[turn], &before = sums[turn ^ 1];
                own.panel = &product.panels[n], own.slot = slot, own.slots = slots;
                own.first = row, own.rows = end - row, own.finished = 0;
                if (slots == 1)
                    multiply_block<1>(product.depth, job, lines, group, own, before);
                else
                    multiply_block<2>(product.depth, job, lines, group, own, before);
            }
    }
    finish_some(job, sums[turn ^ 1], 2 * TILE_ROWS);
}

template <>
inline void apply<Tiles>(const Product &product, const Job &job, int64_t first, int64_t last, int first_panel,
                         int last_panel) {
    multiply_lines(product, job, ONE_LINE, first, last, first_panel, last_panel);
}

// Pixels of several rows of the map share a tile.
template <> inline void Layers<Tiles>::convolve(const BlockPlan &plan, const Plane &plane, int64_t width, int64_t first,
                                                int64_t last, bf16 *out) {
    const int64_t k = plan.kernel_size, channels = plan.partial_channels, pitch = (width + k - 1) * channels;
    const bf16 *corner = (const bf16 *)plane.data + first / width * pitch + first % width * channels;
    Job job;
    job.num_segments = int32_t(k);
    job.out = out, job.out_stride = plan.partial_stride;
    for (int64_t row = 0; row < k; ++row)
        job.segments[row] = {corner + row * pitch, channels, k * channels};
    multiply_lines(plan.partial, job, {first % width, width, pitch - width * channels}, 0, last - first, 0,
                   plan.partial.num_panels);
}

template <> inline void Layers<Tiles>::merge(const Product *product, int64_t k, const Map *in, const Map *out,
                                             const Plane *next, const Work *work) {
    const int64_t y = work->first / out->width, x = work->first % out->width;
    Job job;
    read_filter(job, k, *in, y, x);
    job.out = at(*out, work->first), job.out_stride = out->stride;
    const int64_t jump = (k * in->width - out->width * k) * in->stride;
    multiply_lines(*product, job, {x, out->width, jump}, 0, work->last - work->first, 0, product->num_panels);
    fill_plane(*next, *out, work->first, work->last);
}

// Independent products of tiles, as `Layers::peak` measures those of vectors.
inline double measure_tiles(double seconds) {
    constexpr int64_t LOOPS = 1 << 14;
    double best = 0, total = 0;
    set_tile_height(TILE_ROWS);
    while (total < seconds) {
        const double begin = now();
        for (int64_t n = 0; n < LOOPS; ++n) {
            tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
            tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
        }
        const double took = now() - begin, rate = double(LOOPS) * 4 * 16 * 16 * 32 / took;
        total += took, best = rate > best ? rate : best;
    }
    tile_release();
    TILE_HEIGHT = 0;
    return best;
}

inline constexpr Kernels create_tile_kernels(const char *isa) {
    using L = Layers<Tiles>;
    Kernels kernels = create_kernels<Tiles>(isa, "bf16");
    kernels.depth_multiple = TILE_DEPTH;
    kernels.embed = WithTiles<L::embed>::call, kernels.merge = WithTiles<L::merge>::call;
    kernels.block = WithTiles<L::block>::call, kernels.pconv = WithTiles<L::pconv>::call;
    kernels.linear = WithTiles<L::linear>::call, kernels.peak = measure_tiles;
    return kernels;
}
