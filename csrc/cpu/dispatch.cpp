// Chooses the instruction-set level and the number of threads of a CPU call, and owns its buffers.
#include <omp.h>
#if defined(NCSN_X86_LEVELS)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace ncsn_fast {

namespace scalar {
extern const Kernels kKernels;
extern const TileKernels kTileKernels;
}
#if defined(NCSN_X86_LEVELS)
namespace avx2 {
extern const Kernels kKernels;
extern const TileKernels kTileKernels;
}
namespace avx512 {
extern const Kernels kKernels;
extern const TileKernels kTileKernels;
}
#endif
#if defined(NCSN_AMX_LEVEL)
namespace amx {
extern const TileKernels kTileKernels;
}
#endif

namespace {

constexpr int64_t kElementsPerThread = 16384;  // below this a second thread costs more than it saves
constexpr int64_t kTileElements = 8192;        // 32 KiB of float32: read twice from the L1 or L2 cache
constexpr int64_t kMaxTileRows = 512;          // bounds sequential float32 sums, channels last
constexpr int64_t kInputBytes = 448 * 1024;    // per Winograd block: fits an L2 cache of 1 MiB
constexpr int64_t kTileInputBytes = 1024 * 1024;  // per block of tiles: half of an L2 cache where AMX is
constexpr int64_t kFewestTiles = 8, kMostTiles = 28;  // per block: more reuse weights, fewer fit caches

// The best level of this machine, without AMX.
Isa best_vectors() {
    static const Isa best = isa_supported(Isa::kAvx512Vnni) ? Isa::kAvx512Vnni
                            : isa_supported(Isa::kAvx512)   ? Isa::kAvx512
                            : isa_supported(Isa::kAvx2Vnni) ? Isa::kAvx2Vnni
                            : isa_supported(Isa::kAvx2)     ? Isa::kAvx2
                                                            : Isa::kScalar;
    return best;
}

// The level of the kernels that use no tiles.
Isa vector_level(int isa) {
    const Isa level = resolve_isa(isa);
    return level >= Isa::kAmx ? best_vectors() : level;
}

const Kernels& kernels(int isa) {
    switch (vector_level(isa)) {
#if defined(NCSN_X86_LEVELS)
        case Isa::kAvx512Vnni:
        case Isa::kAvx512:
            return avx512::kKernels;
        case Isa::kAvx2Vnni:
        case Isa::kAvx2:
            return avx2::kKernels;
#endif
        default:
            return scalar::kKernels;
    }
}

const TileKernels& tile_kernels(int isa) {
#if defined(NCSN_AMX_LEVEL)
    if (resolve_isa(isa) == Isa::kAmx) return amx::kTileKernels;
#endif
    switch (vector_level(isa)) {
#if defined(NCSN_X86_LEVELS)
        case Isa::kAvx512Vnni:
        case Isa::kAvx512:
            return avx512::kTileKernels;
        case Isa::kAvx2Vnni:
        case Isa::kAvx2:
            return avx2::kTileKernels;
#endif
        default:
            return scalar::kTileKernels;
    }
}

int threads_for(int64_t elements, int64_t pieces) {
    const int64_t useful = std::min(elements / kElementsPerThread + 1, pieces);
    return static_cast<int>(std::clamp<int64_t>(useful, 1, omp_get_max_threads()));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_keys(const char* what, const char* name, const int64_t* keys, int64_t batch) {
    for (int64_t i = 0; i < batch; ++i) {
        if (keys[i] < 0 || keys[i] > 0xffffffffll) {
            throw std::invalid_argument(std::string(what) + " must be in [0, 2**32); got " + name + "[" +
                                        std::to_string(i) + "] = " + std::to_string(keys[i]));
        }
    }
}

void check_samples(const int64_t* samples, int64_t batch) {
    check_keys("sample indices", "samples", samples, batch);
}

// At least so many bytes, aligned to a cache line; kept by the thread between calls.
unsigned char* workspace(int64_t bytes) {
    thread_local std::vector<unsigned char> buffer;
    const auto size = static_cast<size_t>(bytes + 64);
    if (buffer.size() < size) buffer.resize(size);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    return reinterpret_cast<unsigned char*>((address + 63) / 64 * 64);
}

#if defined(NCSN_X86_LEVELS)
bool has_avx_vnni() {  // compilers name it in different versions
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1u) != 0;
}

bool has_avx512_vnni() { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"); }
#endif

Vnni vnni_of([[maybe_unused]] Isa isa) {
#if defined(NCSN_X86_LEVELS)
    if (isa == Isa::kAvx512Vnni) return Vnni::kAvx512;
    if (isa == Isa::kAvx2Vnni) return has_avx_vnni() ? Vnni::kAvx : Vnni::kAvx512Narrow;
#endif
    return Vnni::kNone;
}

// Runs a norm that has something to do, with one slot of workspace for each thread.
template <class Args, class Run>
void run_norm(const Args& args, Run run) {
    const NormPlan plan(args.channels, args.plane, args.channels_last);
    const int threads = threads_for(args.batch * args.channels * args.plane, args.batch * plan.units);
    const int64_t floats = threads * plan.slot_floats;
    auto* const data = reinterpret_cast<float*>(workspace(floats * static_cast<int64_t>(sizeof(float))));
    run(plan, NormWorkspace{data, threads});
}

}  // namespace

NormPlan::NormPlan(int64_t channels, int64_t plane, bool channels_last) {
    const int64_t rows = std::clamp<int64_t>(kTileElements / channels, 1, kMaxTileRows);
    tile_size = channels_last ? rows : kTileElements;
    tiles = ceil_div(plane, tile_size);
    units = channels_last ? tiles : channels * tiles;
    slot_floats = ceil_div((7 + 3 * tiles) * channels, 32) * 32;
}

WinogradPlan::WinogradPlan(const WinogradArgs& args, int threads, Isa isa)
    : sizes(args.in_channels, args.out_channels) {
    phases_down = std::min(args.dilation, args.height);
    phases_along = std::min(args.dilation, args.width);
    tiles_down = ceil_div(ceil_div(args.height, args.dilation), kWinogradTile);
    tiles_along = ceil_div(ceil_div(args.width, args.dilation), kWinogradTile);
    tiles = args.batch * phases_down * phases_along * tiles_down * tiles_along;

    const bool fixed = args.dtype == Dtype::kBfloat16;
    const int64_t element = fixed ? sizeof(int16_t) : sizeof(float);
    const int64_t most = std::clamp<int64_t>(kInputBytes / (kWinogradPoints * sizes.channels * element),
                                             kFewestTiles, kMostTiles);
    blocks = ceil_div(tiles, most);
    if (blocks >= threads) {
        blocks = std::min(ceil_div(blocks, threads) * threads, tiles);
        groups = 1;
    } else {
        groups = std::min(ceil_div(threads, blocks), sizes.panels);
    }
    const int64_t block_tiles = ceil_div(tiles, blocks);

    const auto lines = [](int64_t bytes) { return ceil_div(bytes, 64) * 64; };
    point_stride = block_tiles * sizes.channels + 64 / element;  // one line extra: avoids set conflicts
    inputs_at = 0;
    scales_at = inputs_at + lines(kWinogradPoints * point_stride * element);
    products_at = scales_at + lines(kWinogradPoints * block_tiles * sizeof(float));
    unrounded_at = products_at + lines(block_tiles * kWinogradPoints * kWinogradPanel * sizeof(float));
    slot_bytes = unrounded_at + (fixed ? lines(kWinogradPoints * sizes.channels * sizeof(float)) : 0);
    vnni = vnni_of(isa);
}

TileConvPlan::TileConvPlan(const TileConvArgs& args, int threads)
    : sizes(args.in_channels, args.out_channels, args.taps) {
    reach = args.taps / 2 * args.dilation;
    const bool padded = args.border >= 0;
    const PaddedMap x(args.batch, args.height, args.width, args.in_channels, padded ? args.border : reach);
    pixel = x.pixels.pixel, pitch = x.pixels.row / pixel, image = x.pixels.image;
    along = ceil_div(args.width, kTileRun);
    wraps = ceil_div((args.height - 1) * pitch + args.width, kTileRun) < args.height * along;

    strip = args.strip_sums == nullptr ? 1 : Strips(args.height, args.width).rows;
    strips = ceil_div(args.height, strip);
    const int64_t all = args.batch * strips;
    constexpr int64_t element = sizeof(Bfloat16);
    const int64_t fitting = kTileInputBytes / (pitch * pixel * element);
    const int64_t most = std::max<int64_t>({fitting - 2 * reach, 4 * reach, strip});  // bounds the rows read twice
    blocks = ceil_div(all, most / strip), groups = 1;
    if (blocks >= threads) {
        blocks = std::min(ceil_div(blocks, threads) * threads, all);
    } else {
        groups = std::min(ceil_div(threads, blocks), sizes.panels);
        blocks = std::min(std::max(blocks, ceil_div(threads, groups)), all);
    }
    const int64_t most_rows = ceil_div(all, blocks) * strip;
    const int64_t images = (most_rows + args.height - 2) / args.height + 1;

    const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 64) * 64; };
    const int64_t padding = 2 * reach * pitch + 2 * reach + kTileRun;  // pixels for each image
    const int64_t tiles = wraps ? most_rows * pitch / kTileRun + images : most_rows * along;
    tiles_at = padded ? 0 : aligned((most_rows * pitch + images * padding) * pixel * element);
    sums_at = tiles_at + aligned(tiles * static_cast<int64_t>(sizeof(TilePlace)));
    slot_bytes = sums_at + aligned(2 * 2 * kTileRun * kTilePanel * static_cast<int64_t>(sizeof(float)));
}

bool isa_compiled(Isa isa) {
#if defined(NCSN_X86_LEVELS)
    if (isa >= Isa::kScalar && isa <= Isa::kAvx512Vnni) return true;
#endif
    if (isa == Isa::kAmx) return amx_state().compiled;
    return isa == Isa::kScalar || isa == Isa::kAmxEmulated;
}

bool isa_supported(Isa isa) {
    if (!isa_compiled(isa)) return false;
    if (isa == Isa::kAmx) return amx_state().usable();
#if defined(NCSN_X86_LEVELS)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::kAvx2) return avx2;
    if (isa == Isa::kAvx2Vnni) return avx2 && (has_avx_vnni() || has_avx512_vnni());
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == Isa::kAvx512) return avx512;
    if (isa == Isa::kAvx512Vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
    return true;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kAmxEmulated:
            return "amx_emulated";
        case Isa::kAmx:
            return "amx";
        case Isa::kAvx512Vnni:
            return "avx512_vnni";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAvx2Vnni:
            return "avx2_vnni";
        case Isa::kAvx2:
            return "avx2";
        default:
            return "scalar";
    }
}

Isa resolve_isa(int isa) {
    static const Isa best = isa_supported(Isa::kAmx) ? Isa::kAmx : best_vectors();
    if (isa == -1) return best;
    if (!isa_supported(static_cast<Isa>(isa))) {
        throw std::invalid_argument("instruction-set level " + std::to_string(isa) +
                                    " is not available here; the best one is " + isa_name(best));
    }
    return static_cast<Isa>(isa);
}

void box_muller_cpu(const uint32_t* words, int64_t pairs, float* out, int isa) {
    kernels(isa).box_muller(words, pairs, out);
}

void fill_noise(NoiseKind kind, const NoiseArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    check_samples(args.samples, args.batch);
    if (args.batch == 0 || args.numel == 0) return;
    const int64_t elements = args.batch * args.numel;
    chosen.noise(kind, args, threads_for(elements, elements));
}

void instance_norm_plus_cpu(const NormArgs& args, const NormContext& context, int isa) {
    const Kernels& chosen = kernels(isa);
    if (args.batch == 0 || args.channels == 0 || args.plane == 0) return;
    run_norm(args, [&](const auto&... slots) { chosen.instance_norm_plus(args, context, slots...); });
}

void group_norm_cpu(const GroupNormArgs& args, const NormContext& context, int isa) {
    const Kernels& chosen = kernels(isa);
    if (args.batch == 0 || args.channels == 0 || args.plane == 0) return;
    run_norm(args, [&](const auto&... slots) { chosen.group_norm(args, context, slots...); });
}

void scale_shift_cpu(const ScaleShiftArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    if (args.batch == 0 || args.channels == 0 || args.plane == 0) return;
    run_norm(args, [&](const auto&... slots) { chosen.scale_shift(args, slots...); });
}

void moments_cpu(const MomentsArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    if (args.batch == 0 || args.channels == 0 || args.plane == 0) return;
    run_norm(args, [&](const auto&... slots) { chosen.moments(args, slots...); });
}

void norm_gradient_cpu(const NormGradientArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    if (args.batch == 0 || args.channels == 0 || args.plane == 0) return;
    const int64_t elements = args.batch * args.channels * args.plane;
    chosen.norm_gradient(args, threads_for(elements, elements));
}

void sampler_update_cpu(const UpdateArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    check_samples(args.samples, args.batch);
    if (args.seeds != nullptr) check_keys("seeds", "seeds", args.seeds, args.batch);
    const int64_t elements = args.batch * args.channels * args.plane;
    UpdateArgs one = args;
    if (elements == 0 || !read_row(args, one.row)) return;
    chosen.sampler_update(one, threads_for(elements, elements));
}

void add_activation_cpu(const AddActivationArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    chosen.add_activation(args, threads_for(args.count, args.count));
}

void pool5_cpu(PoolKind kind, const PoolArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t elements = args.batch * args.channels * args.height * args.width;
    if (elements == 0) return;
    chosen.pool5(kind, args, threads_for(elements, elements));
}

void mean_pool2_cpu(const MeanPoolArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t rows = args.batch * (args.height / 2);
    chosen.mean_pool2(args, threads_for(2 * rows * args.width * args.channels, rows));
}

void resize_add_cpu(const ResizeArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t rows = args.batch * args.out_height;
    chosen.resize_add(args, threads_for(rows * args.out_width * args.channels, rows));
}

void copy_channels_cpu(const CopyChannelsArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    if (args.pixels == 0 || args.channels == 0) return;
    chosen.copy_channels(args, threads_for(args.pixels * args.channels, args.pixels));
}

void upsample_nearest_cpu(const UpsampleArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t lines = args.batch * args.height, columns = args.width * args.columns;
    if (lines == 0 || columns == 0 || args.rows == 0 || args.channels == 0) return;
    chosen.upsample_nearest(args, threads_for(lines * args.rows * columns * args.channels, lines));
}

void depth_to_space_cpu(const DepthToSpaceArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t lines = args.batch * args.out_height, elements = lines * args.out_width * args.channels;
    if (elements == 0) return;
    chosen.depth_to_space(args, threads_for(elements, lines));
}

void depthwise_transposed_cpu(const DepthwiseTransposedArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t lines = args.batch * args.out_height, reached = ceil_div(args.taps, args.stride);
    const int64_t elements = lines * args.out_width * args.channels;
    if (elements == 0) return;
    chosen.depthwise_transposed(args, threads_for(elements * (reached * reached + 1), lines));
}

AttentionPlan::AttentionPlan(const AttentionArgs& args, int threads) {
    const int64_t units = args.batch * args.heads;
    // Of few units each thread gets the same share; of many, whole ones, whose keys are packed once.
    parts = units >= 4 * threads ? 1 : std::min<int64_t>(threads / std::gcd<int64_t>(units, threads), args.queries);
    padded_keys = ceil_div(args.keys, kAttentionPanel) * kAttentionPanel;
    padded_width = ceil_div(args.value_width, kAttentionPanel) * kAttentionPanel;
    const auto lines = [](int64_t floats) { return ceil_div(floats, 16) * 16; };
    values_at = lines(padded_keys * args.width);
    queries_at = values_at + lines(args.keys * padded_width);
    scores_at = queries_at + lines(kAttentionRows * args.width);
    sums_at = scores_at + kAttentionRows * padded_keys;
    slot_floats = sums_at + kAttentionRows * padded_width;
}

void attention_cpu(const AttentionArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t rows = args.batch * args.heads * args.queries;
    if (rows == 0 || args.value_width == 0) return;
    constexpr int64_t kProductsOfElement = 16;  // take about as long as another kernel's element
    const int64_t work = rows * ((args.keys * (args.width + args.value_width)) / kProductsOfElement + 1);
    const int threads = threads_for(work, rows);
    const AttentionPlan plan(args, threads);
    const int64_t floats = threads * plan.slot_floats;
    auto* const data = reinterpret_cast<float*>(workspace(floats * static_cast<int64_t>(sizeof(float))));
    chosen.attention(args, plan, {data, threads});
}

void softmax_cpu(const SoftmaxArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    if (args.rows == 0 || args.columns == 0) return;
    constexpr int64_t kExponential = 4;  // takes about as long as so many elements of another kernel
    const int threads = threads_for(kExponential * args.rows * args.columns, args.rows);
    const int64_t padded = ceil_div(args.columns, 32) * 32;
    auto* const data = workspace(threads * padded * static_cast<int64_t>(sizeof(float)));
    chosen.softmax(args, {reinterpret_cast<float*>(data), padded, threads});
}

void zero_cpu(void* memory, int64_t bytes) {
    constexpr int64_t kChunk = 1 << 16;
    const int threads = threads_for(bytes / static_cast<int64_t>(sizeof(float)), ceil_div(bytes, kChunk));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < bytes; first += kChunk) {
        std::memset(static_cast<char*>(memory) + first, 0, static_cast<size_t>(std::min(kChunk, bytes - first)));
    }
}

// The zeros of a padded map. Beyond a pixel's last channel they are those that a product reads.
void zero_around_cpu(Bfloat16* memory, const PaddedMap& map, int64_t batch, int64_t channels, int64_t border) {
    const int64_t pixel = map.pixels.pixel, row = map.pixels.row, height = map.pixels.height;
    const int64_t lines = batch * (height + border), rest = ceil_div(channels, kTileChunk) * kTileChunk - channels;
    const int threads = threads_for(lines * (border + 1) * pixel, lines);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < lines; ++i) {
        Bfloat16* const line = memory + i * row;
        const bool outside = i % (height + border) < border;
        std::fill_n(line, outside ? row : border * pixel, Bfloat16{0});
        for (int64_t w = 0; w < map.pixels.width && rest > 0 && !outside; ++w) {
            std::fill_n(line + (border + w) * pixel + channels, rest, Bfloat16{0});
        }
    }
    std::fill(memory + lines * row, memory + map.elements, Bfloat16{0});
}

void winograd_conv_cpu(const WinogradArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    if (args.batch == 0 || args.height == 0 || args.width == 0 || args.out_channels == 0) return;
    const int64_t work = args.batch * args.height * args.width * ceil_div(args.out_channels, kWinogradPanel);
    const int threads = threads_for(work * (args.in_channels + 1), work);
    const WinogradPlan plan(args, threads, vector_level(isa));
    const int64_t pixel_bytes = ceil_div(plan.sizes.channels * sizeof(float), 64) * 64;
    unsigned char* const aligned = workspace(pixel_bytes + threads * plan.slot_bytes);
    std::fill_n(aligned, pixel_bytes, 0);
    chosen.winograd(args, plan, {aligned + pixel_bytes, aligned, threads});
}

void tile_product_cpu(const TileProductArgs& args, int isa) { tile_kernels(isa).product(args); }

void tile_conv_cpu(const TileConvArgs& args, int isa) {
    const TileKernels& chosen = tile_kernels(isa);
    if (args.batch == 0 || args.height == 0 || args.width == 0 || args.out_channels == 0) return;
    TileConvArgs within = args;  // all taps but the middle one are outside at this dilation, too
    within.dilation = std::min(args.dilation, std::max(args.height, args.width));
    const int64_t work = args.batch * args.height * args.width * ceil_div(args.out_channels, kTilePanel);
    const int threads = threads_for(work * (args.in_channels + 1), work);
    const TileConvPlan plan(within, threads);
    chosen.convolution(within, plan, {workspace(threads * plan.slot_bytes), threads});
}

}  // namespace ncsn_fast
