// Tiles of AMX: 16 rows of 64 bytes that a processor multiplies at once, here with bf16 numbers and fp32 sums.
//
// Tiles 0 to 3 hold the sums of 32 rows by 32 columns, 4 and 5 hold rows, 6 and 7 columns. Each row of a tile of
// columns holds two numbers of each of 16 columns.

#pragma once

#include "numbers.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && \
    defined(__linux__)
#define SEGUE_TILES 1

namespace segue {

constexpr int64_t kTile = 16;  // rows, or columns
constexpr int64_t kTileNumbers = 32;  // in a row
constexpr int64_t kSums = 2 * kTile;  // rows, and columns, of all four tiles of sums
constexpr int64_t kStepNumbers = kSums * kTileNumbers;  // of 32 columns, which a step multiplies

// Each instruction on tiles gets a line of decoded instructions for itself. While the other half of the core is busy,
// perhaps with another machine's work, instructions that are close together take up to five times as long.
#define SEGUE_APART asm volatile(".p2align 6" ::: "memory")

// Configures the tiles for so many rows of sums; tiles that hold none of these rows keep their full size.
inline void set_tiles(int64_t num_rows) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = 64, config.rows[tile] = kTile;
    const uint8_t low = num_rows < kTile ? num_rows : kTile, high = num_rows > kTile ? num_rows - kTile : kTile;
    config.rows[0] = config.rows[1] = config.rows[4] = low;
    config.rows[2] = config.rows[3] = config.rows[5] = high;
    asm volatile("" ::"r"(&config) : "memory");  // GCC believes that the next line reads eight bytes
    _tile_loadconfig(&config);
}

// Holds the thread's tiles and releases them in the end: a thread with tiles costs more to switch.
class Tiles {
   public:
    ~Tiles() { release(); }
    void release() {
        if (num_rows_) _tile_release();
        num_rows_ = 0;
    }
    void set(int64_t num_rows) {
        if (num_rows != num_rows_) set_tiles(num_rows_ = num_rows);
    }

   private:
    int64_t num_rows_ = 0;
};

// Two to the power of numbers, with a relative error of 8e-5: a twenty-fifth of what rounding to bf16 may change.
inline Floats power_of_two(Floats numbers) {
    const auto exponent = reinterpret_cast<__m512>(numbers);
    const auto rest = reinterpret_cast<Floats>(_mm512_reduce_ps(exponent, 1));  // what is above the whole number below
    Floats power = rest * 7.802452147006989e-2f + 2.2606715559959412e-1f;
    power = power * rest + 6.958335638046265e-1f;
    power = power * rest + 9.999251961708069e-1f;
    return reinterpret_cast<Floats>(_mm512_scalef_ps(reinterpret_cast<__m512>(power), exponent));
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Fetches from memory what is needed later: in each step a part of 2 KiB, in four times `num_lines` lines of 64 bytes.
struct Fetch {
    const char* next = nullptr;
    int64_t num_lines = 0;

    void some() {
        for (int64_t line = 0; line < num_lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }
    void end_step() { next += (32 - 4 * num_lines) * 64; }
};

// Adds rows times columns, each with `num_steps` times 32 numbers, to the sums. The stride is in bytes; `between` is
// called num_steps times, for work that fits beside the tiles'. The columns of a step come as 16, then the other 16.
template <bool kHasHigh, typename Between>
inline void add_products(const BFloat16* low, const BFloat16* high, int64_t stride, const BFloat16* columns,
                         int64_t num_steps, Fetch fetch, Between&& between) {
    for (int64_t step = 0; step < num_steps; ++step) {
        SEGUE_APART;
        _tile_loadd(6, columns, 64);
        fetch.some();
        SEGUE_APART;
        _tile_loadd(4, low, stride);
        fetch.some();
        SEGUE_APART;
        _tile_dpbf16ps(0, 4, 6);
        fetch.some();
        SEGUE_APART;
        _tile_loadd(7, columns + kStepNumbers / 2, 64);
        fetch.some();
        SEGUE_APART;
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kHasHigh) {
            SEGUE_APART;
            _tile_loadd(5, high, stride);
            SEGUE_APART;
            _tile_dpbf16ps(2, 5, 6);
            SEGUE_APART;
            _tile_dpbf16ps(3, 5, 7);
        }
        between();
        fetch.end_step();
        low += kTileNumbers, high += kTileNumbers, columns += kStepNumbers;
    }
}

// Writes the sums to `[32, stride]`, or 16 rows of them.
template <bool kHasHigh>
inline void store_sums(float* sums, int64_t stride) {
    const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
    SEGUE_APART;
    _tile_stored(0, sums, bytes);
    SEGUE_APART;
    _tile_stored(1, sums + kTile, bytes);
    if constexpr (kHasHigh) {
        SEGUE_APART;
        _tile_stored(2, sums + kTile * stride, bytes);
        SEGUE_APART;
        _tile_stored(3, sums + kTile * stride + kTile, bytes);
    }
}

}  // namespace segue

#endif
