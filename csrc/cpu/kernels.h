// The CPU kernels as a table of functions, one table per instruction-set level.
//
// Every file of this folder that defines a table entry is compiled once per level, inside
// `namespace ncsn_fast::NCSN_ISA`, with that level's compiler flags; results are bit-identical.
// Such files use no std:: templates: a shared inline symbol compiled for AVX-512 could be linked into
// the baseline path. Buffers are therefore allocated by dispatch.cpp.
#pragma once

#include "ncsn_fast/add_activation.h"
#include "ncsn_fast/attention.h"
#include "ncsn_fast/copy_channels.h"
#include "ncsn_fast/depth_to_space.h"
#include "ncsn_fast/depthwise_transposed.h"
#include "ncsn_fast/group_norm.h"
#include "ncsn_fast/instance_norm_plus.h"
#include "ncsn_fast/mean_pool2.h"
#include "ncsn_fast/norm_gradients.h"
#include "ncsn_fast/pool5.h"
#include "ncsn_fast/resize_add.h"
#include "ncsn_fast/sampler_update.h"
#include "ncsn_fast/softmax.h"
#include "ncsn_fast/upsample_nearest.h"
#include "ncsn_fast/winograd.h"
#include "tile_kernels.h"

namespace ncsn_fast {

// kAvx2Vnni and kAvx512Vnni run the kernels of kAvx2 and kAvx512, but for winograd's products of integers; kAmx
// those of kAvx512Vnni, but for the ones in tiles. kAmxEmulated is the best level below kAmx: it says that
// kernels in tiles, which every level but kAmx emulates, are wanted nevertheless.
enum class Isa : int {
    kScalar = 0,
    kAvx2 = 1,
    kAvx2Vnni = 2,
    kAvx512 = 3,
    kAvx512Vnni = 4,
    kAmx = 5,
    kAmxEmulated = 6
};

// The instruction that multiplies and adds pairs of integers: none; on 256 bits, AVX-VNNI's or, with the same
// meaning, AVX-512's; AVX-512's on 512 bits.
enum class Vnni { kNone, kAvx, kAvx512Narrow, kAvx512 };

enum class NoiseKind { kWords, kUniform, kNormal };

struct NoiseArgs {
    int64_t batch, numel;
    const int64_t* samples;  // (batch,), values below 2^32
    uint32_t seed, stream, step;
    void* out;  // float32 (batch, numel); words: uint32 (batch, ceil(numel / 4), 4)
};

// Split of a sample into units of work for norms. It depends on the sizes alone, so that
// results do not depend on the batch, the threads or the instruction set.
struct NormPlan {
    int64_t tiles;      // number of tiles of the plane
    int64_t tile_size;  // positions in a tile; the last one may be shorter
    int64_t units;      // tiles (channels last) or channels * tiles
    int64_t slot_floats;  // workspace of one sample

    NormPlan(int64_t channels, int64_t plane, bool channels_last);
};

// What the step before a norm has done for it, and where the step after it reads its output.
struct NormContext {
    const float* strip_sums;  // of x (strip_sums.h); null: x is read for the statistics
    int64_t strip;            // pixels of a strip
    PixelLayout y_pixels;     // of y, where it is channels-last
};

struct NormWorkspace {
    float* data;  // `threads` slots of plan.slot_floats, 64-byte aligned
    int threads;
};

// Split of a batch into units of work for attention: a sample, a head and one of `parts` of its queries.
// Results do not depend on it.
struct AttentionPlan {
    int64_t parts;
    int64_t padded_keys, padded_width;  // keys and value_width, rounded up to a panel
    int64_t values_at, queries_at, scores_at, sums_at, slot_floats;  // workspace of one thread

    AttentionPlan(const AttentionArgs& args, int threads);
};

struct AttentionWorkspace {
    float* data;  // `threads` slots of plan.slot_floats, 64-byte aligned
    int threads;
};

struct SoftmaxWorkspace {
    float* data;  // `threads` slots of slot_floats, 64-byte aligned
    int64_t slot_floats;  // columns, rounded up to 32
    int threads;
};

// Split of a batch into units of work for winograd, each a block of tiles and a group of panels. Results
// do not depend on it.
struct WinogradPlan {
    WinogradSizes sizes;
    int64_t phases_down, phases_along;  // maps of dilation 1 in a sample
    int64_t tiles_down, tiles_along;    // of such a map
    int64_t tiles;                      // of the batch
    int64_t blocks, groups;
    int64_t point_stride;  // elements between the transformed inputs of a block at two points
    int64_t inputs_at, scales_at, products_at, unrounded_at, slot_bytes;  // workspace of one thread
    Vnni vnni;

    WinogradPlan(const WinogradArgs& args, int threads, Isa isa);
};

struct WinogradWorkspace {
    unsigned char* data;  // `threads` slots of plan.slot_bytes, 64-byte aligned
    const void* zeros;    // of the input channels of a pixel
    int threads;
};

struct Kernels {
    void (*noise)(NoiseKind, const NoiseArgs&, int threads);
    void (*box_muller)(const uint32_t* words, int64_t pairs, float* out);
    void (*instance_norm_plus)(const NormArgs&, const NormContext&, const NormPlan&, const NormWorkspace&);
    void (*group_norm)(const GroupNormArgs&, const NormContext&, const NormPlan&, const NormWorkspace&);
    void (*scale_shift)(const ScaleShiftArgs&, const NormPlan&, const NormWorkspace&);
    void (*moments)(const MomentsArgs&, const NormPlan&, const NormWorkspace&);
    void (*norm_gradient)(const NormGradientArgs&, int threads);
    void (*sampler_update)(const UpdateArgs&, int threads);
    void (*add_activation)(const AddActivationArgs&, int threads);
    void (*pool5)(PoolKind, const PoolArgs&, int threads);
    void (*mean_pool2)(const MeanPoolArgs&, int threads);
    void (*resize_add)(const ResizeArgs&, int threads);
    void (*copy_channels)(const CopyChannelsArgs&, int threads);
    void (*upsample_nearest)(const UpsampleArgs&, int threads);
    void (*depth_to_space)(const DepthToSpaceArgs&, int threads);
    void (*depthwise_transposed)(const DepthwiseTransposedArgs&, int threads);
    void (*attention)(const AttentionArgs&, const AttentionPlan&, const AttentionWorkspace&);
    void (*softmax)(const SoftmaxArgs&, const SoftmaxWorkspace&);
    void (*winograd)(const WinogradArgs&, const WinogradPlan&, const WinogradWorkspace&);
};

// Entry points: they choose level and thread count, check the level, and allocate.
// `isa`: -1 for the best level of this machine, else a level of `Isa`; std::invalid_argument if that
// one is not compiled in or not supported by the processor.
Isa resolve_isa(int isa);
bool isa_compiled(Isa isa);
bool isa_supported(Isa isa);
const char* isa_name(Isa isa);

// Whether this build has kernels for AMX, the processor has AMX (tiles and bfloat16), the system has
// enabled it, and the error number with which it refused this process the permission, or 0.
struct AmxState {
    bool compiled, processor, enabled;
    int refusal;

    bool usable() const { return compiled && processor && enabled && refusal == 0; }
};

// Asks the system for the permission when it is called first.
const AmxState& amx_state();

void box_muller_cpu(const uint32_t* words, int64_t pairs, float* out, int isa);
void fill_noise(NoiseKind kind, const NoiseArgs& args, int isa);
void instance_norm_plus_cpu(const NormArgs& args, const NormContext& context, int isa);
void sampler_update_cpu(const UpdateArgs& args, int isa);
void group_norm_cpu(const GroupNormArgs& args, const NormContext& context, int isa);
void scale_shift_cpu(const ScaleShiftArgs& args, int isa);
void moments_cpu(const MomentsArgs& args, int isa);
void norm_gradient_cpu(const NormGradientArgs& args, int isa);
void add_activation_cpu(const AddActivationArgs& args, int isa);
void pool5_cpu(PoolKind kind, const PoolArgs& args, int isa);
void mean_pool2_cpu(const MeanPoolArgs& args, int isa);
void resize_add_cpu(const ResizeArgs& args, int isa);
void copy_channels_cpu(const CopyChannelsArgs& args, int isa);
void upsample_nearest_cpu(const UpsampleArgs& args, int isa);
void depth_to_space_cpu(const DepthToSpaceArgs& args, int isa);
void depthwise_transposed_cpu(const DepthwiseTransposedArgs& args, int isa);
void attention_cpu(const AttentionArgs& args, int isa);
void softmax_cpu(const SoftmaxArgs& args, int isa);
void zero_cpu(void* memory, int64_t bytes);
void zero_around_cpu(Bfloat16* memory, const PaddedMap& map, int64_t batch, int64_t channels, int64_t border);
void winograd_conv_cpu(const WinogradArgs& args, int isa);
void tile_product_cpu(const TileProductArgs& args, int isa);
void tile_conv_cpu(const TileConvArgs& args, int isa);

// Fills values (int16 for bfloat16 maps, else float32) and, for bfloat16 maps, scales, of WinogradSizes;
// weight is (out_channels, in_channels, 3, 3). std::invalid_argument unless all are finite.
void winograd_pack(const float* weight, int64_t in_channels, int64_t out_channels, Dtype dtype,
                   void* values, float* scales);

// Fills values of TileConvSizes; weight is (out_channels, in_channels, taps, taps). std::invalid_argument
// unless all are finite.
void tile_pack(const float* weight, int64_t in_channels, int64_t out_channels, int64_t taps,
               Bfloat16* values);

}  // namespace ncsn_fast
