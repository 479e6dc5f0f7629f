// The loops over pixels of groupvit_fast/segmentation, for the CPU: what its tensor code says, in one pass.
#pragma once

#include <cstdint>
#include <vector>

namespace gvit {

// A score map at the size of the model's input, and where the pixels of the original image read it.
struct RowMap {
    const int32_t* row_of_pixel;  // [height, width], rows of a table
    int64_t height, width;
    const int32_t* kind_of_row;  // [rows]
    int64_t rows;
    const int64_t* label_of_kind;  // null: a kind is its label
    const int32_t* line;           // [out_height], the upper of the two lines that an output line blends
    const int32_t* spot;           // [out_width], the left of the two columns
    int64_t out_height, out_width;
};

// Writes the label of each output pixel whose four inputs are of one kind; returns the numbers of the others,
// ascending, whose label stays open. Throws std::invalid_argument for a row that is not in the table.
std::vector<int64_t> label_uniform_pixels(const RowMap& map, int64_t* labels);

// target[y, x] = source[line[y], spot[x]] + added; a line of `target` begins every `target_stride` elements.
struct PixelPick {
    const int16_t* source;  // [.., width]
    int64_t width;
    const int64_t* line;
    const int64_t* spot;
    int64_t lines, spots;
    int32_t added;
};

void pick_pixels(const PixelPick& pick, int32_t* target, int64_t target_stride);

}  // namespace gvit
