// The layers, each for a range of pixels of its output map.

template <class A> struct Layers {
    using Element = typename A::Element;

    static inline Element *at(const Map &map, int64_t pixel) { return (Element *)map.data + pixel * map.stride; }

    static inline void copy(Element *to, const Element *from, int64_t count) {
        constexpr int64_t WIDE = 4 * LANES / sizeof(Element), NARROW = 16 / sizeof(Element);
        for (; count >= WIDE; count -= WIDE, to += WIDE, from += WIDE)
            store_as(to, load_as<Floats<LANES>>(from));
        for (; count >= NARROW; count -= NARROW, to += NARROW, from += NARROW)
            store_as(to, load_as<Floats<4>>(from));
        for (; count > 0; --count)
            *to++ = *from++;
    }

    // Hand the channels that the next partial convolution reads over to its plane.
    static void fill_plane(const Plane &plane, const Map &map, int64_t first, int64_t last) {
        if (!plane.channels)
            return;
        const int64_t pitch = map.width + 2 * plane.border;
        int64_t y = first / map.width, x = first % map.width;
        for (int64_t p = first; p < last; ++p) {
            Element *to = (Element *)plane.data + ((y + plane.border) * pitch + x + plane.border) * plane.channels;
            copy(to, at(map, p) + plane.start, plane.channels);
            if (++x == map.width)
                x = 0, ++y;
        }
    }

    // Convolve pixels [first, last) of a plane into `out`, dense rows of `stride`. A filter's row is one segment.
    static void convolve(const BlockPlan &plan, const Plane &plane, int64_t width, int64_t first, int64_t last,
                         Element *out) {
        Job job;
        const int64_t k = plan.kernel_size, channels = plan.partial_channels, pitch = (width + k - 1) * channels;
        job.num_segments = int32_t(k), job.out_stride = plan.partial_stride;
        for (int n = 0; n < plan.partial.num_panels; ++n)
            for (int64_t p = first; p < last;) {
                const int64_t y = p / width, x = p % width, end = last - p < width - x ? last : p + width - x;
                const Element *corner = (const Element *)plane.data + y * pitch + x * channels;
                for (int64_t row = 0; row < k; ++row)
                    job.segments[row] = {corner + row * pitch, channels, k * channels};
                job.out = out + (p - first) * plan.partial_stride;
                apply<A>(plan.partial, job, 0, end - p, n, n + 1);
                p = end;
            }
    }

    static void block(const BlockPlan *plan, const Plane *current, const Map *map, const Plane *next,
                      const Work *work) {
        Element *partial = (Element *)work->partial, *hidden = (Element *)work->hidden;
        const int64_t after = plan->start + plan->partial_channels;
        for (int64_t first = work->first; first < work->last; first += work->tile) {
            const int64_t last = first + work->tile < work->last ? first + work->tile : work->last;
            convolve(*plan, *current, map->width, first, last, partial);
            Element *x = at(*map, first);
            Job job;
            if (plan->start)
                job.segments[job.num_segments++] = {x, map->stride, plan->start};
            job.segments[job.num_segments++] = {partial, plan->partial_stride, plan->partial_channels};
            if (after < map->channels)
                job.segments[job.num_segments++] = {x + after, map->stride, map->channels - after};
            job.activation = plan->activation;
            job.out = hidden, job.out_stride = plan->hidden_stride;
            apply<A>(plan->expand, job, 0, last - first);
            job.segments[0] = {hidden, plan->hidden_stride, plan->project.depth};
            job.num_segments = 1, job.activation = 0;
            job.shortcut = job.out = x, job.shortcut_stride = job.out_stride = map->stride;
            apply<A>(plan->project, job, 0, last - first);
            fill_plane(*next, *map, first, last);
        }
    }

    static void pconv(const BlockPlan *plan, const Plane *current, const Map *map, const Plane *next,
                      const Work *work) {
        Element *partial = (Element *)work->partial;
        for (int64_t first = work->first; first < work->last; first += work->tile) {
            const int64_t last = first + work->tile < work->last ? first + work->tile : work->last;
            convolve(*plan, *current, map->width, first, last, partial);
            for (int64_t p = first; p < last; ++p)
                copy(at(*map, p) + plan->start, partial + (p - first) * plan->partial_stride, plan->partial_channels);
            fill_plane(*next, *map, first, last);
        }
    }

    // Where a merging begins to read for pixel (y, x) of its output: a filter's row is one segment, but where there is
    // padding between pixels, every pixel is one. Infinity times the padding's weight of zero would be NaN.
    static void read_filter(Job &job, int64_t k, const Map &in, int64_t y, int64_t x) {
        const bool dense = in.stride == in.channels;
        job.num_segments = 0;
        for (int64_t row = 0; row < k; ++row)
            for (int64_t column = 0; column < (dense ? 1 : k); ++column)
                job.segments[job.num_segments++] = {at(in, (y * k + row) * in.width + x * k + column), k * in.stride,
                                                    dense ? k * in.channels : in.channels};
    }

    static void merge(const Product *product, int64_t k, const Map *in, const Map *out, const Plane *next,
                      const Work *work) {
        Job job;
        job.out_stride = out->stride;
        for (int n = 0; n < product->num_panels; ++n)
            for (int64_t p = work->first; p < work->last;) {
                const int64_t y = p / out->width, x = p % out->width;
                const int64_t end = work->last - p < out->width - x ? work->last : p + out->width - x;
                read_filter(job, k, *in, y, x);
                job.out = at(*out, p);
                apply<A>(*product, job, 0, end - p, n, n + 1);
                p = end;
            }
        fill_plane(*next, *out, work->first, work->last);
    }

    template <class T> static inline void convert(Element *to, const T *from, int64_t count) {
        if constexpr (sizeof(T) == 4) {
            for (; count >= LANES; count -= LANES, to += LANES, from += LANES)
                store<LANES>(to, load<LANES>(from));
        } else {
            for (; count >= LANES; count -= LANES, to += LANES, from += LANES)
                store<LANES>(to, __builtin_convertvector(load_as<Bytes<LANES>>(from), Floats<LANES>));
        }
        for (; count > 0; --count, ++from) {
            Element last[LANES];
            store<LANES>(last, splat<LANES>(float(*from)));
            *to++ = last[0];
        }
    }

    static void convert_row(Element *to, const Picture &picture, int64_t offset, int64_t count) {
        if (picture.is_uint8)
            convert(to, (const uint8_t *)picture.data + offset, count);
        else
            convert(to, (const float *)picture.data + offset, count);
    }

    // Row by row of the output; `work->hidden` takes k converted rows of the picture where it is not read in place.
    static void embed(const Product *product, int64_t k, const Picture *picture, const Map *out, const Plane *next,
                      const Work *work) {
        const bool planar = picture->is_planar;
        const int64_t planes = planar ? picture->channels : 1, c = planar ? 1 : picture->channels;
        const int64_t pitch = picture->width * c, area = picture->height * pitch;
        const bool in_place = sizeof(Element) == 4 && !picture->is_uint8 && !planar; // planes: measured, copying pays
        Job job;
        job.num_segments = int32_t(k * planes), job.out_stride = out->stride;
        for (int64_t p = work->first; p < work->last;) {
            const int64_t y = p / out->width, x = p % out->width;
            const int64_t end = work->last - p < out->width - x ? work->last : p + out->width - x;
            for (int64_t s = 0; s < job.num_segments; ++s) {
                const int64_t offset = s / k * area + (y * k + s % k) * pitch;
                const Element *row = (const Element *)picture->data + offset;
                if (!in_place) {
                    convert_row((Element *)work->hidden + s * pitch, *picture, offset, pitch);
                    row = (Element *)work->hidden + s * pitch;
                }
                job.segments[s] = {row + x * k * c, k * c, k * c};
            }
            job.out = at(*out, p);
            apply<A>(*product, job, 0, end - p);
            p = end;
        }
        fill_plane(*next, *out, work->first, work->last);
    }

    static void load_map(const float *in, const Map *map, const Plane *next, const Work *work) {
        for (int64_t p = work->first; p < work->last; ++p)
            if ((const void *)(in + p * map->channels) != at(*map, p))
                convert(at(*map, p), in + p * map->channels, map->channels);
        fill_plane(*next, *map, work->first, work->last);
    }

    static void store_map(const Map *map, const float *scale, const float *shift, float *out, const Work *work) {
        for (int64_t p = work->first; p < work->last; ++p) {
            const Element *from = at(*map, p);
            float *to = out + p * map->channels;
            if constexpr (sizeof(Element) == 4) {
                if (!scale && !shift) { // bit for bit
                    copy(to, from, map->channels);
                    continue;
                }
            }
            for (int64_t c = 0; c < map->channels; ++c) {
                float x;
                if constexpr (sizeof(Element) == 4)
                    x = from[c];
                else
                    x = widen(from[c]);
                x = scale ? x * scale[c] : x;
                to[c] = shift ? x + shift[c] : x;
            }
        }
    }

    // The mean over all pixels, in `map->stride` channels: of sums over rows, which stay more exact than one long sum.
    static void pool(const Map *map, void *out) {
        const int64_t pixels = map->height * map->width;
        const Floats<4> size = splat<4>(float(pixels));
        for (int64_t c = 0; c < map->stride; c += 4) {
            Floats<4> sum = splat<4>(0.0f);
            for (int64_t p = 0; p < pixels;) {
                Floats<4> row = splat<4>(0.0f);
                for (const int64_t end = p + map->width; p < end; ++p)
                    row += load<4>(at(*map, p) + c);
                sum += row;
            }
            store<4>((Element *)out + c, sum / size);
        }
    }

    static void linear(const Product *product, const void *in, int64_t in_stride, void *out, int64_t out_stride,
                       int32_t out_float, int32_t activation, int64_t rows, int32_t first_panel, int32_t last_panel) {
        Job job;
        job.segments[0] = {in, in_stride, product->depth};
        job.num_segments = 1, job.activation = activation;
        job.out = out, job.out_stride = out_stride, job.out_float = out_float;
        apply<A>(*product, job, 0, rows, first_panel, last_panel);
    }

    // Independent multiply-adds on registers alone.
    static double peak(double seconds) {
        constexpr int CHAINS = REGISTERS - 4;
        constexpr int64_t LOOPS = 1 << 16;
        typedef typename A::template Weights<LANES> W;
        volatile uint32_t seed = 0;
        const W x = (W)splat<LANES>(uint32_t(seed)), w = x;
        Floats<LANES> sums[CHAINS] = {};
        double best = 0, total = 0;
        while (total < seconds) {
            const double begin = now();
            for (int64_t n = 0; n < LOOPS; ++n)
#pragma GCC unroll 32
                for (int i = 0; i < CHAINS; ++i) {
                    sums[i] = A::template multiply_add<LANES>(x, w, sums[i]);
                    asm volatile("" : FN_IN_REGISTER(sums[i]));
                }
            const double took = now() - begin, rate = double(LOOPS) * CHAINS * LANES * A::UNIT / took;
            total += took, best = rate > best ? rate : best;
        }
        return best;
    }
};

template <class A> inline constexpr Kernels create_kernels(const char *isa, const char *precision) {
    using L = Layers<A>;
    return {isa,      precision, LANES,       TAIL,         A::UNIT, SLOTS,     L::embed, L::merge,
            L::block, L::pconv,  L::load_map, L::store_map, L::pool, L::linear, L::peak};
}
