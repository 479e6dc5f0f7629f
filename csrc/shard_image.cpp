#include "csrc/shard_image.h"

#include <optional>

namespace gvit {
namespace {

using namespace std::string_view_literals;

constexpr int64_t kTail = 1024;  // where the end marker is looked for first
constexpr int kMostChunks = 4096;

struct Signature {
    std::string_view start, name;
};

// What is found under the name of an image now and then.
constexpr Signature kStrangers[] = {
    {"GIF8"sv, "GIF"sv},
    {"BM"sv, "BMP"sv},
    {"II*\0"sv, "TIFF"sv},
    {"MM\0*"sv, "TIFF"sv},
    {"%PDF"sv, "PDF"sv},
    {"PK\3\4"sv, "ZIP"sv},
    {"\x1f\x8b"sv, "gzip"sv},
    {"<!"sv, "HTML"sv},
    {"<html"sv, "HTML"sv},
    {"<HTML"sv, "HTML"sv},
    {"<?xml"sv, "XML"sv},
    {"<svg"sv, "SVG"sv},
    {"\0\0\0\x0cjP"sv, "JPEG 2000"sv},
};

bool starts_with(std::string_view bytes, std::string_view start) { return bytes.substr(0, start.size()) == start; }

std::string stranger(std::string_view head) {
    const size_t first = head.find_first_not_of(" \t\r\n");
    const std::string_view text = first == std::string_view::npos ? head : head.substr(first);
    for (const Signature& known : kStrangers) {
        if (starts_with(text, known.start)) return std::string(known.name) + " file, not a JPEG, PNG or WebP image";
    }
    return "not a JPEG, PNG or WebP image";
}

// The orientation 1 to 8 of a TIFF block, 0 when it has none.
int orientation(std::string_view tiff) {
    if (tiff.size() < 8 || (!starts_with(tiff, "II*\0"sv) && !starts_with(tiff, "MM\0*"sv))) return 0;
    const auto number = tiff[0] == 'I' ? little_endian : big_endian;
    const uint64_t directory = number(tiff.substr(4, 4));
    if (directory + 2 > tiff.size()) return 0;
    const uint64_t entries = number(tiff.substr(directory, 2));
    for (uint64_t i = 0; i < entries; ++i) {
        const uint64_t entry = directory + 2 + 12 * i;
        if (entry + 12 > tiff.size()) return 0;
        if (number(tiff.substr(entry, 2)) != 0x0112) continue;
        const uint32_t value = number(tiff.substr(entry + 8, 2));
        return number(tiff.substr(entry + 2, 2)) == 3 && value <= 8 ? value : 0;
    }
    return 0;
}

int exif_orientation(std::string_view block) {
    return orientation(starts_with(block, "Exif\0\0"sv) ? block.substr(6) : block);
}

// Whether `marker` stands behind `earliest`, with at least `more` bytes after it.
bool has_end(const FileSlice& image, std::string_view marker, int64_t earliest, int64_t more = 0) {
    const int64_t end = image.size() - more, from = std::max(earliest, end - kTail);
    const int64_t usual = end - static_cast<int64_t>(marker.size());  // nothing behind it: a few bytes to read
    if (usual >= earliest && image.view(usual, marker.size()) == marker) return true;
    if (image.view(from, end - from).find(marker) != std::string_view::npos) return true;
    // Garbage behind the end is harmless; how much there is only a look at the whole file tells.
    return from > earliest && image.view(earliest, end - earliest).find(marker) != std::string_view::npos;
}

void turn(ImageProbe& probe, int exif) {
    if (exif >= 5) std::swap(probe.width, probe.height);
}

ImageProbe damaged(std::string_view kind) {
    ImageProbe probe;
    probe.fault = "damaged " + std::string(kind) + " header";
    return probe;
}

ImageProbe probe_jpeg(const FileSlice& image) {
    ImageProbe probe;
    int exif = 0;
    int64_t position = 2;
    while (true) {
        const std::string_view head = image.view(position, 4);
        if (head.size() < 4 || head[0] != '\xff') return damaged("JPEG");
        const uint8_t marker = static_cast<uint8_t>(head[1]);
        if (marker == 0xff) {  // a fill byte
            ++position;
            continue;
        }
        if (marker == 0x01 || (marker >= 0xd0 && marker <= 0xd8)) {  // alone, without a length
            position += 2;
            continue;
        }
        const int64_t length = big_endian(head.substr(2, 2));
        if (length < 2 || marker == 0xd9 || marker == 0) return damaged("JPEG");
        if (marker == 0xda) break;
        if (marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc && !probe.width) {
            const std::string_view frame = image.view(position + 5, 4);
            if (frame.size() < 4) return damaged("JPEG");
            probe.height = big_endian(frame.substr(0, 2));
            probe.width = big_endian(frame.substr(2, 2));
        }
        if (marker == 0xe1 && !exif) {
            const std::string_view block = image.view(position + 4, length - 2);
            if (starts_with(block, "Exif\0\0"sv)) exif = exif_orientation(block);
        }
        position += 2 + length;
    }
    if (!probe.width || !probe.height) return damaged("JPEG");
    if (!has_end(image, "\xff\xd9"sv, position)) probe.fault = "truncated JPEG (no end marker)";
    turn(probe, exif);
    return probe;
}

ImageProbe probe_png(const FileSlice& image) {
    ImageProbe probe;
    const std::string_view head = image.view(8, 16);
    if (head.size() < 16 || head.substr(4, 4) != "IHDR"sv) return damaged("PNG");
    probe.width = big_endian(head.substr(8, 4));
    probe.height = big_endian(head.substr(12, 4));
    if (!probe.width || !probe.height) return damaged("PNG");
    int exif = 0;
    int64_t position = 8;
    for (int chunks = 0; chunks < kMostChunks && !exif; ++chunks) {
        const std::string_view chunk = image.view(position, 8);
        if (chunk.size() < 8 || chunk.substr(4) == "IDAT"sv) break;
        const int64_t length = big_endian(chunk.substr(0, 4));
        if (chunk.substr(4) == "eXIf"sv) exif = exif_orientation(image.view(position + 8, length));
        position += 12 + length;
    }
    if (!has_end(image, "IEND"sv, 33, 4)) probe.fault = "truncated PNG (no end marker)";
    turn(probe, exif);
    return probe;
}

// The size that the first chunk of a WebP file gives, if it can be one.
std::optional<ImageProbe> webp_size(std::string_view head) {
    ImageProbe probe;
    const std::string_view kind = head.substr(12, 4);
    if (kind == "VP8X"sv) {
        probe.width = little_endian(head.substr(24, 3)) + 1;
        probe.height = little_endian(head.substr(27, 3)) + 1;
    } else if (kind == "VP8L"sv && head[20] == '\x2f') {
        const uint32_t bits = little_endian(head.substr(21, 4));
        probe.width = (bits & 0x3fff) + 1;
        probe.height = (bits >> 14 & 0x3fff) + 1;
    } else if (kind == "VP8 "sv && head.substr(23, 3) == "\x9d\x01\x2a"sv) {
        probe.width = little_endian(head.substr(26, 2)) & 0x3fff;
        probe.height = little_endian(head.substr(28, 2)) & 0x3fff;
    }
    if (!probe.width || !probe.height) return std::nullopt;
    return probe;
}

ImageProbe probe_webp(const FileSlice& image) {
    const std::string head(image.view(0, 30));
    if (head.size() < 30) return damaged("WebP");
    std::optional<ImageProbe> probe = webp_size(head);
    if (!probe) return damaged("WebP");
    if (little_endian(std::string_view(head).substr(4, 4)) + int64_t{8} > image.size()) {
        probe->fault = "truncated WebP (shorter than it says)";
        return *probe;
    }
    int exif = 0;
    int64_t position = 12;
    for (int chunks = 0; chunks < kMostChunks && !exif; ++chunks) {
        const std::string_view chunk = image.view(position, 8);
        if (chunk.size() < 8) break;
        const int64_t length = little_endian(chunk.substr(4, 4));
        if (chunk.substr(0, 4) == "EXIF"sv) exif = exif_orientation(image.view(position + 8, length));
        position += 8 + length + (length & 1);
    }
    turn(*probe, exif);
    return *probe;
}

}  // namespace

ImageProbe probe_image(const FileSlice& image, int64_t max_pixels) {
    ImageProbe probe;
    const std::string_view head = image.view(0, 64);
    if (head.empty()) {
        probe.fault = "empty image";
    } else if (starts_with(head, "\xff\xd8\xff"sv)) {
        probe = probe_jpeg(image);
    } else if (starts_with(head, "\x89PNG\r\n\x1a\n"sv)) {
        probe = probe_png(image);
    } else if (starts_with(head, "RIFF"sv) && head.size() >= 12 && head.substr(8, 4) == "WEBP"sv) {
        probe = probe_webp(image);
    } else {
        probe.fault = stranger(head);
    }
    if (probe.fault.empty() && probe.width > max_pixels / probe.height) {  // the product may overflow
        probe.fault = std::to_string(probe.width) + " x " + std::to_string(probe.height) +
                      " pixels is above the limit of " + std::to_string(max_pixels);
    }
    return probe;
}

}  // namespace gvit
