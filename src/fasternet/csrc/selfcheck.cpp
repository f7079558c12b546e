// The library against plain loops in double precision: every instruction set of this processor, random small networks.
// Needs neither Python nor a test framework, so that it also runs for other processors, in an emulator.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "fasternet.h"

static std::atomic<int64_t> num_allocations{0};
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
// Every allocation of the process passes here, those of the library too.
extern "C" {
void *__libc_malloc(size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void *malloc(size_t size) { return ++num_allocations, __libc_malloc(size); }
void *aligned_alloc(size_t alignment, size_t size) { return ++num_allocations, __libc_memalign(alignment, size); }
}
#endif

namespace {

using Floats = std::vector<float>;

struct Map { // (n, h, w, c)
    int64_t n, h, w, c;
    std::vector<double> data;
    Map(int64_t n, int64_t h, int64_t w, int64_t c) : n(n), h(h), w(w), c(c), data(n * h * w * c) {}
    double &at(int64_t i, int64_t y, int64_t x, int64_t k) { return data[((i * h + y) * w + x) * c + k]; }
};

struct Layer {
    fn_layer given{};
    Floats weight[3], bias[3];
    fn_layer to_c() const {
        fn_layer layer = given;
        for (int i = 0; i < 3; ++i) {
            layer.weight[i] = weight[i].empty() ? nullptr : weight[i].data();
            layer.bias[i] = bias[i].empty() ? nullptr : bias[i].data();
        }
        return layer;
    }
};

std::mt19937 generator(7);

int64_t choose(std::initializer_list<int64_t> values) {
    return values.begin()[std::uniform_int_distribution<size_t>(0, values.size() - 1)(generator)];
}

Floats normal(size_t size, double scale) {
    std::normal_distribution<float> distribution(0.0F, static_cast<float>(scale));
    Floats values(size);
    std::generate(values.begin(), values.end(), [&] { return distribution(generator); });
    return values;
}

double activate(double x, int kind) {
    if (kind == FN_RELU) return x > 0 ? x : 0;
    if (kind == FN_GELU) return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
    return x;
}

// (rows, columns) x (columns) + bias
std::vector<double> multiply(const Floats &weight, const Floats &bias, const double *x, size_t rows, size_t columns) {
    std::vector<double> y(rows);
    for (size_t r = 0; r < rows; ++r) {
        y[r] = bias.empty() ? 0 : bias[r];
        for (size_t c = 0; c < columns; ++c) y[r] += static_cast<double>(weight[r * columns + c]) * x[c];
    }
    return y;
}

// k x k convolution of the channels from `start` on; the result has `out` channels
Map convolve(Map &x, const Floats &weight, int64_t out, int64_t in, int64_t start, int64_t k, int64_t stride,
             int64_t pad) {
    Map y(x.n, (x.h + 2 * pad - k) / stride + 1, (x.w + 2 * pad - k) / stride + 1, out);
    for (int64_t i = 0; i < y.n; ++i)
        for (int64_t row = 0; row < y.h; ++row)
            for (int64_t column = 0; column < y.w; ++column)
                for (int64_t o = 0; o < out; ++o)
                    for (int64_t c = 0; c < in; ++c)
                        for (int64_t dy = 0; dy < k; ++dy)
                            for (int64_t dx = 0; dx < k; ++dx) {
                                const int64_t from = row * stride + dy - pad, at = column * stride + dx - pad;
                                if (from < 0 || from >= x.h || at < 0 || at >= x.w) continue;
                                y.at(i, row, column, o) +=
                                    static_cast<double>(weight[((o * in + c) * k + dy) * k + dx]) *
                                    x.at(i, from, at, start + c);
                            }
    return y;
}

Map expect(Map x, const std::vector<Layer> &layers) {
    for (const Layer &layer : layers) {
        const fn_layer &given = layer.given;
        const int64_t pixels = x.n * x.h * x.w;
        if (given.kind == FN_PATCH) {
            x = convolve(x, layer.weight[0], given.out_channels, x.c, 0, given.kernel_size, given.kernel_size, 0);
            for (int64_t p = 0; p < x.n * x.h * x.w; ++p)
                for (int64_t c = 0; c < x.c; ++c) x.data[p * x.c + c] += layer.bias[0][c];
        } else if (given.kind == FN_BLOCK || given.kind == FN_PCONV) {
            const int64_t cp = given.partial_channels, start = given.partial_start, k = given.kernel_size;
            Map inside = convolve(x, layer.weight[0], cp, cp, start, k, 1, k / 2), mixed = x;
            for (int64_t p = 0; p < pixels; ++p)
                std::copy_n(&inside.data[p * cp], cp, &mixed.data[p * x.c + start]);
            if (given.kind == FN_PCONV) {
                x = mixed;
                continue;
            }
            for (int64_t p = 0; p < pixels; ++p) {
                const int64_t hidden = given.hidden_channels;
                auto wide = multiply(layer.weight[1], layer.bias[1], &mixed.data[p * x.c], hidden, x.c);
                for (double &value : wide) value = activate(value, given.activation);
                const auto back = multiply(layer.weight[2], layer.bias[2], wide.data(), x.c, hidden);
                for (int64_t c = 0; c < x.c; ++c) x.data[p * x.c + c] += back[c];
            }
        } else { // FN_HEAD
            Map y(x.n, 1, 1, given.out_channels);
            for (int64_t i = 0; i < x.n; ++i) {
                std::vector<double> mean(x.c);
                for (int64_t p = 0; p < x.h * x.w; ++p)
                    for (int64_t c = 0; c < x.c; ++c) mean[c] += x.data[(i * x.h * x.w + p) * x.c + c] / (x.h * x.w);
                auto hidden = multiply(layer.weight[0], layer.bias[0], mean.data(), given.hidden_channels, x.c);
                for (double &value : hidden) value = activate(value, given.activation);
                const auto row = multiply(layer.weight[1], layer.bias[1], hidden.data(), y.c, hidden.size());
                std::copy(row.begin(), row.end(), &y.data[i * y.c]);
            }
            x = y;
        }
    }
    return x;
}

Layer create_layer(int kind, int64_t c, int64_t out, int64_t k, int activation) {
    Layer layer;
    const int64_t cp = std::max<int64_t>(1, c / choose({1, 2, 4}));
    const int64_t hidden = choose({8, 20, 33, 64});
    layer.given.kind = kind;
    layer.given.in_channels = static_cast<int32_t>(c);
    layer.given.out_channels = static_cast<int32_t>(out);
    layer.given.kernel_size = static_cast<int32_t>(k);
    layer.given.activation = activation;
    if (kind == FN_PATCH) {
        layer.weight[0] = normal(out * c * k * k, 1 / std::sqrt(static_cast<double>(c * k * k)));
        layer.bias[0] = normal(out, 0.5);
        return layer;
    }
    layer.given.hidden_channels = static_cast<int32_t>(hidden);
    if (kind == FN_HEAD) {
        layer.weight[0] = normal(hidden * c, 1 / std::sqrt(static_cast<double>(c)));
        layer.weight[1] = normal(out * hidden, 1 / std::sqrt(static_cast<double>(hidden)));
        layer.bias[0] = normal(hidden, 0.5);
        layer.bias[1] = normal(out, 0.5);
        return layer;
    }
    layer.given.partial_channels = static_cast<int32_t>(cp);
    layer.given.partial_start = static_cast<int32_t>(choose({0, (c - cp) / 2, c - cp}));
    layer.weight[0] = normal(cp * cp * k * k, 1 / std::sqrt(static_cast<double>(cp * k * k)));
    if (kind == FN_PCONV) {
        layer.given.hidden_channels = 0;
        return layer;
    }
    layer.weight[1] = normal(hidden * c, 1 / std::sqrt(static_cast<double>(c)));
    layer.weight[2] = normal(c * hidden, 1 / std::sqrt(static_cast<double>(hidden)));
    layer.bias[1] = normal(hidden, 0.5);
    layer.bias[2] = normal(c, 0.5);
    return layer;
}

// Pictures through embedding, block, pconv, merging, block, head, twice; the relative error, or -1 and why on stderr.
double run_case(const char *isa, const char *precision) {
    const int64_t n = choose({1, 2, 5}), c = choose({1, 3}), width = choose({8, 10, 20, 36, 48});
    const int64_t out = choose({2, 7, 40}), h = choose({8, 13, 24}), w = choose({8, 16, 21});
    const int activation = static_cast<int>(choose({FN_RELU, FN_GELU}));
    const int32_t threads = static_cast<int32_t>(choose({1, 2, 3}));
    std::vector<Layer> layers;
    layers.push_back(create_layer(FN_PATCH, c, width, choose({2, 4}), activation));
    layers.push_back(create_layer(FN_BLOCK, width, width, choose({1, 3, 5}), activation));
    layers.push_back(create_layer(FN_PCONV, width, width, 3, activation));
    layers.push_back(create_layer(FN_PATCH, width, 2 * width, 2, activation));
    layers.push_back(create_layer(FN_BLOCK, 2 * width, 2 * width, 3, activation));
    layers.push_back(create_layer(FN_HEAD, 2 * width, out, 0, activation));
    std::vector<fn_layer> given;
    for (const Layer &layer : layers) given.push_back(layer.to_c());

    Map x(n, h, w, c);
    const Floats pixels = normal(x.data.size(), 1);
    std::copy(pixels.begin(), pixels.end(), x.data.begin());
    const Map expected = expect(x, layers);

    char message[512] = "";
    fn_network *network = nullptr;
    Floats result(expected.data.size(), NAN);
    float *const outputs[] = {result.data()};
    const fn_input input{pixels.data(), FN_FLOAT32, FN_NHWC, n, c, h, w};
    const auto count = static_cast<int32_t>(given.size());
    if (fn_create(given.data(), count, isa, precision, &network, message, sizeof message) ||
        fn_run(network, &input, outputs, threads, nullptr, message, sizeof message)) {
        std::fprintf(stderr, "%s %s: %s\n", isa, precision, message);
        fn_destroy(network);
        return -1;
    }
    const int64_t before = num_allocations;
    fn_run(network, &input, outputs, threads, nullptr, message, sizeof message);
    const int64_t allocated = num_allocations - before;
    fn_destroy(network);
    if (allocated) {
        std::fprintf(stderr, "%s %s: a second run allocates memory %d times\n", isa, precision, int(allocated));
        return -1;
    }
    double difference = 0, scale = 0;
    for (size_t i = 0; i < result.size(); ++i) {
        const double error = std::abs(result[i] - expected.data[i]);
        difference = std::isfinite(error) ? std::max(difference, error) : INFINITY;
        scale = std::max(scale, std::abs(expected.data[i]));
    }
    return difference / scale;
}

} // namespace

int main() {
    const int num_cases = 25;
    int num_runs = 0, num_failures = 0;
    for (const char *isa : {"portable", "avx2", "avx512", "avx512_bf16", "amx"})
        for (const char *precision : {"fp32", "bf16"}) {
            if (fn_explain(isa, precision)) continue;
            const double allowed = std::string(precision) == "fp32" ? 1e-5 : 5e-2;
            double worst = 0;
            for (int i = 0; i < num_cases; ++i) {
                const double error = run_case(isa, precision);
                num_failures += !(error >= 0 && error <= allowed);
                worst = std::max(worst, error);
            }
            std::printf("%s %s: %d cases, largest relative error %.1e\n", isa, precision, num_cases, worst);
            ++num_runs;
        }
    if (!num_runs || num_failures) std::printf("%d cases failed\n", num_failures);
    return !num_runs || num_failures;
}
