// From a layer's weights in PyTorch's order to packed products.
#include <numeric>

#include "network.h"

namespace fn {
namespace {

size_t count_floats(const fn_layer *layers, int32_t count) {
    size_t floats = 0;
    for (int32_t i = 0; i < count; ++i) {
        const fn_layer &l = layers[i];
        const auto in = size_t(l.in_channels), out = size_t(l.out_channels), hidden = size_t(l.hidden_channels);
        const auto k2 = size_t(l.kernel_size) * size_t(l.kernel_size), partial = size_t(l.partial_channels);
        floats += l.kind == FN_PATCH ? in * out * k2 : 0;
        floats += l.kind == FN_BLOCK ? 2 * in * hidden : 0;
        floats += l.kind == FN_BLOCK || l.kind == FN_PCONV ? partial * partial * k2 : 0;
        floats += l.kind == FN_HEAD ? in * hidden + (l.weight[1] ? hidden * out : 0) : 0;
    }
    return floats;
}

std::vector<int64_t> range(int64_t first, int64_t last) {
    std::vector<int64_t> indices(size_t(last - first));
    std::iota(indices.begin(), indices.end(), first);
    return indices;
}

// A filter's row is one segment, k pixels of all channels; or, where padding lies between pixels, every pixel is one.
Order order_rows(int64_t channels, int64_t k, bool dense) {
    Order order;
    for (int64_t y = 0; y < k; ++y)
        for (int64_t x = 0; x < k; ++x) {
            if (x == 0 || !dense)
                order.emplace_back();
            for (int64_t c = 0; c < channels; ++c)
                order.back().push_back((c * k + y) * k + x);
        }
    return order;
}

// A row of a filter of one channel is one segment: for pictures of separate planes.
Order order_planes(int64_t channels, int64_t k) {
    Order order;
    for (int64_t row = 0; row < channels * k; ++row)
        order.push_back(range(row * k, (row + 1) * k));
    return order;
}

} // namespace

Network::Network(const fn_layer *layers, int32_t count, const Kernels &kernels)
    : kernels_(kernels), element_(kernels.word == 1 ? 4 : 2), // bytes
      arena_(std::min(size_t(1) << 30, count_floats(layers, count) * size_t(element_) * 9 / 8 + 4096)) {
    layers_.reserve(size_t(count));
    for (int32_t i = 0; i < count; ++i)
        add(layers[i]);
    in_place_ = can_write_in_place();
}

void Network::add(const fn_layer &facts) {
    Layer &layer = layers_.emplace_back(Layer{facts, {}, {}, {}, {}});
    if (facts.kind == FN_PATCH)
        pack_patch(layer, layers_.size() == 1);
    else if (facts.kind == FN_HEAD)
        pack_head(layer);
    else if (layer.is_partial())
        pack_block(layer);
    if (facts.kind == FN_FEATURE && facts.weight[0])
        layer.scale.assign(facts.weight[0], facts.weight[0] + facts.in_channels);
    if (facts.kind == FN_FEATURE && facts.bias[0])
        layer.shift.assign(facts.bias[0], facts.bias[0] + facts.in_channels);
    num_outputs_ += !layer.makes_map();
    layer.facts.mean = layer.facts.std = nullptr; // the caller's, and soon gone
    for (int i = 0; i < 3; ++i)
        layer.facts.weight[i] = layer.facts.bias[i] = nullptr;
}

// The first layer is packed for every form of picture: products[2 * is_uint8 + is_planar].
void Network::pack_patch(Layer &layer, bool first) {
    const fn_layer &l = layer.facts;
    const int64_t in = l.in_channels, out = l.out_channels, k = l.kernel_size, depth = in * k * k;
    const int64_t columns = round_up(out, PAD);
    auto pack_with = [&](const float *weights, const Order &order, const float *bias) {
        return pack(kernels_, arena_, weights, out, depth, order, bias, columns);
    };
    if (!first) {
        layer.products[0] = pack_with(l.weight[0], order_rows(in, k, in % PAD == 0), l.bias[0]);
        return;
    }
    layer.products[0] = pack_with(l.weight[0], order_rows(in, k, true), l.bias[0]);
    layer.products[1] = pack_with(l.weight[0], order_planes(in, k), l.bias[0]);
    takes_uint8_ = l.mean && l.std;
    if (!takes_uint8_)
        return;
    std::vector<float> scaled(size_t(out * depth)), bias(static_cast<size_t>(out));
    for (int64_t n = 0; n < out; ++n) {
        double sum = l.bias[0] ? l.bias[0][n] : 0.0;
        for (int64_t d = 0; d < depth; ++d) {
            const double w = l.weight[0][n * depth + d], c = l.std[d / (k * k)];
            scaled[size_t(n * depth + d)] = float(w / (255.0 * c));
            sum -= w * l.mean[d / (k * k)] / c;
        }
        bias[size_t(n)] = float(sum);
    }
    layer.products[2] = pack_with(scaled.data(), order_rows(in, k, true), bias.data());
    layer.products[3] = pack_with(scaled.data(), order_planes(in, k), bias.data());
}

void Network::pack_block(Layer &layer) {
    const fn_layer &l = layer.facts;
    const int64_t channels = l.in_channels, hidden = l.hidden_channels, partial = l.partial_channels;
    const int64_t start = l.partial_start, k = l.kernel_size;
    BlockPlan &plan = layer.block;
    plan = {{}, {}, {}, k, start, partial, round_up(hidden, 2 * PAD), round_up(partial, 2 * PAD), l.activation};
    if (kernels_.depth_multiple > 1 && plan.hidden_stride % 512 == 0)
        plan.hidden_stride += 32; // the 16 rows of a tile would fall on few of the cache's sets
    plan.partial = pack(kernels_, arena_, l.weight[0], partial, partial * k * k, order_rows(partial, k, true), nullptr,
                        partial);
    if (l.kind == FN_PCONV)
        return;
    Order order; // as Layers::block reads them: before, convolved, after
    if (start)
        order.push_back(range(0, start));
    order.push_back(range(start, start + partial));
    if (start + partial < channels)
        order.push_back(range(start + partial, channels));
    plan.expand = pack(kernels_, arena_, l.weight[1], hidden, channels, order, l.bias[1], hidden);
    plan.project =
        pack(kernels_, arena_, l.weight[2], channels, hidden, {range(0, hidden)}, l.bias[2], round_up(channels, PAD));
}

void Network::pack_head(Layer &layer) {
    const fn_layer &l = layer.facts;
    layer.products[0] = pack(kernels_, arena_, l.weight[0], l.hidden_channels, l.in_channels, {range(0, l.in_channels)},
                             l.bias[0], l.hidden_channels);
    if (l.weight[1])
        layer.products[1] = pack(kernels_, arena_, l.weight[1], l.out_channels, l.hidden_channels,
                                 {range(0, l.hidden_channels)}, l.bias[1], l.out_channels);
}

} // namespace fn
