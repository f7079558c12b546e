// Running a network: shapes, memory, and who does what.
#include "network.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace fn {
namespace {

constexpr double MOST_BYTES = 0x1p56; // far from where integers overflow, and from what any machine has
constexpr int64_t TILE_BYTES = 48 << 10; // hidden channels of a tile: from 12 to 192 KiB, whole networks differ by 1 %

using Clock = std::chrono::steady_clock;

double elapsed(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

int64_t bytes_of_map(const Map &map, int64_t element) {
    return round_up(map.height * map.width * map.stride * element, 64);
}

int64_t bytes_of_plane(const Plane &plane, const Map &map, int64_t element) {
    return round_up((map.height + 2 * plane.border) * (map.width + 2 * plane.border) * plane.channels * element, 64);
}

} // namespace

void Network::check(const fn_input &input) const {
    const fn_layer &first = layers_[0].facts;
    if (input.c != first.in_channels)
        throw Refusal{"the input must have " + std::to_string(first.in_channels) + " channels, not " +
                      std::to_string(input.c)};
    if (input.n < 1 || input.h < 1 || input.w < 1)
        throw Refusal{"the input is empty: " + std::to_string(input.n) + " pictures of " + std::to_string(input.h) +
                      " x " + std::to_string(input.w)};
    if (input.h > (1 << 24) || input.w > (1 << 24) || input.n > (int64_t(1) << 31))
        throw Refusal{"the input must have at most 2^24 pixels on a side and 2^31 pictures, not " +
                      std::to_string(input.n) + " pictures of " + std::to_string(input.h) + " x " +
                      std::to_string(input.w)};
    if ((input.dtype != FN_FLOAT32 && input.dtype != FN_UINT8) || (input.layout != FN_NCHW && input.layout != FN_NHWC))
        throw Refusal{"the input has unknown dtype " + std::to_string(input.dtype) + " or layout " +
                      std::to_string(input.layout)};
    if (takes_pictures() && input.dtype == FN_UINT8 && !takes_uint8_)
        throw Refusal{"uint8 pictures need the mean and std, which the network was made without: give float32"};
    if (!takes_pictures() && (input.dtype != FN_FLOAT32 || input.layout != FN_NHWC))
        throw Refusal{"a map must be float32 and NHWC, as this network does not begin with an embedding"};
    int64_t h = input.h, w = input.w;
    for (const Layer &layer : layers_)
        if (layer.facts.kind == FN_PATCH)
            h /= layer.facts.kernel_size, w /= layer.facts.kernel_size;
    if (h < 1 || w < 1)
        throw Refusal{"the input is too small: of " + std::to_string(input.h) + " x " + std::to_string(input.w) +
                      " pixels no map is left"};
    check_size(input);
}

// The sum over all maps and planes, in floating point, bounds every product of sizes that follows.
void Network::check_size(const fn_input &input) const {
    double h = double(input.h), w = double(input.w), bytes = h * w * double(input.c);
    for (const Layer &layer : layers_) {
        const double k = layer.facts.kernel_size;
        if (layer.facts.kind == FN_PATCH)
            h /= k, w /= k;
        if (layer.makes_map())
            bytes += (h + k) * (w + k) * (layer.facts.out_channels + PAD);
    }
    if (bytes * 8 * double(input.n) > MOST_BYTES)
        throw std::bad_alloc();
}

// Follow the shapes of the maps.
void Network::follow(int64_t h, int64_t w, std::vector<Place> &places) const {
    Map map{nullptr, h, w, layers_[0].facts.in_channels, round_up(layers_[0].facts.in_channels, PAD)};
    int64_t output = 0;
    for (const Layer &layer : layers_) {
        Place place{map, map, {}, {}, -1, {}};
        if (layer.facts.kind == FN_PATCH) {
            h /= layer.facts.kernel_size, w /= layer.facts.kernel_size;
            const int64_t channels = layer.facts.out_channels;
            map = {nullptr, h, w, channels, round_up(channels, PAD)};
            place.out = map;
        }
        if (!layer.makes_map())
            place.output = output++;
        places.push_back(place);
    }
}

void Network::output_shape(const fn_input &input, int32_t output, int64_t shape[4]) const {
    check(input);
    std::vector<Place> places;
    follow(input.h, input.w, places);
    for (size_t i = 0; i < layers_.size(); ++i) {
        if (places[i].output != output)
            continue;
        const Map &map = places[i].out;
        if (layers_[i].facts.kind == FN_HEAD)
            shape[0] = input.n, shape[1] = shape[2] = 1, shape[3] = layers_[i].facts.out_channels;
        else
            shape[0] = input.n, shape[1] = map.height, shape[2] = map.width, shape[3] = map.channels;
        return;
    }
    throw Refusal{"output " + std::to_string(output) + " is not one of " + std::to_string(num_outputs_)};
}

// Blocks from a map to a map of the same form, in fp32, work in the caller's output itself.
bool Network::can_write_in_place() const {
    const size_t last = layers_.size() - 1;
    return !takes_pictures() && element_ == 4 && layers_[0].facts.in_channels % PAD == 0 && num_outputs_ == 1 &&
           layers_[last].facts.kind == FN_FEATURE && layers_[last].scale.empty() && layers_[last].shift.empty() &&
           std::all_of(layers_.begin(), layers_.end() - 1, [](const Layer &l) { return l.is_partial(); });
}

// Give every layer of one picture its maps and planes, as offsets: first the maps, then the planes.
// Two maps alternate over the stages, blocks work in place. Two planes alternate over the blocks of a stage; every
// stage has its own, whose borders stay zero. What works in the caller's output has no maps.
Network::Bytes Network::lay_out(int64_t h, int64_t w, std::vector<Place> &places) const {
    places.clear();
    follow(h, w, places);
    int64_t largest[2] = {0, 0}, turn = 0;
    std::vector<int64_t> side;
    for (size_t i = 0; i < layers_.size(); ++i) {
        if (layers_[i].facts.kind == FN_PATCH && i)
            turn ^= 1;
        side.push_back(turn);
        largest[turn] = in_place_ ? 0 : std::max(largest[turn], bytes_of_map(places[i].out, element_));
    }
    const int64_t maps[2] = {0, largest[0]}, begin = largest[0] + largest[1];
    int64_t end = begin, pair[2] = {0, 0}, pixels = 0, current_offset = 0;
    Plane current{}, last{};
    auto take_plane = [&](size_t i, const Map &map) { // for the layer that reads the map before layer i
        const auto reader = std::find_if(layers_.begin() + int64_t(i), layers_.end(),
                                         [](const Layer &layer) { return layer.makes_map(); });
        current = {};
        if (reader == layers_.end() || !reader->is_partial())
            return;
        const fn_layer &l = reader->facts;
        current = {nullptr, l.kernel_size / 2, l.partial_start, l.partial_channels};
        if (current.border != last.border || current.channels != last.channels || pixels != map.height * map.width)
            for (int64_t &one : pair)
                one = end, end += bytes_of_plane(current, map, element_);
        pixels = map.height * map.width, last = current;
        std::swap(pair[0], pair[1]);
        current_offset = pair[0];
    };
    if (!takes_pictures()) // the network's input is loaded into the first layer's map and plane
        take_plane(0, places[0].in);
    for (size_t i = 0; i < layers_.size(); ++i) {
        Place &place = places[i];
        place.current = current;
        place.offsets = {i ? places[i - 1].offsets.out : 0, maps[side[i]], current_offset, 0};
        if (!layers_[i].makes_map())
            continue;
        take_plane(i + 1, place.out);
        place.next = current, place.offsets.next = current_offset;
    }
    return {size_t(begin), size_t(end - begin), 0, 0};
}

int64_t Network::choose_tile(const Layer &layer, int64_t pixels) const {
    const int64_t width = std::max(layer.block.hidden_stride, layer.block.partial_stride) * element_;
    const int64_t wanted = std::max<int64_t>(28, TILE_BYTES / width / 14 * 14);
    const int64_t tiles = (pixels + wanted - 1) / wanted;
    return (pixels + tiles - 1) / tiles;
}

void Network::measure_scratch(const std::vector<Place> &places, int64_t width, Bytes &bytes) const {
    int64_t partial = 0, hidden = 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
        const Layer &layer = layers_[i];
        if (!layer.is_partial())
            continue;
        const int64_t tile = choose_tile(layer, places[i].out.height * places[i].out.width);
        partial = std::max(partial, tile * layer.block.partial_stride * element_);
        hidden = std::max(hidden, tile * layer.block.hidden_stride * element_);
    }
    const fn_layer &first = layers_[0].facts;
    if (first.kind == FN_PATCH)
        hidden = std::max(hidden, first.kernel_size * width * first.in_channels * element_ + 64);
    bytes.partial = size_t(round_up(partial, 64)), bytes.hidden = size_t(round_up(hidden, 64));
}

// Lay memory out for a shape; nothing is allocated where it fits into what there is.
void Network::prepare(const fn_input &input, int threads) {
    const Shape shape{input.h, input.w, input.n, threads};
    if (shape == shape_)
        return;
    shape_ = {};
    std::vector<Place> places;
    Bytes of = lay_out(input.h, input.w, places);
    measure_scratch(places, input.w, of);
    const size_t lanes = input.n >= threads ? size_t(threads) : 1, picture = of.maps + of.planes + 64;
    const fn_layer &last = layers_.back().facts;
    const bool head = last.kind == FN_HEAD;
    auto bytes_of_rows = [&](int64_t columns, int64_t element) {
        return head ? size_t(round_up(input.n * round_up(columns, 16) * element + 64, 64)) : 0;
    };
    const size_t pooled = bytes_of_rows(last.in_channels, element_), hidden = bytes_of_rows(last.hidden_channels, 4);
    const size_t logits = bytes_of_rows(last.out_channels, 4);
    const size_t bytes = lanes * picture + size_t(threads) * (of.partial + of.hidden) + pooled + hidden + logits + 256;
    const bool fits = bytes <= capacity_;
    if (!fits) {
        memory_.reset(), capacity_ = 0;
        memory_ = allocate(bytes);
        capacity_ = bytes;
    }
    char *next = static_cast<char *>(memory_.get());
    lanes_.assign(lanes, places), scratch_.resize(size_t(threads));
    for (auto &lane : lanes_) {
        if (fits) // borders of planes must be zero
            std::memset(next + of.maps, 0, of.planes);
        for (Place &place : lane) {
            place.in.data = next + place.offsets.in, place.out.data = next + place.offsets.out;
            place.current.data = next + place.offsets.current, place.next.data = next + place.offsets.next;
        }
        next += picture;
    }
    for (auto &own : scratch_)
        own = {next, next + of.partial}, next += of.partial + of.hidden;
    pooled_ = next, hidden_ = pooled_ + pooled, logits_ = hidden_ + hidden;
    shape_ = shape;
}

int64_t Network::num_bytes() const {
    std::lock_guard lock(mutex_);
    return int64_t(arena_.size() + capacity_);
}

void Network::run_layer(const Layer &layer, const Place &place, const fn_input &input, float *const *outputs, int64_t n,
                        Work &work) {
    const int64_t picture = n * input.c * input.h * input.w;
    const bool is_uint8 = input.dtype == FN_UINT8;
    if (layer.facts.kind == FN_PATCH && &layer == &layers_[0]) {
        const Picture source{static_cast<const char *>(input.data) + picture * (is_uint8 ? 1 : 4),
                             input.h, input.w, input.c, is_uint8, input.layout == FN_NCHW};
        kernels_.embed(&layer.products[2 * is_uint8 + source.is_planar], layer.facts.kernel_size, &source, &place.out,
                       &place.next, &work);
    } else if (layer.facts.kind == FN_PATCH) {
        kernels_.merge(&layer.products[0], layer.facts.kernel_size, &place.in, &place.out, &place.next, &work);
    } else if (layer.facts.kind == FN_BLOCK) {
        kernels_.block(&layer.block, &place.current, &place.out, &place.next, &work);
    } else if (layer.facts.kind == FN_PCONV) {
        kernels_.pconv(&layer.block, &place.current, &place.out, &place.next, &work);
    } else if (layer.facts.kind == FN_FEATURE && !in_place_) {
        const Map &map = place.out;
        float *out = outputs[place.output] + n * map.height * map.width * map.channels;
        kernels_.store(&map, layer.scale.empty() ? nullptr : layer.scale.data(),
                       layer.shift.empty() ? nullptr : layer.shift.data(), out, &work);
    } else if (layer.facts.kind == FN_HEAD && work.first == 0 && work.last > 0) { // one thread has the first pixel
        kernels_.pool(&place.out, pooled_ + n * place.out.stride * element_);
    }
}

// One picture by a team of threads, each with its share of every map's pixels; a layer begins when the one before is
// done.
void Network::run_picture(const fn_input &input, float *const *outputs, int64_t n, int lane, int thread, int team,
                          Barrier *barrier, double *seconds) {
    auto &own = scratch_[size_t(team == 1 ? lane : thread)];
    Work work{0, 0, 0, own.first, own.second};
    auto finish = [&](size_t i, Clock::time_point begin) {
        if (barrier)
            barrier->wait();
        if (seconds)
            seconds[i] += elapsed(begin);
    };
    for (size_t i = 0; i < layers_.size(); ++i) {
        const auto begin = seconds ? Clock::now() : Clock::time_point{};
        Place place = lanes_[size_t(lane)][i];
        if (in_place_)
            place.in.data = place.out.data = outputs[0] + n * input.h * input.w * input.c;
        const int64_t pixels = place.out.height * place.out.width;
        work.first = pixels * thread / team, work.last = pixels * (thread + 1) / team;
        if (layers_[i].is_partial())
            work.tile = choose_tile(layers_[i], pixels);
        if (i == 0 && !takes_pictures()) {
            const float *map = static_cast<const float *>(input.data) + n * input.h * input.w * input.c;
            kernels_.load(map, &place.in, &place.current, &work);
            if (barrier)
                barrier->wait();
        }
        run_layer(layers_[i], place, input, outputs, n, work);
        finish(i, begin);
    }
}

// All pictures at once, the columns shared out: their weights are read once.
void Network::run_head(int64_t n, float *out, int thread, int team, Barrier &barrier) {
    const Layer &layer = layers_.back();
    const fn_layer &l = layer.facts;
    const bool classifies = layer.products[1].panels;
    const int64_t stride = round_up(l.hidden_channels, 16), width = round_up(l.out_channels, 16);
    auto share = [&](const Product &product, const char *in, int64_t in_stride, char *to, int64_t to_stride, bool last,
                     int32_t activation) {
        kernels_.linear(&product, in, in_stride, to, to_stride, last, activation, n, product.num_panels * thread / team,
                        product.num_panels * (thread + 1) / team);
        barrier.wait();
    };
    share(layer.products[0], pooled_, round_up(l.in_channels, PAD), classifies ? hidden_ : logits_,
          classifies ? stride : width, !classifies, l.activation);
    if (classifies)
        share(layer.products[1], hidden_, stride, logits_, width, true, 0);
    for (int64_t i = n * thread / team; i < n * (thread + 1) / team; ++i)
        std::memcpy(out + i * l.out_channels, logits_ + i * width * 4, size_t(l.out_channels) * 4);
}

void Network::run(const fn_input &input, float *const *outputs, int threads, double *seconds) {
    check(input);
    std::lock_guard lock(mutex_);
    prepare(input, threads);
    // A thread takes whole pictures of these; of the rest, all threads share each.
    const int64_t together = input.n >= threads ? input.n - input.n % threads : 0;
    const size_t count = layers_.size();
    std::vector<double> spent(seconds ? count * size_t(threads) : 0);
    Barrier barrier(threads);
    Barrier *const others = threads > 1 ? &barrier : nullptr;
    run_team(threads, [&](int thread) {
        double *own = seconds ? spent.data() + count * size_t(thread) : nullptr;
        for (int64_t n = thread; n < together; n += threads)
            run_picture(input, outputs, n, thread, 0, 1, nullptr, own);
        barrier.wait();
        for (int64_t n = together; n < input.n; ++n)
            run_picture(input, outputs, n, 0, thread, threads, others, own);
        const auto begin = Clock::now();
        if (layers_.back().facts.kind == FN_HEAD)
            run_head(input.n, outputs[num_outputs_ - 1], thread, threads, barrier);
        if (own)
            own[count - 1] += elapsed(begin);
    });
    for (size_t i = 0; i < spent.size(); ++i)
        seconds[i % count] = (i < count ? 0.0 : seconds[i % count]) + spent[i] / threads;
}

} // namespace fn
