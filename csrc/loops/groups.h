// Neighbouring channels of a row, in vectors, and their numbers.
//
// Included once per instruction set, inside its namespace (see loops.h).

// Neighbouring channels: four vectors of them, which are two pairs with the order that load_pair
// gives them, or one vector, of which perhaps only the first n lanes count.
template <class T, int vectors>
struct Group {
  using R = Real<T>;
  using V = Vector<R>;
  static constexpr int64_t w = lanes<R>;
  V v[vectors];

  static SYNCBN_INLINE Group zero() { return {}; }
  static SYNCBN_INLINE Group elements(const T* p, int64_t n) {
    if constexpr (vectors == 4) {
      const Pair<R> low = load_pair(p), high = load_pair(p + 2 * w);
      return {{low.a, low.b, high.a, high.b}};
    } else {
      return {{n == w ? load(p) : load_some(p, n)}};
    }
  }
  static SYNCBN_INLINE Group channels(const R* p, int64_t n) {
    if constexpr (vectors == 4) {
      const Pair<R> low = load_channels<T>(p), high = load_channels<T>(p + 2 * w);
      return {{low.a, low.b, high.a, high.b}};
    } else {
      return {{n == w ? load(p) : load_some(p, n)}};
    }
  }
  // Numbers in memory that have the pairs' order already.
  static SYNCBN_INLINE Group ordered(const R* p, int64_t n) {
    if constexpr (vectors == 4)
      return {{load(p), load(p + w), load(p + 2 * w), load(p + 3 * w)}};
    else
      return channels(p, n);
  }
  SYNCBN_INLINE void to_elements(T* p, int64_t n) const {
    if constexpr (vectors == 4) {
      store_pair(p, Pair<R>{v[0], v[1]});
      store_pair(p + 2 * w, Pair<R>{v[2], v[3]});
    } else {
      n == w ? store(p, v[0]) : store_some(p, n, v[0]);
    }
  }
  SYNCBN_INLINE void to_channels(R* p, int64_t n) const {
    if constexpr (vectors == 4) {
      store_channels<T>(p, Pair<R>{v[0], v[1]});
      store_channels<T>(p + 2 * w, Pair<R>{v[2], v[3]});
    } else {
      n == w ? store(p, v[0]) : store_some(p, n, v[0]);
    }
  }
  SYNCBN_INLINE void to_ordered(R* p, int64_t n) const {
    if constexpr (vectors == 4)
      for (int64_t j = 0; j < 4; ++j) store(p + j * w, v[j]);
    else
      to_channels(p, n);
  }
};

// Calls body(group, c, n) for channels [begin, end), those from c on. The group's type alone
// counts: it says how many they are. n < lanes only where they are a part of a vector.
template <class T, class Body>
SYNCBN_INLINE void for_groups(int64_t begin, int64_t end, Body body) {
  constexpr int64_t w = lanes<Real<T>>;
  int64_t c = begin;
  for (; c + 4 * w <= end; c += 4 * w) body(Group<T, 4>{}, c, w);
  for (; c + w <= end; c += w) body(Group<T, 1>{}, c, w);
  if (c < end) body(Group<T, 1>{}, c, end - c);
}

// Per-channel numbers in the pairs' order, put into it once for all rows.
template <class T>
class Ordered {
 public:
  using R = Real<T>;
  SYNCBN_INLINE Ordered(const R* numbers, int64_t channels) : numbers_(numbers) {
    if constexpr (reordered) {
      for_groups<T>(0, channels, [&](auto group, int64_t c, int64_t n) SYNCBN_LAMBDA {
        decltype(group)::channels(numbers + c, n).to_ordered(own_ + c, n);
      });
      numbers_ = own_;
    }
  }
  template <class G>
  SYNCBN_INLINE G at(G, int64_t c, int64_t n) const {
    return G::ordered(numbers_ + c, n);
  }

 private:
  static constexpr bool reordered = std::is_same_v<T, BFloat16>;
  R own_[reordered ? widest_rows : 1];
  const R* numbers_;
};
