// Convolution with 3x3 weights, stride 1, dilation d and padding d, of channels-last maps:
//
//   out[i, j] = bias + sum over k, l of w[k, l] x[i + d (k - 1), j + d (l - 1)]   (+ added[i, j])
//
// by Winograd's F(4x4, 3x3) in the form of Toom and Cook (Lavin and Gray 2016, section 4.1):
//
//   tile = A^T [ sum over channels of (G w G^T) * (B^T x B) ] A
//
// An output tile of 4x4 pixels takes 36 multiplications per pair of channels, where the sum above takes
// 144. With dilation d the pixels of equal (row mod d, column mod d) make d^2 maps of dilation 1.
//
// bfloat16 maps are multiplied in fixed point: B^T x B as integers of at most kWinogradLevels, with a
// scale for each tile and point, and G w G^T as 16-bit integers, with a scale for each point and output
// channel that keeps every sum of kWinogradChunk products within 32 bits. Sums of integers are exact, so
// these bits depend on no order. On ELU outputs of normals the error is 0.8 of that of a direct
// convolution with bfloat16 weights; with bfloat16 in place of the integers it would be 5 times that.
#pragma once

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

constexpr int kWinogradTile = 4;
constexpr int kWinogradWindow = kWinogradTile + 2;
constexpr int kWinogradPoints = kWinogradWindow * kWinogradWindow;
constexpr int kWinogradPanel = 32;   // output channels that are multiplied together
constexpr int kWinogradAlign = 16;   // input channels are padded with zeros to a multiple
constexpr int kWinogradChunk = 128;  // input channels summed before the sum is kept as a float32
constexpr int kWinogradLevels = 8191;

// Interpolation is at 0, +-kNear, +-kFar and infinity. At the customary 0, +-1, +-2 the error is twice
// as large.
constexpr float kNear = 0.75f, kFar = 1.5f;
constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar;

// Layout of the transformed weights: values [panel][point][channel / group][output channel][group],
// where group is 2 for fixed point (int16) and 1 for float32; scales [panel][point][output channel].
struct WinogradSizes {
    int64_t channels, panels;  // padded input channels; panels of output channels
    int64_t values, scales;    // elements

    WinogradSizes(int64_t in_channels, int64_t out_channels)
        : channels((in_channels + kWinogradAlign - 1) / kWinogradAlign * kWinogradAlign),
          panels((out_channels + kWinogradPanel - 1) / kWinogradPanel),
          values(panels * kWinogradPoints * kWinogradPanel * channels),
          scales(panels * kWinogradPoints * kWinogradPanel) {}
};

struct WinogradArgs {
    int64_t batch, height, width, in_channels, out_channels, dilation;
    const void* x;
    const void* values;   // for bfloat16 maps int16, else float32
    const float* scales;  // for bfloat16 maps
    const float* bias;    // (out_channels,); null: none
    const void* added;    // null: none; it may be out
    void* out;            // not x
    int64_t out_row;      // elements between two pixels of out, out_channels if it is `added`
    Dtype dtype;          // of x, added and out
};

// B^T d along one axis, for windows of a step between elements; V: float or a vector of floats.
template <class V>
NCSN_HD void winograd_input(const V* d, V* out, int step) {
    const V d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    const V even_near = d4 - kFar2 * d2, odd_near = kNear * d3 - (kNear * kFar2) * d1;
    const V even_far = d4 - kNear2 * d2, odd_far = kFar * d3 - (kFar * kNear2) * d1;
    out[0] = (kNear2 * kFar2) * d[0] - (kNear2 + kFar2) * d2 + d4;
    out[step] = even_near + odd_near;
    out[2 * step] = even_near - odd_near;
    out[3 * step] = even_far + odd_far;
    out[4 * step] = even_far - odd_far;
    out[5 * step] = (kNear2 * kFar2) * d1 - (kNear2 + kFar2) * d3 + d[5 * step];
}

// A^T m along one axis.
template <class V>
NCSN_HD void winograd_output(const V* m, V* out, int step) {
    const V even_near = m[step] + m[2 * step], odd_near = m[step] - m[2 * step];
    const V even_far = m[3 * step] + m[4 * step], odd_far = m[3 * step] - m[4 * step];
    out[0] = m[0] + even_near + even_far;
    out[step] = kNear * odd_near + kFar * odd_far;
    out[2 * step] = kNear2 * even_near + kFar2 * even_far;
    out[3 * step] = (kNear2 * kNear) * odd_near + (kFar2 * kFar) * odd_far + m[5 * step];
}

}  // namespace ncsn_fast
