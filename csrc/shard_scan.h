// The samples of a shard: members of a tar, grouped by name, each looked at.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace gvit {

struct ShardScan {
    static constexpr int kColumns = 7;  // image offset, size, caption offset, size, width, height, caption hash
    bool is_tar = false;
    std::vector<int64_t> table;    // [samples][kColumns], in the order of the tar
    std::vector<int64_t> key_end;  // end of each sample's key in `keys`
    std::string keys;
    std::vector<std::string> faults;  // [samples] why it cannot be used; empty when it can
    std::vector<int64_t> unclear;     // samples whose caption may turn out empty once it is cleaned
    std::vector<std::pair<std::string, std::string>> notes;  // (key, or "" for the tar; what is wrong)
};

struct ScanLimits {
    int64_t pixels = 0;
    int64_t caption_bytes = 0;  // what lies beyond is not looked at
};

// Scans the open file `handle`; groupvit_fast/data/scan.py states the same rules in Python. Throws
// std::system_error when reading fails.
ShardScan scan_shard(int handle, const ScanLimits& limits);

}  // namespace gvit
