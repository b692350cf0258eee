// Convolution in tiles on the CPU; the equation is in ncsn_fast/tile_conv.h. Bound by arithmetic: four
// products of tiles need four loads of tiles.
//
// A unit of work is a block of rows of output pixels and a group of panels. Its input is copied once into
// rows with padding, where the window of 16 output pixels is a tile that needs no im2col: 16 pixels, read
// with the stride of a pixel, from another address for each tap. Two such tiles are multiplied by the two
// of a panel. The order of the sums, chunk by chunk, keeps the inputs of a chunk in the first-level cache
// for all taps; the weights of a panel, 144 KiB at 256 channels, pass by from the second level, and stay
// there for the whole block.
//
// What follows the convolution is computed for two tiles while the next two are multiplied, a pixel after
// each product: these are instructions of other units of the processor.
#include <omp.h>

#include "tile.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int kPair = 2 * kTileRows;  // pixels of two tiles

// A tile of output pixels.
struct TilePlace {
    int64_t input;           // element of the padded input at which its first window begins
    int64_t first_row, end;  // of the map: rows of all images, up to the end of the segment
    int64_t column;
};

// A thread's workspace for a unit of work.
struct TileBlock {
    Bfloat16* inputs;
    TilePlace* places;
    float* sums;  // two of two tiles and a panel each: [pixel][output channel]
    int64_t tiles;
};

// The pixels of two tiles whose sums are complete.
struct Finished {
    const float* sums;
    int64_t pixels[kPair];  // of the map; -1 for those outside
    int64_t panel;
    int next, count;
    void (*finish_pixel)(const TileConvArgs&, const Finished&, int row);

    bool is_done() const { return next == count; }
    void advance(const TileConvArgs& args) { finish_pixel(args, *this, next++); }
};

template <Activation activation>
static void finish_pixel(const TileConvArgs& args, const Finished& pair, int row) {
    if (pair.pixels[row] < 0) return;
    const int64_t channel = pair.panel * kTilePanel;
    const int64_t from = pair.pixels[row] * args.out_channels + channel, at = pair.pixels[row] * args.row + channel;
    const float* sums = pair.sums + row * kTilePanel;
    for_each_vector(smaller(kTilePanel, args.out_channels - channel), [&]<int n>(int64_t i, Width<n>) {
        auto value = load_lanes<n>(sums + i);
        if (args.bias != nullptr) value += load_lanes<n>(args.bias + channel + i);
        if (args.added != nullptr) value += load_lanes<n>(args.added + from + i);
        if (args.sum != nullptr) store_lanes<n>(args.sum + at + i, value);
        if (args.y != nullptr) {
            const auto curve = [](float v) __attribute__((always_inline)) { return activated<activation>(v); };
            store_lanes<n>(args.y + at + i, each_lane<n>(value, curve));
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

// Fills the inputs and the places of rows `first` to `end` of all images.
static void prepare_block(const TileConvArgs& args, const TileConvPlan& plan, int64_t first, int64_t end,
                          TileBlock& block) {
    int64_t input = 0, tiles = 0;
    while (first < end) {
        const int64_t image = first / args.height, row = first % args.height;
        const int64_t rows = smaller(args.height - row, end - first);
        const Bfloat16* map = args.x + image * args.height * args.width * args.in_channels;
        copy_rows(args, plan, map, row, rows, block.inputs + input);
        const int64_t count = plan.wraps ? pieces((rows - 1) * plan.pitch + args.width, kTileRows)
                                         : rows * plan.along;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t at = plan.wraps ? t * kTileRows
                                          : t / plan.along * plan.pitch + t % plan.along * kTileRows;
            block.places[tiles++] = {input + at * plan.pixel, first + at / plan.pitch, first + rows,
                                     at % plan.pitch};
        }
        input += copied(plan, rows);
        first += rows;
    }
    block.tiles = tiles;
}

static inline void find_pixels(const TileConvArgs& args, const TileConvPlan& plan, const TilePlace& place,
                               int64_t* pixels) {
    int64_t row = place.first_row, column = place.column;
    for (int m = 0; m < kTileRows; ++m, ++column) {
        if (plan.wraps && column >= plan.pitch) column -= plan.pitch, ++row;
        pixels[m] = column < args.width && row < place.end ? row * args.width + column : -1;
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
    prepare_block(args, plan, b * plan.rows / plan.blocks, (b + 1) * plan.rows / plan.blocks, block);
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
        TileBlock block{reinterpret_cast<Bfloat16*>(slot), reinterpret_cast<TilePlace*>(slot + plan.tiles_at),
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
