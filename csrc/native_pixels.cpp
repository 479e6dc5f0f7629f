// Python's view of csrc/pixel_labels.h: checks of the arrays, and the interpreter lock released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "csrc/pixel_labels.h"

namespace gvit {
namespace {

namespace py = pybind11;

template <class T>
using Dense = py::array_t<T, py::array::c_style>;
using Shorts = Dense<int16_t>;
using Ints = Dense<int32_t>;
using Longs = Dense<int64_t>;

void expect(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

// Whether every number of a list can be an index into `size` elements. Without an early return, so that it
// vectorises.
template <class T>
bool all_below(const Dense<T>& numbers, int64_t size) {
    using Number = std::make_unsigned_t<T>;  // negative ones become the largest
    const T* values = numbers.data();
    Number most = 0;
    for (py::ssize_t i = 0; i < numbers.size(); ++i) most = std::max(most, static_cast<Number>(values[i]));
    return numbers.size() == 0 || most < static_cast<Number>(size);
}

Longs uniform(const Ints& rows, const Ints& kinds, const std::optional<Longs>& names, const Ints& line,
              const Ints& spot, Longs& labels) {
    expect(rows.ndim() == 2 && rows.size() > 0 && labels.ndim() == 2, "rows and labels must be [height, width]");
    expect(line.size() == labels.shape(0) && all_below(line, rows.shape(0)), "line must fit rows and labels");
    expect(spot.size() == labels.shape(1) && all_below(spot, rows.shape(1)), "spot must fit rows and labels");
    expect(all_below(kinds, names ? names->size() : INT32_MAX), "kinds must be numbers of labels");
    RowMap map{};
    map.row_of_pixel = rows.data();
    map.height = rows.shape(0);
    map.width = rows.shape(1);
    map.kind_of_row = kinds.data();
    map.rows = kinds.size();
    map.label_of_kind = names ? names->data() : nullptr;
    map.line = line.data();
    map.spot = spot.data();
    map.out_height = labels.shape(0);
    map.out_width = labels.shape(1);
    int64_t* out = labels.mutable_data();
    std::vector<int64_t> mixed;
    {
        const py::gil_scoped_release release;
        mixed = label_uniform_pixels(map, out);
    }
    return Longs(static_cast<py::ssize_t>(mixed.size()), mixed.data());
}

void pick(const Shorts& source, const Longs& line, const Longs& spot, int32_t added, py::array_t<int32_t>& target) {
    expect(source.ndim() == 2 && target.ndim() == 2, "source and target must be [height, width]");
    expect(line.size() == target.shape(0) && all_below(line, source.shape(0)), "line must fit source and target");
    expect(spot.size() == target.shape(1) && all_below(spot, source.shape(1)), "spot must fit source and target");
    const auto element = static_cast<py::ssize_t>(sizeof(int32_t));
    expect(target.size() == 0 || target.strides(1) == element, "lines of target must be dense");
    const PixelPick view{source.data(), source.shape(1), line.data(), spot.data(), line.size(), spot.size(), added};
    int32_t* out = target.mutable_data();
    const int64_t stride = target.strides(0) / element;
    const py::gil_scoped_release release;
    pick_pixels(view, out, stride);
}

}  // namespace

void define_pixels(py::module_& m) {
    m.def("label_uniform_pixels", &uniform, py::arg("rows").noconvert(), py::arg("kinds").noconvert(), py::arg("names"),
          py::arg("line").noconvert(), py::arg("spot").noconvert(), py::arg("labels").noconvert());
    m.def("pick_pixels", &pick, py::arg("source").noconvert(), py::arg("line").noconvert(), py::arg("spot").noconvert(),
          py::arg("added"), py::arg("target").noconvert());
}

}  // namespace gvit
