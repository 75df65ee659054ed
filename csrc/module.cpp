// The Python module: what each part of the core binds.
#include <nanobind/nanobind.h>

#include "cpu/bindings.hpp"
#include "mxfp4/bindings.hpp"
#include "q8_0/bindings.hpp"
#include "residency/bindings.hpp"

NB_MODULE(_native, module) {
    module.doc() =
        "MXFP4 <-> BF16 kernels (see moe_surgery.formats.mxfp4), Q8_0 (moe_surgery.formats.q8_0) and CPU kernels "
        "of the runtime (moe_surgery.kernels.native), and its reads in the background (moe_surgery.runtime.residency).";
    moe_surgery::mxfp4::bind(module);
    moe_surgery::q8_0::bind(module);
    moe_surgery::cpu::bind(module);
    moe_surgery::residency::bind(module);
}
