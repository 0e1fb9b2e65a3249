// The judge of the loops, in long double, and tensors that notice a wrong read or write.
// Independent of the library's conversions and arithmetic; only plan/geometry.h says what a layout
// is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "plan/geometry.h"

namespace syncbn::test {

using Exact = long double;
using Sizes = std::vector<int64_t>;

// --- element types ---------------------------------------------------------------------------

struct Format {
  const char* name;
  int64_t size;
  int digits, least;  // of the significand, and the smallest normal number's exponent
};
constexpr Format formats[dtypes] = {{"float32", 4, 24, -126},
                                    {"float64", 8, 53, -1022},
                                    {"bfloat16", 2, 8, -126},
                                    {"float16", 2, 11, -14}};

inline const Format& format(Dtype d) { return formats[int(d)]; }
inline Exact rounding(Dtype d) { return std::ldexp(Exact(1), -format(d).digits); }
inline Dtype arithmetic(Dtype d) { return d == Dtype::float64 ? d : Dtype::float32; }
// How far a correctly rounded result may be from the value v.
inline Exact last_place(Dtype d, Exact v) {
  return rounding(d) * std::fabs(v) + std::ldexp(Exact(1), format(d).least - format(d).digits);
}

// From here on a value is rounded to infinity.
inline Exact overflow(Dtype d) { return std::ldexp(2 - rounding(d), 1 - format(d).least); }

inline Exact decode_short(uint16_t bits, const Format& f) {
  const int places = f.digits - 1, exponent = (bits & 0x7fff) >> places;
  const int fraction = bits & ((1 << places) - 1);
  Exact v;
  if (exponent == 0x7fff >> places)
    v = fraction ? NAN : INFINITY;
  else if (exponent == 0)
    v = std::ldexp(Exact(fraction), f.least - places);
  else
    v = std::ldexp(Exact(fraction + (1 << places)), exponent - 1 + f.least - places);
  return bits & 0x8000 ? -v : v;
}

inline uint16_t encode_short(Exact v, const Format& f) {
  const int places = f.digits - 1, infinite = 0x7fff >> places << places;
  const int sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return uint16_t(infinite | 1 << (places - 1));
  if (std::isinf(v)) return uint16_t(sign | infinite);
  if (v == 0) return uint16_t(sign);
  const int exponent = std::max(std::ilogb(v), f.least);
  // The leading one, and a carry out of the fraction, add to the exponent: so the bits are a sum.
  const long bits = std::lrint(std::ldexp(std::fabs(v), places - exponent)) +
                    (long(exponent - f.least) << places);
  return uint16_t(sign | (bits < infinite ? bits : infinite));
}

inline Exact decode(const char* p, Dtype d) {
  float single;
  double twice;
  uint16_t bits;
  switch (d) {
    case Dtype::float32: return std::memcpy(&single, p, 4), single;
    case Dtype::float64: return std::memcpy(&twice, p, 8), twice;
    default: return std::memcpy(&bits, p, 2), decode_short(bits, format(d));
  }
}

inline void encode(Exact v, char* p, Dtype d) {
  const float single = float(v);
  const double twice = double(v);
  uint16_t bits;
  switch (d) {
    case Dtype::float32: std::memcpy(p, &single, 4); return;
    case Dtype::float64: std::memcpy(p, &twice, 8); return;
    default: bits = encode_short(v, format(d)), std::memcpy(p, &bits, 2);
  }
}

// --- tensors ---------------------------------------------------------------------------------

// Where the elements lie, channel by channel (dimension 1; of a vector, dimension 0).
inline Sizes places(const Sizes& sizes, const Sizes& strides) {
  Sizes order;
  if (sizes.size() > 1) order.push_back(1);
  for (size_t d = 0; d < sizes.size(); ++d)
    if (d != 1) order.push_back(int64_t(d));
  Sizes result{0};
  for (int64_t d : order) {
    Sizes longer;
    longer.reserve(result.size() * size_t(sizes[d]));
    for (int64_t place : result)
      for (int64_t i = 0; i < sizes[d]; ++i) longer.push_back(place + i * strides[d]);
    result.swap(longer);
  }
  return result;
}

// A tensor in memory no larger than it needs, all NaN at first: a gap that is read spoils what
// comes of it, one that is written is no NaN, and the sanitizer guards both ends.
struct Array {
  Dtype dtype;
  Sizes sizes, strides;
  std::shared_ptr<const Sizes> at;  // shared by copies, of which each run makes some
  int64_t skip;  // elements before the first: 1 takes it off its alignment to vectors
  std::vector<char> memory;

  Array() : dtype(Dtype::float32), skip(0) {}
  Array(Dtype d, const Sizes& size, const Sizes& stride, int64_t skipped)
      : dtype(d),
        sizes(size),
        strides(stride),
        at(std::make_shared<Sizes>(places(size, stride))),
        skip(skipped) {
    int64_t last = -1;
    for (int64_t place : *at) last = std::max(last, place);
    memory.assign(size_t((skip + last + 1) * width()), char(0xff));
  }

  int64_t width() const { return format(dtype).size; }
  int64_t numel() const { return int64_t(at->size()); }
  int64_t dims() const { return int64_t(sizes.size()); }
  char* data() { return memory.data() + skip * width(); }
  const char* data() const { return memory.data() + skip * width(); }
  Exact get(int64_t i) const { return decode(data() + (*at)[size_t(i)] * width(), dtype); }
  void set(int64_t i, Exact v) { encode(v, data() + (*at)[size_t(i)] * width(), dtype); }

  std::vector<Exact> values() const {
    std::vector<Exact> v;
    v.reserve(at->size());
    for (int64_t i = 0; i < numel(); ++i) v.push_back(get(i));
    return v;
  }
  bool gaps_untouched() const {
    std::vector<char> rest = memory;
    for (int64_t place : *at)
      std::memset(&rest[size_t((skip + place) * width())], 0xff, size_t(width()));
    for (char byte : rest)
      if (byte != char(0xff)) return false;
    return true;
  }
};

inline Array copied(const Array& from, const Sizes& strides) {
  Array to(from.dtype, from.sizes, strides, 0);
  for (int64_t i = 0; i < from.numel(); ++i) to.set(i, from.get(i));
  return to;
}

inline std::string text(const Sizes& numbers) {
  std::string s = "(";
  for (size_t i = 0; i < numbers.size(); ++i) s += (i ? ", " : "") + std::to_string(numbers[i]);
  return s + ")";
}

// --- moments and what a result may differ by ---------------------------------------------------

struct Moments {
  Exact count = 0, mean = 0, m2 = 0;

  Exact deviation() const { return count > 0 ? std::sqrt(m2 / count) : 0; }
};

inline Moments moments(const Exact* x, int64_t n) {
  Moments m;
  m.count = Exact(n);
  for (int64_t i = 0; i < n; ++i) m.mean += x[i] / m.count;
  for (int64_t i = 0; i < n; ++i) m.m2 += (x[i] - m.mean) * (x[i] - m.mean);
  return m;
}

inline Moments merged(const std::vector<Moments>& sets) {
  Moments m;
  for (const Moments& s : sets) m.count += s.count;
  for (const Moments& s : sets) m.mean += m.count > 0 ? s.mean * (s.count / m.count) : 0;
  for (const Moments& s : sets) m.m2 += s.m2 + s.count * (s.mean - m.mean) * (s.mean - m.mean);
  return m;
}

// Errors of statistics: of the mean, and of M2 relative to it plus a part that is not relative.
// They are returned in double, so the mean is no better than its last place there.
struct Errors {
  Exact mean, relative, m2;

  Errors(const Moments& m, Exact sums) {
    const Exact place = 8 * rounding(Dtype::float64) * std::fabs(m.mean), std = m.deviation();
    mean = sums * std + place;
    relative = sums + (std > 0 ? place / std : 0);
    m2 = m.count * place * place;
  }
};

}  // namespace syncbn::test
