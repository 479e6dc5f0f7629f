#include "csrc/shard_scan.h"

#include <sys/stat.h>

#include <unordered_map>

#include "csrc/shard_file.h"
#include "csrc/shard_image.h"
#include "csrc/shard_tar.h"

namespace gvit {
namespace {

enum Kind { kImage, kCaption, kNeither };

struct Part {
    int64_t offset = -1, size = 0;
};

struct Sample {
    std::string key;
    Part image, caption;
    ImageProbe probe;
    uint64_t hash = 0;
    bool clear = false;  // the caption certainly holds text
};

Kind kind_of(std::string extension) {
    for (char& letter : extension) {
        if (letter >= 'A' && letter <= 'Z') letter += 'a' - 'A';
    }
    for (const char* image : {"jpg", "jpeg", "png", "webp"}) {
        if (extension == image) return kImage;
    }
    return extension == "txt" || extension == "text" ? kCaption : kNeither;
}

// FNV-1a, 64 bits: enough to count equal captions.
uint64_t hash_of(std::string_view text) {
    uint64_t hash = 0xcbf29ce484222325;
    for (const char byte : text) hash = (hash ^ static_cast<uint8_t>(byte)) * 0x100000001b3;
    return hash;
}

// Cleaning deletes HTML escapes and terminal codes, but never a letter or digit in front of the first of them.
bool certainly_text(std::string_view caption) {
    for (const char byte : caption) {
        if (byte == '&' || byte == '\x1b') return false;
        if ((byte >= '0' && byte <= '9') || (byte >= 'A' && byte <= 'Z') || (byte >= 'a' && byte <= 'z')) return true;
    }
    return false;
}

class Scan {
  public:
    Scan(FileWindow& file, const ScanLimits& limits) : file_(file), limits_(limits) {}

    ShardScan run() {
        TarVisitor visitor;
        visitor.member = [this](const TarMember& member) { take(member); };
        visitor.damage = [this](const std::string& what) { result_.notes.emplace_back("", what); };
        result_.is_tar = walk_tar(file_, visitor);
        for (size_t i = 0; i < samples_.size(); ++i) add_row(i);
        return std::move(result_);
    }

  private:
    void take(const TarMember& member) {
        const size_t dot = member.name.rfind('.');
        const size_t base = member.name.rfind('/') + 1;  // npos + 1 is 0
        if (dot == std::string::npos || member.name.compare(base, 1, ".") == 0) return;
        const Kind kind = kind_of(member.name.substr(dot + 1));
        if (kind == kNeither) return;
        const std::string key = member.name.substr(0, dot);
        if (member.cut) {
            result_.notes.emplace_back(key, "cut off by the end of the tar");
            return;
        }
        const auto [place, added] = numbers_.try_emplace(key, samples_.size());
        if (added) samples_.emplace_back().key = key;
        Sample& sample = samples_[place->second];
        Part& part = kind == kImage ? sample.image : sample.caption;
        if (part.offset >= 0) {
            const char* name = kind == kImage ? "image" : "caption";
            result_.notes.emplace_back(key, "second " + std::string(name) + " of the same name ignored");
            return;
        }
        part = {member.offset, member.size};
        if (kind == kImage) {
            sample.probe = probe_image(FileSlice(file_, part.offset, part.size), limits_.pixels);
        } else {
            const std::string_view text = file_.view(part.offset, std::min(part.size, limits_.caption_bytes));
            sample.hash = hash_of(text);
            sample.clear = certainly_text(text);
        }
    }

    void add_row(size_t number) {
        const Sample& sample = samples_[number];
        const int64_t row[ShardScan::kColumns] = {
            sample.image.offset,
            sample.image.size,
            sample.caption.offset,
            sample.caption.size,
            sample.probe.width,
            sample.probe.height,
            static_cast<int64_t>(sample.hash),
        };
        result_.table.insert(result_.table.end(), std::begin(row), std::end(row));
        result_.keys += sample.key;
        result_.key_end.push_back(result_.keys.size());
        std::string fault = sample.probe.fault;
        if (sample.image.offset < 0) {
            fault = "no image";
        } else if (sample.caption.offset < 0) {
            fault = "no caption";
        } else if (fault.empty() && !sample.clear) {
            result_.unclear.push_back(number);
        }
        result_.faults.push_back(std::move(fault));
    }

    FileWindow& file_;
    const ScanLimits& limits_;
    ShardScan result_;
    std::vector<Sample> samples_;
    std::unordered_map<std::string, size_t> numbers_;
};

}  // namespace

ShardScan scan_shard(int handle, const ScanLimits& limits) {
    struct stat status;
    if (fstat(handle, &status) != 0) throw std::system_error(errno, std::generic_category());
    FileWindow file(handle, status.st_size);
    return Scan(file, limits).run();
}

}  // namespace gvit
