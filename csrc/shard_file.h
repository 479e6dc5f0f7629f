// Reading a few bytes here and there of a large file: plain reads, never a memory map, which kills the process
// when the file becomes shorter.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>

namespace gvit {

// The last piece that was read is kept: the next question is mostly about the bytes right behind.
class FileWindow {
  public:
    FileWindow(int handle, int64_t size) : handle_(handle), size_(size) {}

    int64_t size() const { return size_; }

    // `count` bytes at `offset`, fewer only at the end of the file; valid until the next call.
    std::string_view view(int64_t offset, int64_t count) {
        if (offset >= size_ || count <= 0) return {};
        count = std::min(count, size_ - offset);
        if (offset < start_ || offset + count > start_ + static_cast<int64_t>(held_.size())) {
            const int64_t skipped = offset - start_ - static_cast<int64_t>(held_.size());
            ahead_ = skipped < kLeast ? std::min(2 * ahead_, kMost) : kLeast;
            load(offset, std::min(std::max(count, ahead_), size_ - offset));
        }
        return std::string_view(held_).substr(offset - start_, count);
    }

  private:
    // The least covers the last bytes of an image, the headers and text behind it and the start of the next one.
    // Where the images are so small that little is skipped, one longer read costs less than many.
    static constexpr int64_t kLeast = 3072, kMost = 65536;

    void load(int64_t offset, int64_t count) {
        held_.resize(count);
        start_ = offset;
        for (int64_t done = 0; done < count;) {
            const ssize_t got = pread(handle_, held_.data() + done, count - done, offset + done);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) {
                held_.clear();
                throw std::system_error(got < 0 ? errno : EIO, std::generic_category());
            }
            done += got;
        }
    }

    int handle_;
    int64_t size_;
    int64_t start_ = 0, ahead_ = kLeast;
    std::string held_;
};

// One member of the tar: positions count from its first byte, and nothing outside it can be seen.
class FileSlice {
  public:
    FileSlice(FileWindow& file, int64_t offset, int64_t size) : file_(file), offset_(offset), size_(size) {}

    int64_t size() const { return size_; }

    std::string_view view(int64_t position, int64_t count) const {
        if (position >= size_) return {};
        return file_.view(offset_ + position, std::min(count, size_ - position));
    }

  private:
    FileWindow& file_;
    int64_t offset_, size_;
};

// Big- and little-endian numbers of an encoded file.
inline uint32_t big_endian(std::string_view bytes) {
    uint32_t value = 0;
    for (const char byte : bytes) value = value << 8 | static_cast<uint8_t>(byte);
    return value;
}

inline uint32_t little_endian(std::string_view bytes) {
    uint32_t value = 0;
    for (size_t i = bytes.size(); i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes[i]);
    return value;
}

}  // namespace gvit
