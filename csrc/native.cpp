// The Python module for what is not a tensor operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "csrc/cpu_dispatch.h"

namespace gvit {
void define_pictures(pybind11::module_& m);  // csrc/native_pictures.cpp
void define_pixels(pybind11::module_& m);    // csrc/native_pixels.cpp
void define_shards(pybind11::module_& m);    // csrc/native_shards.cpp
}  // namespace gvit

namespace {

namespace py = pybind11;

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

std::vector<std::string> cpu_features() {
    std::vector<std::string> found;
#if GVIT_X86_LEVELS
    if (__builtin_cpu_supports("avx2")) found.emplace_back("avx2");
    if (__builtin_cpu_supports("fma")) found.emplace_back("fma");
    if (__builtin_cpu_supports("avx512f")) found.emplace_back("avx512f");
    if (__builtin_cpu_supports("avx512bf16")) found.emplace_back("avx512bf16");
#endif
    return found;
}

// What this build is: text for people, and for bug reports.
py::dict build_info() {
    const char* levels[] = {"plain", "avx2", "avx512"};
    const std::string cuda = GVIT_CUDA_VERSION, architectures = GVIT_CUDA_ARCHITECTURES;
    py::dict info;
    info["package"] = GVIT_VERSION;
    info["torch_target"] = "2.10";
    info["torch_headers"] = GVIT_TORCH;
    info["compiler"] = kCompiler;
    info["cuda"] = cuda.empty() ? py::object(py::none()) : py::str(cuda);
    info["cuda_architectures"] = architectures.empty() ? py::object(py::none()) : py::str(architectures);
    info["cpu_features"] = cpu_features();
    info["cpu_level"] = levels[static_cast<int>(gvit::cpu_level())];
    return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "What groupvit_fast was compiled with.";
    m.def("build_info", &build_info);
    gvit::define_pictures(m);
    gvit::define_pixels(m);
    gvit::define_shards(m);
}
