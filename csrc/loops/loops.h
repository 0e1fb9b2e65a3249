// The loops for one instruction set. A source file includes this once, after it has defined
//   SYNCBN_ISA, SYNCBN_NAME  the namespace's name, and the set's name in words,
//   SYNCBN_VECTOR_BYTES  the width of a vector register,
//   SYNCBN_AVX           the width in bits of its AVX instructions, 0 without,
// and is compiled for that set (setup.py). No function of the standard library is used in here, for
// the reason that SYNCBN_INLINE has (types.h).
#pragma once

#include <type_traits>
#include <utility>

#include "loops/types.h"

namespace syncbn::SYNCBN_ISA {

// clang-format off: the later ones use the earlier ones
#include "loops/vector.h"
#include "loops/elements.h"
#include "loops/merge.h"
#include "loops/moments.h"
#include "loops/streams.h"
#include "loops/contiguous.h"
#include "loops/groups.h"
#include "loops/channels_last.h"
#include "loops/reproducible.h"  // last: what it demands of rounding may hold to the end of the file
// clang-format on

template <class T>
constexpr Loops planes = {measure_planes<T>, normalise_planes<T>, gradient_sums_planes<T>,
                          input_gradient_planes<T>};
template <class T>
constexpr Loops rows = {measure_rows<T>, normalise_rows<T>, gradient_sums_rows<T>,
                        input_gradient_rows<T>};
template <class R>
constexpr ChannelLoops channels = {merge_moments,           inverse_deviation,
                                   forward_coefficients<R>, backward_coefficients<R>,
                                   round_means<R>,          project<R>};

extern const Loopset loopset;
const Loopset loopset = {
    SYNCBN_NAME,
    {{planes<float>, rows<float>},
     {planes<double>, rows<double>},
     {planes<BFloat16>, rows<BFloat16>},
     {planes<Half>, rows<Half>}},
    {channels<float>, channels<double>, channels<float>, channels<float>},
    {add, unite, finalise, squares, moment_terms, moments_of_sums},
};

}  // namespace syncbn::SYNCBN_ISA
