// The members of a tar file that may be damaged anywhere.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "csrc/shard_file.h"

namespace gvit {

struct TarMember {
    std::string name;
    int64_t offset = 0, size = 0;  // of its data, all of which lies inside the file
    bool cut = false;              // except when this is set
};

struct TarVisitor {
    std::function<void(const TarMember&)> member;    // each regular file; links, folders, devices are passed over
    std::function<void(const std::string&)> damage;  // what is wrong with the tar, in a few words
};

// Walks ustar, GNU and pax tars. A damaged header is reported, and the walk goes on at the next block that is a
// sound header. Returns false when the file holds no header at all and is not just zeros: it is no tar.
// groupvit_fast/data/tars.py states the same rules in Python.
bool walk_tar(FileWindow& file, const TarVisitor& visitor);

}  // namespace gvit
