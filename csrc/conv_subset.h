// Convolution of few outputs by a part of Winograd's weights.
//
// Of F(m, 2) the points 0 and infinity have a tap each for weights, the first one with a factor; of F(m, 1) every
// point has the only tap. V of the pixels themselves, with the factors, times U at those points is the direct
// convolution. It multiplies more than F(m, 2) and reads a fraction of the weights, 4 of 9 for F(2x2, 2x2) and 4 of
// 25 for F(4x4, 2x2): where a hole leaves few outputs, reading weights is most of the time.
#pragma once

#include "step.h"

namespace lgnet {

// Whether that is the faster way for these regions.
bool subset_pays(const ConvStep& step, const std::vector<Region>& regions, const Run& run);
void run_subset(const ConvStep& step, const std::vector<Region>& regions, const Run& run);

}  // namespace lgnet
