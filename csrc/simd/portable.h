// The fallback for every processor: SSE2 on x86 and NEON on Arm, as far as the compiler uses them.
#pragma once

#include "plain.h"

namespace lgnet {
namespace LGNET_ISA {

using F32 = Plain<float, 4>;

}  // namespace LGNET_ISA
}  // namespace lgnet
