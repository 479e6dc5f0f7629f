// From decoded pictures of any size to a normalised batch.
#include "csrc/pictures.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/cpu_dispatch.h"

namespace gvit {
namespace {

constexpr int64_t kSpare = 16;  // floats that vector loads and stores may reach beyond an end

// The input pixels behind each output pixel of one axis, with their weights: a triangle as wide as the
// step between output pixels, at least two pixels wide, cut off at the edges.
struct Taps {
    std::vector<int32_t> start, count;
    std::vector<float> weight;  // `most` for each output pixel
    int64_t most;
    int32_t longest = 0;

    Taps(int64_t in, int64_t out) : start(out), count(out) {
        const double scale = static_cast<double>(in) / out, width = std::max(scale, 1.0);
        most = static_cast<int64_t>(width) * 2 + 3;
        weight.assign(out * most, 0.f);
        for (int64_t x = 0; x < out; ++x) {
            const double centre = (x + 0.5) * scale;
            const int64_t first = std::max<int64_t>(static_cast<int64_t>(centre - width + 0.5), 0);
            const int64_t end = std::min<int64_t>(static_cast<int64_t>(centre + width + 0.5), in);
            double sum = 0;
            for (int64_t i = first; i < end; ++i) sum += triangle((i + 0.5 - centre) / width);
            for (int64_t i = first; i < end; ++i) {
                weight[x * most + i - first] = static_cast<float>(triangle((i + 0.5 - centre) / width) / sum);
            }
            start[x] = static_cast<int32_t>(first);
            count[x] = static_cast<int32_t>(end - first);
            longest = std::max(longest, count[x]);
        }
    }

    static double triangle(double x) { return std::max(0.0, 1.0 - std::abs(x)); }
};

typedef float Float16 __attribute__((vector_size(64)));
constexpr int64_t kRows = 4;  // output rows at a time

// Down each column first, where the rows are streams. The sums of four rows are then interleaved, so that along
// the rows one vector holds the three channels of four rows, and a tap is one multiplication.
struct Resize {
    static GVIT_INLINE void run(const Picture& picture, const int64_t& side, const Taps& down, const Taps& along,
                                float* const& rows, float* const& narrow, uint8_t* const& out) {
        const int64_t size = side;  // of its own: bytes that are written could alias the caller's
        const int64_t length = picture.width * 3;
        float* const row = rows + kRows * (length + 3 * along.longest + kSpare);
        for (int64_t y = 0; y < size; y += kRows) {
            const int64_t count = std::min(kRows, size - y);
            for (int64_t r = 0; r < count; ++r) {
                column_sums(picture.pixels + down.start[y + r] * length, length, &down.weight[(y + r) * down.most],
                            down.count[y + r], row + r * length);
            }
            const float *a = row, *b = a + length, *c = b + length, *d = c + length;
            for (int64_t i = 0; i < length; ++i) {
                rows[4 * i] = a[i];
                rows[4 * i + 1] = b[i];
                rows[4 * i + 2] = c[i];
                rows[4 * i + 3] = d[i];
            }
            switch (along.longest) {  // a loop of known length is several times faster
                case 1: row_sums<1>(rows, size, along, 1, narrow); break;
                case 2: row_sums<2>(rows, size, along, 2, narrow); break;
                case 3: row_sums<3>(rows, size, along, 3, narrow); break;
                case 4: row_sums<4>(rows, size, along, 4, narrow); break;
                case 5: row_sums<5>(rows, size, along, 5, narrow); break;
                case 6: row_sums<6>(rows, size, along, 6, narrow); break;
                default: row_sums<0>(rows, size, along, along.longest, narrow);
            }
            for (int64_t r = 0; r < count; ++r) round_row(narrow + r, size * 3, out + (y + r) * size * 3);
        }
    }

    static GVIT_INLINE void round_row(const float* __restrict__ values, int64_t count, uint8_t* __restrict__ bytes) {
        for (int64_t i = 0; i < count; ++i) {
            bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(values[kRows * i] + 0.5f));
        }
    }

    // Weights beyond a pixel's own are 0, and `rows` is finite beyond its end.
    template <int32_t kTaps>
    static GVIT_INLINE void row_sums(const float* rows, int64_t size, const Taps& along, int32_t taps, float* narrow) {
        const int32_t count = kTaps ? kTaps : taps;
        for (int64_t x = 0; x < size; ++x) {
            const float* source = rows + 12 * along.start[x];
            const float* weight = &along.weight[x * along.most];
            Float16 sum = {};
            for (int32_t i = 0; i < count; ++i) {
                Float16 pixel;
                std::memcpy(&pixel, source + 12 * i, sizeof pixel);
                sum += weight[i] * pixel;
            }
            std::memcpy(narrow + 12 * x, &sum, sizeof sum);  // the last four are overwritten by the next pixel
        }
    }

    static GVIT_INLINE void column_sums(const uint8_t* source, int64_t length, const float* weight, int32_t count,
                                        float* __restrict__ row) {
        for (int64_t i = 0; i < length; ++i) row[i] = weight[0] * source[i];
        for (int32_t k = 1; k < count; ++k) {
            const uint8_t* __restrict__ next = source + k * length;
            const float w = weight[k];
            for (int64_t i = 0; i < length; ++i) row[i] += w * next[i];
        }
    }
};

typedef uint8_t Byte16 __attribute__((vector_size(16)));
// 16 RGB pixels as three runs of 16 bytes.
GVIT_INLINE void split_channels(const uint8_t* pixels, Byte16 (&channel)[3]) {
    Byte16 a, b, c;
    std::memcpy(&a, pixels, 16);
    std::memcpy(&b, pixels + 16, 16);
    std::memcpy(&c, pixels + 32, 16);
    const Byte16 red = __builtin_shufflevector(a, b, 0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0);
    const Byte16 green = __builtin_shufflevector(a, b, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0);
    const Byte16 blue = __builtin_shufflevector(a, b, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0);
    channel[0] = __builtin_shufflevector(red, c, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29);
    channel[1] = __builtin_shufflevector(green, c, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30);
    channel[2] = __builtin_shufflevector(blue, c, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31);
}

// A row is split into its channels first, so that the arithmetic runs over plain arrays.
struct Normalize {
    static GVIT_INLINE void run(const uint8_t* const& in, const int64_t& size, const bool& mirror,
                                const PictureBatch& batch, uint8_t* const& plane, float* const& out) {
        const int64_t stride = size + 16;
        for (int64_t y = 0; y < size; ++y) {
            const uint8_t* row = in + y * size * 3;
            for (int64_t x = 0; x < size; x += 16) {
                Byte16 channel[3];
                split_channels(row + 3 * x, channel);  // the last may read into the padding
                for (int c = 0; c < 3; ++c) std::memcpy(plane + c * stride + x, &channel[c], 16);
            }
            for (int c = 0; c < 3; ++c) {
                const uint8_t* __restrict__ bytes = plane + c * stride;
                float* __restrict__ target = out + (c * size + y) * size;
                const float mean = batch.mean[c], scale = batch.inverse_deviation[c];
                if (mirror) {
                    for (int64_t x = 0; x < size; ++x) target[x] = (bytes[size - 1 - x] - mean) * scale;
                } else {
                    for (int64_t x = 0; x < size; ++x) target[x] = (bytes[x] - mean) * scale;
                }
            }
        }
    }
};

void finish_picture(const PictureBatch& batch, int64_t index, std::vector<uint8_t>& now, std::vector<uint8_t>& next) {
    const int64_t size = batch.size;
    resize_picture(batch.pictures[index], size, now.data());
    for (int64_t layer = index * batch.layers; layer < (index + 1) * batch.layers; ++layer) {
        const auto operation = static_cast<PictureOperation>(batch.operation[layer]);
        if (operation == PictureOperation::none) continue;
        apply_layer(now.data(), size, operation, batch.value[layer], batch.matrix + 6 * layer, next.data());
        std::swap(now, next);
    }
    const uint8_t* pixels = now.data();
    const bool mirror = batch.mirror[index] != 0;
    dispatch<Normalize>(pixels, size, mirror, batch, next.data(), batch.out + index * 3 * size * size);
}

}  // namespace

void resize_picture(const Picture& picture, int64_t size, uint8_t* out) {
    const Taps down(picture.height, size), along(picture.width, size);
    const int64_t length = picture.width * 3;
    std::vector<float> rows(kRows * (length + 3 * along.longest + kSpare) + kRows * length);
    std::vector<float> narrow(kRows * size * 3 + kSpare);
    dispatch<Resize>(picture, size, down, along, rows.data(), narrow.data(), out);
}

void finish_pictures(const PictureBatch& batch, int64_t threads) {
    std::atomic<int64_t> taken{0};
    const auto work = [&] {
        std::vector<uint8_t> now(batch.size * batch.size * 3 + kPicturePadding), next(now.size());
        for (int64_t i = taken++; i < batch.count; i = taken++) finish_picture(batch, i, now, next);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min(threads, batch.count); ++i) others.emplace_back(work);
    work();
    for (std::thread& thread : others) thread.join();
}

}  // namespace gvit
