// Products of tokens and weights by tiles. What follows a product is applied before its sums are rounded, and while the
// next sums are added up.

#include "products.h"

#include <algorithm>
#include <cstdlib>

#include "tiles.h"

#ifdef SEGUE_TILES

#include <sys/syscall.h>
#include <unistd.h>

namespace segue {
namespace {

constexpr int64_t kCacheBytes = 768 << 10;  // of inputs, which stay in the cache while weights pass by

// As exact as bf16 needs, to which the result is rounded next.
inline Floats silu(Floats numbers) {
    const auto total = reinterpret_cast<__m512>(power_of_two(numbers * -kPerBit) + 1.0f);
    return numbers * reinterpret_cast<Floats>(_mm512_rcp14_ps(total));
}

// Writes a token's sums of a panel to the outputs.
template <After kAfter>
inline void finish(const Product& product, const float* sums, int64_t token, int64_t panel) {
    const int64_t first = panel * kSums;
    Floats low = load16(sums), high = load16(sums + kTile);
    const int64_t num_low = product.num_outputs - first, num_high = num_low - kTile;
    if (product.bias) {
        low += load_some(product.bias + first, num_low);
        if (num_high > 0) high += load_some(product.bias + first + kTile, num_high);
    }
    if constexpr (kAfter == kGate) {
        store16(product.outputs + token * (product.num_outputs / 2) + panel * kTile, silu(low) * high);
    } else {
        const int64_t at = token * product.num_outputs + first;
        if constexpr (kAfter == kAdd) {
            low += load_some(product.other + at, num_low);
            if (num_high > 0) high += load_some(product.other + at + kTile, num_high);
        }
        if (num_high >= kTile) return store32(product.outputs + at, low, high);
        store_some(product.outputs + at, low, num_low);
        if (num_high > 0) store_some(product.outputs + at + kTile, high, num_high);
    }
}

template <After kAfter>
void multiply_then(Member& member, const Product& product) {
    const int64_t width = product.num_inputs, num_steps = width / kTileNumbers;
    const int64_t num_panels = (product.num_outputs + kSums - 1) / kSums;
    const int64_t at_once = std::max(kSums, kCacheBytes / (width * 2) / kSums * kSums);
    const int64_t num_passes = (product.num_tokens + at_once - 1) / at_once;
    Tiles tiles;
    alignas(64) float buffers[2][kSums * kSums];
    int64_t num_rows = 0, num_done = 0, first = 0, of_panel = 0;  // of the sums that are still to be written
    int current = 0;
    const auto finish_until = [&](int64_t end) {
        for (; num_done < end; ++num_done)
            finish<kAfter>(product, buffers[current ^ 1] + num_done * kSums, first + num_done, of_panel);
    };
    const auto multiply_panel = [&](int64_t start, int64_t stop, int64_t panel) {
        const BFloat16* columns = product.packed + panel * num_steps * kStepNumbers;
        // Fetches the next panel, a part of it with each of the first rows.
        const int64_t num_blocks = (stop - start + kSums - 1) / kSums;
        const int64_t num_lines = (8 + num_blocks - 1) / num_blocks;
        const auto fetch_of = [&](int64_t done) {
            const int64_t first = done / kSums * num_lines * 4;
            const auto* next = reinterpret_cast<const char*>(columns + num_steps * kStepNumbers);
            return first < 32 ? Fetch{next + first * 64, num_lines} : Fetch{};
        };
        for (int64_t token = start; token < stop; token += kSums) {
            const int64_t rows = std::min(kSums, stop - token);
            const BFloat16 *low = product.inputs + token * width, *high = low + kTile * width;
            const auto between = [&] { finish_until(std::min(num_done + 2, num_rows)); };
            const auto add = [&](auto has_high) {
                zero_sums();
                add_products<has_high>(low, high, width * 2, columns, num_steps, fetch_of(token - start), between);
                store_sums<has_high>(buffers[current], kSums);
            };
            tiles.set(rows);
            rows > kTile ? add(std::true_type{}) : add(std::false_type{});
            finish_until(num_rows);
            num_rows = rows, num_done = 0, first = token, of_panel = panel;
            current ^= 1;
        }
    };
    member.share(num_passes * num_panels, [&](int64_t item, int64_t end) {
        for (; item < end; ++item) {
            const int64_t start = item / num_panels * at_once;
            multiply_panel(start, std::min(start + at_once, product.num_tokens), item % num_panels);
        }
    });
    finish_until(num_rows);
}

}  // namespace

void multiply(Member& member, const Product& product) {
    switch (product.after) {
        case kNothing:
            return multiply_then<kNothing>(member, product);
        case kAdd:
            return multiply_then<kAdd>(member, product);
        case kGate:
            return multiply_then<kGate>(member, product);
    }
}

}  // namespace segue

using namespace segue;

extern "C" {

int segue_has_tiles() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool may = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return may;
}

void segue_pack(const void* weights, void* packed, int64_t num_outputs, int64_t num_inputs) {
    const auto* from = static_cast<const BFloat16*>(weights);
    auto* to = static_cast<BFloat16*>(packed);
    for (int64_t panel = 0; panel < num_outputs; panel += kSums)
        for (int64_t step = 0; step < num_inputs; step += kTileNumbers)
            for (int64_t first = panel; first < panel + kSums; first += kTile)
                for (int64_t pair = step; pair < step + kTileNumbers; pair += 2)
                    for (int64_t output = first; output < first + kTile; ++output, to += 2)
                        if (output < num_outputs)
                            std::memcpy(to, from + output * num_inputs + pair, 2 * sizeof *to);
                        else
                            std::memset(to, 0, 2 * sizeof *to);
}

void segue_product(int after, const void* inputs, const void* packed, const void* bias, const void* other,
                   void* outputs, int64_t num_tokens, int64_t num_outputs, int64_t num_inputs, int num_threads) {
    const auto numbers = [](const void* address) { return static_cast<const BFloat16*>(address); };
    const Product product{
        static_cast<After>(after),       numbers(inputs), numbers(packed), numbers(bias), numbers(other),
        static_cast<BFloat16*>(outputs), num_tokens,      num_outputs,     num_inputs};
    Team::run(num_threads, [&](Member& member) { multiply(member, product); });
}

}  // extern "C"

#else

void segue::multiply(Member&, const Product&) { std::abort(); }

extern "C" {

int segue_has_tiles() { return 0; }
void segue_pack(const void*, void*, int64_t, int64_t) { std::abort(); }
void segue_product(int, const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int) {
    std::abort();
}

}  // extern "C"

#endif
