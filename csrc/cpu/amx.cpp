// Whether this process can use AMX. Linux gives the memory that a thread's tiles need, 8 KiB, to processes
// that ask for it, once and for all of their threads; from 5.16 on it can.
#include "kernels.h"

#if defined(NCSN_AMX_LEVEL) && defined(__linux__)
#include <cpuid.h>
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ncsn_fast {

#if defined(NCSN_AMX_LEVEL) && defined(__linux__)

namespace {

constexpr unsigned kOsxsave = 1u << 27;                        // leaf 1, ecx
constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;   // leaf 7, edx
constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;  // components of the state that is saved
constexpr int kRequestPermission = 0x1023, kTileDataNumber = 18;  // of arch_prctl

unsigned enabled_state() {
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

AmxState find_state() {
    AmxState state{true, false, false, 0};
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return state;
    state.processor = (d & kAmxTile) != 0 && (d & kAmxBf16) != 0 && isa_supported(Isa::kAvx512Vnni);
    if (!state.processor || __get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsxsave) == 0) return state;
    constexpr unsigned both = kTileConfig | kTileData;
    state.enabled = (enabled_state() & both) == both;
    if (state.enabled && syscall(SYS_arch_prctl, kRequestPermission, kTileDataNumber) != 0) state.refusal = errno;
    return state;
}

}  // namespace

const AmxState& amx_state() {
    static const AmxState state = find_state();
    return state;
}

#else

const AmxState& amx_state() {
    static const AmxState state{false, false, false, 0};
    return state;
}

#endif

}  // namespace ncsn_fast
