// Convolution in tiles on the CPU; the equation is in ncsn_fast/tile_conv.h. Bound by arithmetic: four
// products of tiles need four loads of tiles.
//
// A unit of work is a block of rows of output pixels and a group of panels. In rows with padding the window
// of 16 output pixels is a tile that needs no im2col: 16 pixels, read with the stride of a pixel, from
// another address for each tap. A dense input is copied into such rows, once for each unit; a map that was
// written with padding is read where it lies. Two such tiles are multiplied by the two of a panel. The order
// of the sums, chunk by chunk, keeps the inputs of a chunk in the first-level cache for all taps; the weights
// of a panel, 144 KiB at 256 channels, pass by from the second level, and stay there for the whole block.
//
// What follows the convolution is computed for two tiles while the next two are multiplied, a pixel after
// each product: these are instructions of other units of the processor.
#include <omp.h>

#include "tile.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int kPair = 2 * kTileRows;  // pixels of two tiles

// A thread's workspace for a unit of work.
struct TileBlock {
    Bfloat16* copy;          // of a dense input
    const Bfloat16* inputs;  // the copy, or x
    TilePlace* places;
    float* sums;  // two of two tiles and a panel each: [pixel][output channel]
    int64_t tiles;
};

// Where a pixel is written.
struct Pixel {
    int64_t number;  // in the batch; -1 for one outside
    int64_t y;       // element of y
    int64_t strip;   // of the batch
    bool begins;     // that strip
};

// The pixels of two tiles whose sums are complete.
struct Finished {
    const float* sums;
    Pixel pixels[kPair];
    int64_t panel;
    int next, count;
    void (*finish_pixel)(const TileConvArgs&, const Finished&, int row);

    bool is_done() const { return next == count; }
    void advance(const TileConvArgs& args) { finish_pixel(args, *this, next++); }
};

// Adds a pixel to the sums of its strip, whose three numbers of a channel lie `channels` apart.
template <int n>
static inline void add_to_strip(float* shift, int64_t channels, Lanes<float, n> value, bool begins) {
    float *const sum = shift + channels, *const squares = sum + channels;
    if (begins) {
        store_lanes<n>(shift, value);
        store_lanes<n>(sum, Lanes<float, n>{});
        store_lanes<n>(squares, Lanes<float, n>{});
        return;
    }
    const auto d = value - load_lanes<n>(shift);
    store_lanes<n>(sum, load_lanes<n>(sum) + d);
    store_lanes<n>(squares, load_lanes<n>(squares) + d * d);
}

template <Activation activation>
static void finish_pixel(const TileConvArgs& args, const Finished& pair, int row) {
    const Pixel& pixel = pair.pixels[row];
    if (pixel.number < 0) return;
    const int64_t channel = pair.panel * kTilePanel;
    const int64_t from = pixel.number * args.out_channels + channel, at = pixel.number * args.sum_row + channel;
    const float* sums = pair.sums + row * kTilePanel;
    float* const strip = args.strip_sums == nullptr
                             ? nullptr
                             : args.strip_sums + pixel.strip * kStripSums * args.out_channels + channel;
    for_each_vector(smaller(kTilePanel, args.out_channels - channel), [&]<int n>(int64_t i, Width<n>) {
        auto value = load_lanes<n>(sums + i);
        if (args.bias != nullptr) value += load_lanes<n>(args.bias + channel + i);
        if (args.added != nullptr) value += load_lanes<n>(args.added + from + i);
        if (args.sum != nullptr) store_lanes<n>(args.sum + at + i, value);
        if (strip != nullptr) {
            add_to_strip<n>(strip + i, args.out_channels, load_lanes<n>(args.sum + at + i), pixel.begins);
        }
        if (args.y != nullptr) {
            const auto curve = [](float v) __attribute__((always_inline)) { return activated<activation>(v); };
            store_lanes<n>(args.y + pixel.y + channel + i, each_lane<n>(value, curve));
        }
    });
}

// Copies the padded input of output rows `first` to `first + rows` of a map with `height` rows.
static void copy_rows(const TileConvArgs& args, const TileConvPlan& plan, const Bfloat16* map, int64_t first,
                      int64_t rows, Bfloat16* out) {
    const auto bytes = [](int64_t elements) { return static_cast<size_t>(elements) * sizeof(Bfloat16); };
    const int64_t reach = plan.reach, line = plan.pitch * plan.pixel;
    for (int64_t r = 0; r < rows + 2 * reach; ++r, out += line) {
        const int64_t row = first + r - reach;
        if (row < 0 || row >= args.height) {
            memset(out, 0, bytes(line));
            continue;
        }
        memset(out, 0, bytes(reach * plan.pixel));
        const Bfloat16* from = map + row * args.width * args.in_channels;
        Bfloat16* to = out + reach * plan.pixel;
        for (int64_t j = 0; j < args.width; ++j, from += args.in_channels, to += plan.pixel) {
            memcpy(to, from, bytes(args.in_channels));
            if (args.in_channels < plan.sizes.channels) {
                memset(to + args.in_channels, 0, bytes(plan.sizes.channels - args.in_channels));
            }
        }
    }
    memset(out, 0, bytes((2 * reach + kTileRows) * plan.pixel));  // the last tiles' pixels outside
}

// Elements that copy_rows writes.
static inline int64_t copied(const TileConvPlan& plan, int64_t rows) {
    return ((rows + 2 * plan.reach) * plan.pitch + 2 * plan.reach + kTileRows) * plan.pixel;
}

// Appends the places of the tiles of rows `first` to `end` of an image, whose padded input begins at
// `input`.
static void add_places(const TileConvArgs& args, const TileConvPlan& plan, int64_t image, int64_t first,
                       int64_t end, int64_t input, TileBlock& block) {
    const int64_t rows = end - first;
    const int64_t count =
        plan.wraps ? pieces((rows - 1) * plan.pitch + args.width, kTileRows) : rows * plan.along;
    for (int64_t t = 0; t < count; ++t) {
        const int64_t at =
            plan.wraps ? t * kTileRows : t / plan.along * plan.pitch + t % plan.along * kTileRows;
        const int64_t row = first + at / plan.pitch;
        block.places[block.tiles++] = {input + at * plan.pixel, image,
                                       row,                     end,
                                       at % plan.pitch,         image * plan.strips + row / plan.strip,
                                       row % plan.strip};
    }
}

// Fills the places, and the copy of a dense input, for the rows of strips `strip` to `end` of the batch.
static void prepare_block(const TileConvArgs& args, const TileConvPlan& plan, int64_t strip, int64_t end,
                          TileBlock& block) {
    int64_t filled = 0;
    block.inputs = args.border < 0 ? block.copy : args.x;
    while (strip < end) {
        const int64_t image = strip / plan.strips, skipped = strip % plan.strips;
        const int64_t count = smaller(plan.strips - skipped, end - strip);
        const int64_t first = skipped * plan.strip, last = smaller(first + count * plan.strip, args.height);
        if (args.border < 0) {
            const Bfloat16* map = args.x + image * args.height * args.width * args.in_channels;
            copy_rows(args, plan, map, first, last - first, block.copy + filled);
            add_places(args, plan, image, first, last, filled, block);
            filled += copied(plan, last - first);
        } else {
            const int64_t outer = args.border - plan.reach, start = (first + outer) * plan.pitch + outer;
            add_places(args, plan, image, first, last, image * plan.image + start * plan.pixel, block);
        }
        strip += count;
    }
}

static inline void find_pixels(const TileConvArgs& args, const TileConvPlan& plan, TilePlace at, Pixel* pixels) {
    const PixelLayout& y = args.y_pixels;
    for (int m = 0; m < kTileRows; ++m, ++at.column) {
        if (plan.wraps && at.column >= plan.pitch) {
            at.column -= plan.pitch, ++at.row;
            if (++at.in_strip == plan.strip) at.in_strip = 0, ++at.strip;
        }
        pixels[m].number = -1;
        if (at.column >= args.width || at.row >= at.end) continue;
        pixels[m] = {(at.image * args.height + at.row) * args.width + at.column,
                     at.image * y.image + at.row * y.row + at.column * y.pixel, at.strip,
                     at.in_strip == 0 && at.column == 0};
    }
}

// The sums of one or two tiles and a panel, while `before` is finished.
template <int count>
static void multiply(Tiles& tiles, const TileConvArgs& args, const TileConvPlan& plan,
                            const int64_t* offsets, const Bfloat16* const* inputs, const Bfloat16* weights,
                            float* sums, Finished& before) {
    constexpr int64_t kHalf = kTileBytes / sizeof(Bfloat16), kStride = kTilePanel * sizeof(float);
    const int64_t stride = plan.pixel * static_cast<int64_t>(sizeof(Bfloat16)), taps = args.taps * args.taps;
    const Bfloat16 *first = inputs[0], *second = inputs[1];
    tiles.zero<0>(), tiles.zero<1>();
    if constexpr (count == 2) tiles.zero<2>(), tiles.zero<3>();
    for (int64_t chunk = plan.sizes.channels / kTileChunk; chunk > 0; --chunk) {
        for (int64_t tap = 0; tap < taps; ++tap, weights += 2 * kHalf) {
            const int64_t offset = offsets[tap];
            tiles.load<4>(first + offset, stride);
            tiles.load<6>(weights, kTileRowBytes);
            tiles.multiply<0, 4, 6>();
            tiles.load<7>(weights + kHalf, kTileRowBytes);
            tiles.multiply<1, 4, 7>();
            if constexpr (count == 2) {
                tiles.load<5>(second + offset, stride);
                tiles.multiply<2, 5, 6>();
                tiles.multiply<3, 5, 7>();
            }
            if (!before.is_done()) before.advance(args);
        }
        first += kTileChunk, second += kTileChunk;
    }
    while (!before.is_done()) before.advance(args);
    tiles.store<0>(sums, kStride), tiles.store<1>(sums + kTileSums, kStride);
    if constexpr (count == 2) {
        tiles.store<2>(sums + kTileRows * kTilePanel, kStride);
        tiles.store<3>(sums + kTileRows * kTilePanel + kTileSums, kStride);
    }
}

static void multiply_panel(Tiles& tiles, const TileConvArgs& args, const TileConvPlan& plan,
                           const TileBlock& block, const int64_t* offsets, int64_t panel, Finished& pair) {
    const Bfloat16* weights = args.weights + panel * (plan.sizes.values / plan.sizes.panels);
    for (int64_t t = 0; t < block.tiles; t += 2) {
        const bool two = t + 1 < block.tiles;
        const TilePlace* places = block.places + t;
        const Bfloat16* inputs[] = {block.inputs + places[0].input, block.inputs + places[two].input};
        float* sums = block.sums + (pair.sums == block.sums ? kPair * kTilePanel : 0);
        (two ? multiply<2> : multiply<1>)(tiles, args, plan, offsets, inputs, weights, sums, pair);
        pair.sums = sums, pair.panel = panel, pair.next = 0, pair.count = two ? kPair : kTileRows;
        find_pixels(args, plan, places[0], pair.pixels);
        if (two) find_pixels(args, plan, places[1], pair.pixels + kTileRows);
    }
}

static void run_unit(const TileConvArgs& args, const TileConvPlan& plan, TileBlock& block, int64_t unit) {
    int64_t offsets[9];
    for (int64_t k = 0; k < args.taps; ++k) {
        for (int64_t l = 0; l < args.taps; ++l) {
            offsets[k * args.taps + l] = (k * plan.pitch + l) * args.dilation * plan.pixel;
        }
    }
    const int64_t b = unit / plan.groups, group = unit % plan.groups;
    const int64_t strips = args.batch * plan.strips;
    prepare_block(args, plan, b * strips / plan.blocks, (b + 1) * strips / plan.blocks, block);
    Finished pair{};
    with_activation(args.activation, [&]<Activation a>(Activating<a>) { pair.finish_pixel = finish_pixel<a>; });
    Tiles tiles;
    const int64_t end = (group + 1) * plan.sizes.panels / plan.groups;
    for (int64_t panel = group * plan.sizes.panels / plan.groups; panel < end; ++panel) {
        multiply_panel(tiles, args, plan, block, offsets, panel, pair);
    }
    while (!pair.is_done()) pair.advance(args);
}

static void convolution(const TileConvArgs& args, const TileConvPlan& plan, const TileConvWorkspace& workspace) {
#pragma omp parallel for schedule(dynamic) num_threads(workspace.threads)
    for (int64_t unit = 0; unit < plan.blocks * plan.groups; ++unit) {
        unsigned char* const slot = workspace.data + omp_get_thread_num() * plan.slot_bytes;
        TileBlock block{reinterpret_cast<Bfloat16*>(slot), nullptr,
                        reinterpret_cast<TilePlace*>(slot + plan.tiles_at),
                        reinterpret_cast<float*>(slot + plan.sums_at), 0};
        run_unit(args, plan, block, unit);
    }
}

static void product(const TileProductArgs& args) {
    Tiles tiles;
    tiles.load<0>(args.sum, args.sum_stride);
    tiles.load<4>(args.a, args.a_stride);
    tiles.load<6>(args.b, args.b_stride);
    tiles.multiply<0, 4, 6>();
    tiles.store<0>(args.sum, args.sum_stride);
}

extern const TileKernels kTileKernels;
const TileKernels kTileKernels{product, convolution};

}  // namespace ncsn_fast::NCSN_ISA
