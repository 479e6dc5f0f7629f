#include "csrc/shard_tar.h"

#include <optional>

namespace gvit {
namespace {

using namespace std::string_view_literals;

constexpr int64_t kBlock = 512;
constexpr int64_t kMostExtended = 1 << 20;  // bytes of a long name or pax header; more is damage
constexpr int64_t kMostSize = int64_t{1} << 60;

int64_t whole_blocks(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

bool all_zero(std::string_view bytes) { return bytes.find_first_not_of('\0') == std::string_view::npos; }

std::string_view until_nul(std::string_view field) { return field.substr(0, field.find('\0')); }

// A number of a header: octal digits, or base 256 when the first byte is 0x80.
std::optional<int64_t> header_number(std::string_view field) {
    int64_t value = 0;
    if (field[0] == '\x80') {
        for (const char byte : field.substr(1)) {
            if (value > kMostSize >> 8) return std::nullopt;  // before the shift, which would overflow
            value = value << 8 | static_cast<uint8_t>(byte);
            if (value > kMostSize) return std::nullopt;
        }
        return value;
    }
    const size_t first = field.find_first_not_of(' ');
    for (const char digit : first == std::string_view::npos ? ""sv : field.substr(first)) {
        if (digit == '\0' || digit == ' ') break;
        if (digit < '0' || digit > '7') return std::nullopt;
        value = value << 3 | (digit - '0');
    }
    return value;
}

template <typename Byte>
int32_t byte_sum(std::string_view bytes) {
    int32_t sum = 0;
    for (const char byte : bytes) sum += static_cast<Byte>(byte);
    return sum;
}

// The sum of a header's bytes; the field of the sum itself counts as spaces.
template <typename Byte>
int32_t header_sum(std::string_view block) {
    return byte_sum<Byte>(block) - byte_sum<Byte>(block.substr(148, 8)) + 8 * ' ';
}

struct Header {
    std::string name;
    int64_t size = 0;
    char type = 0;
    bool sparse_goes_on = false;
};

std::optional<Header> read_header(std::string_view block) {
    const std::optional<int64_t> sum = header_number(block.substr(148, 8));
    if (!sum) return std::nullopt;
    // Old programs added up signed bytes.
    if (*sum != header_sum<uint8_t>(block) && *sum != header_sum<int8_t>(block)) return std::nullopt;
    const std::optional<int64_t> size = header_number(block.substr(124, 12));
    if (!size) return std::nullopt;
    Header header;
    header.name = until_nul(block.substr(0, 100));
    header.size = *size;
    header.type = block[156];
    header.sparse_goes_on = block[482] != 0;
    const std::string prefix(until_nul(block.substr(345, 155)));
    if (block.substr(257, 6) == "ustar\0"sv && !prefix.empty()) header.name = prefix + "/" + header.name;
    return header;
}

// What extended headers say about the member behind them. The first word counts.
struct Extension {
    std::optional<std::string> name;
    std::optional<int64_t> size;
    bool unusable = false;  // sparse, or its name is lost
};

std::optional<int64_t> decimal(std::string_view digits) {
    if (digits.empty() || digits.size() > 18) return std::nullopt;
    int64_t value = 0;
    for (const char digit : digits) {
        if (digit < '0' || digit > '9') return std::nullopt;
        value = 10 * value + (digit - '0');
    }
    return value;
}

// Records of "length key=value\n"; false when one is malformed.
bool read_pax(std::string_view records, Extension& extension) {
    while (!records.empty() && records[0] != '\0') {
        const size_t space = records.find(' ');
        if (space == std::string_view::npos) return false;
        const std::optional<int64_t> length = decimal(records.substr(0, space));
        if (!length || *length > static_cast<int64_t>(records.size()) || *length < static_cast<int64_t>(space) + 3) {
            return false;
        }
        const std::string_view record = records.substr(space + 1, *length - space - 1);
        const size_t equals = record.find('=');
        if (equals == std::string_view::npos || record.back() != '\n') return false;
        const std::string_view key = record.substr(0, equals);
        const std::string_view value = record.substr(equals + 1, record.size() - equals - 2);
        if (key == "path"sv && !extension.name) extension.name = value;
        if (key == "size"sv && !extension.size) {
            extension.size = decimal(value);
            if (!extension.size || *extension.size > kMostSize) return false;
        }
        if (key.substr(0, 11) == "GNU.sparse."sv) extension.unusable = true;
        records.remove_prefix(*length);
    }
    return true;
}

class Walk {
  public:
    Walk(FileWindow& file, const TarVisitor& visitor) : file_(file), visitor_(visitor) {}

    bool run() {
        while (!ended_ && offset_ + kBlock <= file_.size()) {
            const std::string_view block = file_.view(offset_, kBlock);
            if (all_zero(block)) {
                skip_zeros();
            } else if (const std::optional<Header> header = read_header(block)) {
                found_ = true;
                step(*header);
            } else {
                lost("damaged header near byte " + std::to_string(offset_));
                resume();
            }
        }
        if (!ended_ && offset_ < file_.size()) visitor_.damage("the tar is cut short in a header");
        if (!ended_ && offset_ == file_.size() && found_) visitor_.damage("no end mark: the tar may be cut short");
        return found_ || zeros_;
    }

  private:
    // A tar ends with zeros, and nothing behind them.
    void skip_zeros() {
        const int64_t start = offset_;
        for (; offset_ < file_.size(); offset_ += kBlock) {
            if (all_zero(file_.view(offset_, kBlock))) continue;
            lost("zeros from byte " + std::to_string(start) + " to " + std::to_string(offset_));
            return;
        }
        ended_ = zeros_ = true;
    }

    // Goes to the next block that is a sound header.
    void resume() {
        for (offset_ += kBlock; offset_ + kBlock <= file_.size(); offset_ += kBlock) {
            if (read_header(file_.view(offset_, kBlock))) return;
        }
        ended_ = true;
    }

    void lost(const std::string& what) {
        visitor_.damage(what);
        extension_ = Extension();
    }

    void step(const Header& header) {
        switch (header.type) {
            case 'x':
            case 'X':
            case 'L':
            case 'K': return extend(header);
            case 'g': offset_ += kBlock + whole_blocks(header.size); return;
            case '1':
            case '2':
            case '3':
            case '4':
            case '5':
            case '6':
                extension_ = Extension();
                offset_ += kBlock;
                return;
            default: return data_member(header);
        }
    }

    void extend(const Header& header) {
        const int64_t data = offset_ + kBlock;
        if (header.size > kMostExtended || data + header.size > file_.size()) {
            lost("damaged header near byte " + std::to_string(offset_));
            extension_.unusable = true;
            offset_ += kBlock;
            return;
        }
        const std::string_view text = file_.view(data, header.size);
        if (header.type == 'L') {
            if (!extension_.name) extension_.name = until_nul(text);
        } else if (header.type != 'K' && !read_pax(text, extension_)) {
            lost("damaged header near byte " + std::to_string(offset_));
            extension_.unusable = true;
        }
        offset_ = data + whole_blocks(header.size);
    }

    void data_member(const Header& header) {
        TarMember member;
        member.name = extension_.name.value_or(header.name);
        member.size = extension_.size.value_or(header.size);
        member.offset = offset_ + kBlock;
        bool regular = header.type == '0' || header.type == '\0' || header.type == '7';
        if (header.type == 'S') {  // its map of holes may go on in more blocks
            for (bool more = header.sparse_goes_on; more; member.offset += kBlock) {
                const std::string_view block = file_.view(member.offset, kBlock);
                more = block.size() == kBlock && block[504] != 0;
            }
        }
        regular = regular && !extension_.unusable && !member.name.empty() && member.name.back() != '/';
        extension_ = Extension();
        member.cut = member.size > file_.size() - member.offset;
        if (regular) visitor_.member(member);
        if (!member.cut) {
            offset_ = std::min(member.offset + whole_blocks(member.size), file_.size());
            return;
        }
        if (!regular) visitor_.damage("cut off by the end of the tar");
        resume();
    }

    FileWindow& file_;
    const TarVisitor& visitor_;
    int64_t offset_ = 0;
    bool found_ = false, zeros_ = false;
    bool ended_ = false;  // nothing more can be found
    Extension extension_;
};

}  // namespace

bool walk_tar(FileWindow& file, const TarVisitor& visitor) { return Walk(file, visitor).run(); }

}  // namespace gvit
