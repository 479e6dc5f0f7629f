// Training pictures on the CPU, after decoding: resize, augmentation layers, mirror, normalise, in one pass
// over memory that stays in cache. The formulas are those of Pillow 13, so that a recipe means the same here.
#pragma once

#include <cstdint>

namespace gvit {

constexpr int64_t kPicturePadding = 128;  // vector loads and stores may reach beyond the last pixel

struct Picture {
    const uint8_t* pixels;  // RGB, height x width x 3
    int64_t height, width;
};

// The layers of one picture; see groupvit_fast/data/augment.py.
struct PictureLayers {
    const int32_t* operation;  // [layers]
    const float* value;        // [layers]
    const float* matrix;       // [layers, 2, 3]
    int64_t layers;
};

struct PictureBatch {
    const Picture* pictures;
    int64_t count, size;
    const int32_t* mirror;  // [count]
    const int32_t* operation;
    const float* value;
    const float* matrix;
    int64_t layers;
    float mean[3], inverse_deviation[3];
    float* out;  // [count, 3, size, size]
};

enum class PictureOperation : int32_t {
    none,
    auto_contrast,
    equalize,
    invert,
    posterize,
    solarize,
    solarize_add,
    color,
    contrast,
    brightness,
    sharpness,
    affine,
};

// Bilinear with antialiasing into size x size; `out` has room as for apply_layer.
void resize_picture(const Picture& picture, int64_t size, uint8_t* out);

// One layer of a square picture. `in` and `out` must not overlap and have room for kPicturePadding bytes more.
void apply_layer(const uint8_t* in, int64_t size, PictureOperation operation, float value, const float* matrix,
                 uint8_t* out);

// The whole batch, on `threads` threads.
void finish_pictures(const PictureBatch& batch, int64_t threads);

}  // namespace gvit
