#include "csrc/pixel_labels.h"

#include <algorithm>
#include <stdexcept>

#include "csrc/cpu_dispatch.h"

namespace gvit {
namespace {

// The kinds of one line of the map; the last one stands twice, because it has no right neighbour.
struct KindsOfLine {
    static GVIT_INLINE void run(const RowMap& map, const int64_t& line, int32_t* const& out) {
        const int32_t* __restrict__ rows = map.row_of_pixel + line * map.width;
        const int32_t* __restrict__ kinds = map.kind_of_row;
        int32_t* __restrict__ target = out;
        uint32_t most = 0;
        for (int64_t x = 0; x < map.width; ++x) most = std::max(most, static_cast<uint32_t>(rows[x]));
        if (most >= map.rows) throw std::invalid_argument("a pixel's row is not in the table");
        for (int64_t x = 0; x < map.width; ++x) target[x] = kinds[rows[x]];
        target[map.width] = target[map.width - 1];
    }
};

// The kind of each pixel and its right, lower and lower right neighbours, or -1 where they differ.
struct Cells {
    static GVIT_INLINE void run(const int32_t* const& upper, const int32_t* const& lower, const int64_t& width,
                                int32_t* const& out) {
        const int32_t* __restrict__ a = upper;
        const int32_t* __restrict__ b = lower;
        int32_t* __restrict__ target = out;
        for (int64_t x = 0; x < width; ++x) {
            const int32_t differ = (a[x] ^ a[x + 1]) | (a[x] ^ b[x]) | (a[x] ^ b[x + 1]);
            target[x] = differ == 0 ? a[x] : -1;
        }
    }
};

// One output line from the cells above it; whether one of its pixels is open.
struct LabelsOfLine {
    static GVIT_INLINE void run(const RowMap& map, const int32_t* const& cells, int64_t* const& out,
                                bool* const& open) {
        const int32_t* __restrict__ spot = map.spot;
        int64_t* __restrict__ target = out;
        int64_t least = 0;
        for (int64_t x = 0; x < map.out_width; ++x) {
            const int64_t cell = cells[spot[x]];
            target[x] = cell;
            least = std::min(least, cell);
        }
        *open = least < 0;
    }
};

}  // namespace

std::vector<int64_t> label_uniform_pixels(const RowMap& map, int64_t* labels) {
    std::vector<int64_t> mixed;
    std::vector<int32_t> upper(map.width + 1), lower(map.width + 1), cells(map.width);
    int32_t *above = upper.data(), *below = lower.data(), *found = cells.data();
    int64_t line_above = -1, line_below = -1;
    for (int64_t y = 0; y < map.out_height; ++y) {
        const int64_t line = map.line[y], next = std::min(line + 1, map.height - 1);
        if (line != line_above) {
            std::swap(above, below);
            if (line != line_below) dispatch<KindsOfLine>(map, line, above);
            dispatch<KindsOfLine>(map, next, below);
            line_above = line;
            line_below = next;
            dispatch<Cells>(above, below, map.width, found);
        }
        int64_t* out = labels + y * map.out_width;
        bool open = false;
        dispatch<LabelsOfLine>(map, found, out, &open);
        for (int64_t x = 0; open && x < map.out_width; ++x) {
            if (out[x] < 0) mixed.push_back(y * map.out_width + x);
        }
        for (int64_t x = 0; map.label_of_kind != nullptr && x < map.out_width; ++x) {
            out[x] = map.label_of_kind[std::max<int64_t>(out[x], 0)];
        }
    }
    return mixed;
}

void pick_pixels(const PixelPick& pick, int32_t* target, int64_t target_stride) {
    for (int64_t y = 0; y < pick.lines; ++y) {
        const int16_t* __restrict__ source = pick.source + pick.line[y] * pick.width;
        int32_t* __restrict__ out = target + y * target_stride;
        for (int64_t x = 0; x < pick.spots; ++x) out[x] = source[pick.spot[x]] + pick.added;
    }
}

}  // namespace gvit
