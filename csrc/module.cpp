// The Python module: what each part of the core binds.
#include <nanobind/nanobind.h>

#include "cpu/bindings.hpp"
#include "mxfp4/bindings.hpp"

NB_MODULE(_native, module) {
    module.doc() =
        "MXFP4 <-> BF16 kernels (see moe_surgery.formats.mxfp4) and CPU kernels of the runtime (see "
        "moe_surgery.kernels.native).";
    moe_surgery::mxfp4::bind(module);
    moe_surgery::cpu::bind(module);
}
