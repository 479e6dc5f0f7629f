// What the header and the end of an encoded image say, without decoding it.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/shard_file.h"

namespace gvit {

struct ImageProbe {
    int64_t width = 0, height = 0;  // of the upright picture, as EXIF turns it
    std::string fault;              // why the image cannot be used; empty when it can
};

// Looks at a JPEG, PNG or WebP file; groupvit_fast/data/images.py states the same rules in Python.
ImageProbe probe_image(const FileSlice& image, int64_t max_pixels);

}  // namespace gvit
