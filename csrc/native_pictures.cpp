// Python's view of csrc/pictures.h: checks of the arrays, and the interpreter lock released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/pictures.h"

namespace gvit {
namespace {

namespace py = pybind11;

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

void expect(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(std::string("finish_pictures: ") + message);
}

Picture picture_of(const py::handle& item, std::vector<Bytes>& kept) {
    expect(py::isinstance<Bytes>(item), "each picture must be a contiguous uint8 array");
    kept.push_back(py::reinterpret_borrow<Bytes>(item));
    const Bytes& array = kept.back();
    expect(array.ndim() == 3 && array.shape(2) == 3 && array.size() > 0, "each picture must be [height, width, 3]");
    return {array.data(), array.shape(0), array.shape(1)};
}

void finish(const py::list& pictures, const Ints& mirror, const Ints& operation, const Floats& value,
            const Floats& matrix, const Floats& mean, const Floats& deviation, Floats& out, int64_t threads) {
    std::vector<Bytes> kept;
    std::vector<Picture> views;
    for (const py::handle& item : pictures) views.push_back(picture_of(item, kept));
    PictureBatch batch{};
    batch.pictures = views.data();
    batch.count = static_cast<int64_t>(views.size());
    expect(out.ndim() == 4 && out.shape(0) == batch.count && out.shape(1) == 3 && out.shape(2) == out.shape(3),
           "out must be [pictures, 3, size, size]");
    batch.size = out.shape(2);
    expect(operation.ndim() == 2 && operation.shape(0) == batch.count, "operation must be [pictures, layers]");
    batch.layers = operation.shape(1);
    expect(mirror.size() == batch.count && value.size() == operation.size() && matrix.size() == 6 * operation.size() &&
               mean.size() == 3 && deviation.size() == 3,
           "mirror, value, matrix, mean and deviation must fit the pictures");
    const auto last = static_cast<int32_t>(PictureOperation::affine);
    for (py::ssize_t i = 0; i < operation.size(); ++i) {
        expect(operation.data()[i] >= 0 && operation.data()[i] <= last, "unknown operation");
    }
    batch.mirror = mirror.data();
    batch.operation = operation.data();
    batch.value = value.data();
    batch.matrix = matrix.data();
    for (int c = 0; c < 3; ++c) {
        batch.mean[c] = mean.data()[c];
        batch.inverse_deviation[c] = 1.f / deviation.data()[c];
    }
    batch.out = out.mutable_data();
    const py::gil_scoped_release release;
    finish_pictures(batch, threads);
}

}  // namespace

void define_pictures(py::module_& m) {
    m.def("finish_pictures", &finish, py::arg("pictures"), py::arg("mirror"), py::arg("operation"), py::arg("value"),
          py::arg("matrix"), py::arg("mean"), py::arg("deviation"), py::arg("out").noconvert(), py::arg("threads"));
}

}  // namespace gvit
