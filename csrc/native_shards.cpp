// The scan of tar shards, for Python.
#include <pybind11/pybind11.h>

#include <cerrno>
#include <system_error>

#include "csrc/shard_scan.h"

namespace gvit {
namespace {

namespace py = pybind11;

py::bytes as_bytes(const std::vector<int64_t>& numbers) {
    return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
}

// The scan of groupvit_fast/data/scan.py: (is_tar, table, key_end, keys, faults, unclear, notes), numbers as the
// bytes of int64, faults as (sample, reason).
py::tuple scan(int handle, int64_t max_pixels, int64_t caption_bytes) {
    ShardScan scan;
    try {
        py::gil_scoped_release others_may_run;
        scan = scan_shard(handle, {max_pixels, caption_bytes});
    } catch (const std::system_error& error) {
        errno = error.code().value();
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }
    py::list faults, notes;
    for (size_t i = 0; i < scan.faults.size(); ++i) {
        if (!scan.faults[i].empty()) faults.append(py::make_tuple(i, scan.faults[i]));
    }
    for (const auto& [key, what] : scan.notes) notes.append(py::make_tuple(py::bytes(key), what));
    return py::make_tuple(scan.is_tar, as_bytes(scan.table), as_bytes(scan.key_end), py::bytes(scan.keys), faults,
                          as_bytes(scan.unclear), notes);
}

}  // namespace

void define_shards(py::module_& m) {
    m.def("scan_shard", &scan, py::arg("handle"), py::arg("max_pixels"), py::arg("caption_bytes"));
}

}  // namespace gvit
