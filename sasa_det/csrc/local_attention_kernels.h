// Local attention, forward and backward, for one instruction set, see instruction_set.h.
//
// A vector is LANES neighbouring pixels of an image row or, where rows are short, the same pixel of
// LANES planes; a plane is one head of one image. Either way no dot product needs a horizontal sum.
// A block of up to ROWS query rows and up to OFFSETS column offsets shares what it loads: the two
// loops over the head's channels, `dots` and `mix`, keep ROWS x OFFSETS vectors in registers.
// Rows of the image are copied once, padded, into a ring of as many as a block can see.

constexpr int ROWS = 3;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

struct Range {
  int first, last;
};

struct Geometry {
  explicit Geometry(const LocalAttention& a)
      : planes(a.batch * a.heads),
        heads(int(a.heads)),
        depth(int(a.depth)),
        height(int(a.height)),
        width(int(a.width)),
        kernel(int(a.kernel)),
        reach(kernel / 2),
        window(kernel * kernel),
        mask(a.mask),
        packed(packing_pays(a)),
        together(packed ? LANES : 1),
        step(packed ? LANES : 1),
        tile(packed ? 1 : LANES),
        left(packed ? (mask ? 0 : reach * LANES) : round_up(reach, LANES)),
        stride(left + round_up(width * step, LANES) + left),
        ring(round_up(std::min(height, ROWS + 2 * round_up(reach, ROWS)), ROWS)) {
    // Strides of whole pages would put all channels into the same few lines of the cache.
    if (stride % 64 == 0) stride += 16;
    row = int64_t(depth) * stride;
    for (int y = 0; y < height; ++y) slots.push_back(y % ring * row);
  }

  // Vectors of weights in a row of all windows, in vectors of pixels and of planes. The latter have
  // no neighbours outside the image, unless these count as zeros.
  static int64_t by_pixel(const LocalAttention& a) {
    return a.batch * a.heads * ((a.width + LANES - 1) / LANES) * a.kernel;
  }
  static int64_t by_plane(const LocalAttention& a) {
    const int64_t reach = a.kernel / 2;
    int64_t columns = a.width * a.kernel;
    for (int64_t x = 0; x < std::min(reach, a.width) && a.mask; ++x) columns -= 2 * (reach - x);
    return (a.batch * a.heads + LANES - 1) / LANES * columns;
  }
  // Planes take longer to read into vectors than pixels.
  static bool packing_pays(const LocalAttention& a) { return by_plane(a) * 10 <= by_pixel(a) * 9; }

  int64_t groups() const { return (planes + together - 1) / together; }
  // Where column x lies in a padded row.
  INLINE int at(int x) const { return left + x * step; }
  // The rows of the windows of query row y that take part, and the columns at x. Columns outside
  // the image that lie in a vector with others inside are masked one by one.
  INLINE Range window_rows(int y) const { return mask ? inside(y, height) : Range{0, kernel}; }
  INLINE Range window_columns(int x) const {
    return mask && packed ? inside(x, width) : Range{0, kernel};
  }

  int64_t planes;
  int heads, depth, height, width, kernel, reach, window;
  bool mask, packed;
  int together;  // planes of a vector
  int step;      // floats from a column to the next
  int tile;      // columns of a vector
  int left;      // padding on the left, and at least as much on the right
  int stride;    // floats of a padded row
  int ring;      // rows of an image that are held at a time; whole blocks, that none is torn
  int64_t row;   // floats of a padded row of all channels
  std::vector<int64_t> slots;  // where an image's rows lie in a ring

 private:
  INLINE Range inside(int at, int size) const {
    return {std::max(0, reach - at), std::min(kernel, size + reach - at)};
  }
};

// The planes of a group, of float or bfloat16.
class Planes {
 public:
  Planes(const void* tensor, bool bfloat16, int64_t group, const Geometry& g)
      : g_(g),
        bfloat16_(bfloat16),
        count_(int(std::min<int64_t>(g.together, g.planes - group * g.together))),
        channel_(int64_t(g.height) * g.width),
        plane_(g.depth * channel_),
        start_(group * g.together * plane_),
        tensor_(const_cast<void*>(tensor)) {}

  // Copy row y of all channels, times `scale`, into a padded row.
  void read_row(int y, float* to, float scale) const {
    if (bfloat16_)
      read(static_cast<const uint16_t*>(tensor_) + start_ + int64_t(y) * g_.width, to, scale);
    else
      read(static_cast<const float*>(tensor_) + start_ + int64_t(y) * g_.width, to, scale);
  }

  // Have the pixels of a vector at (y, x) brought near, where it lies in the image. Runs of a row
  // are too short for processors to do so by themselves.
  INLINE void prefetch(int y, int x) const {
    if (g_.packed || y >= g_.height) return;
    const int64_t size = bfloat16_ ? 2 : 4, pixel = start_ + int64_t(y) * g_.width + x;
    const char* at = static_cast<const char*>(tensor_) + pixel * size;
    for (int c = 0; c < g_.depth; ++c) __builtin_prefetch(at + c * channel_ * size, 0, 2);
  }

  // Write a padded row, every channel times the padded row `scale`.
  void write_row(int y, const float* from, const float* scale) const {
    if (bfloat16_)
      write(from, scale, static_cast<uint16_t*>(tensor_) + start_ + int64_t(y) * g_.width);
    else
      write(from, scale, static_cast<float*>(tensor_) + start_ + int64_t(y) * g_.width);
  }

 private:
  template <typename Element>
  INLINE void read(const Element* from, float* to, float scale) const {
    to += g_.left;
    for (int c = 0; c < g_.depth; ++c, from += channel_, to += g_.stride) {
      if (!g_.packed) {
        for (int x = 0; x < g_.width; ++x) to[x] = widen(from[x]) * scale;
        continue;
      }
      by_fours(from, [&](int lane, const Element* const (&planes)[4], int x) {
        Quad rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = load_four(planes[i] + x) * scale;
        transpose(rows);
        for (int i = 0; i < 4; ++i) store_four(to + (x + i) * LANES + lane, rows[i]);
      }, [&](int lane, const Element* plane, int x) {
        to[x * LANES + lane] = widen(plane[x]) * scale;
      });
    }
  }

  template <typename Element>
  INLINE void write(const float* from, const float* scale, Element* to) const {
    from += g_.left;
    scale += g_.left;
    for (int c = 0; c < g_.depth; ++c, from += g_.stride, to += channel_) {
      if (!g_.packed) {
        for (int x = 0; x < g_.width; ++x) narrow(from[x] * scale[x], to + x);
        continue;
      }
      by_fours(to, [&](int lane, Element* const (&planes)[4], int x) {
        Quad columns[4];
        for (int i = 0; i < 4; ++i) {
          const int at = (x + i) * LANES + lane;
          columns[i] = load_four(from + at) * load_four(scale + at);
        }
        transpose(columns);
        for (int i = 0; i < 4; ++i) store_four(planes[i] + x, columns[i]);
      }, [&](int lane, Element* plane, int x) {
        const int at = x * LANES + lane;
        narrow(from[at] * scale[at], plane + x);
      });
    }
  }

  // Call four(lane, planes, x) for squares of four lanes and columns, and one(lane, plane, x) for
  // what is left.
  template <typename Element, typename Four, typename One>
  INLINE void by_fours(Element* start, Four four, One one) const {
    const int width = g_.width, lanes = width < 4 ? 0 : count_ / 4 * 4;
    for (int lane = 0; lane < lanes; lane += 4) {
      Element* const planes[4] = {start + lane * plane_, start + (lane + 1) * plane_,
                                  start + (lane + 2) * plane_, start + (lane + 3) * plane_};
      for (int x = 0; x + 4 <= width; x += 4) four(lane, planes, x);
      if (width % 4 != 0) four(lane, planes, width - 4);
    }
    for (int lane = lanes; lane < count_; ++lane)
      for (int x = 0; x < width; ++x) one(lane, start + lane * plane_, x);
  }

  const Geometry& g_;
  bool bfloat16_;
  int count_;
  int64_t channel_, plane_, start_;
  void* tensor_;
};

// Padded rows of a group's planes; row y lies at slot y % ring.
class Ring {
 public:
  Ring(Scratch& scratch, const Geometry& g)
      : memory_(scratch.take(size_t(g.ring) * g.row)), next_(0), g_(g) {}
  void restart(int row) { next_ = std::max(row, 0); }
  void read_up_to(const Planes& planes, int end, float scale = 1.0f) {
    for (; next_ < std::min(end, g_.height); ++next_)
      planes.read_row(next_, (*this)[next_], scale);
  }
  void zero(int row) { std::memset((*this)[row], 0, size_t(g_.row) * 4); }
  INLINE float* operator[](int row) const { return memory_ + g_.slots[row]; }

 private:
  float* memory_;
  int next_;
  const Geometry& g_;
};

// Where the vector of (row r, offset j) of a register block lies: start + r * row + j * offset.
struct Block {
  float* start;
  int64_t row, offset;
  INLINE float* operator()(int r, int j) const { return start + r * row + j * offset; }
  INLINE Block from(int r, int j) const { return {(*this)(r, j), row, offset}; }
};

// What one channel of the right side of `dots` and `mix` has for an offset: pixels that are
// shifted by it, a vector of its own, or one number for all lanes.
enum Right { SHIFTED, APART, SPREAD };

template <Right RIGHT>
INLINE Vec load_right(const float* b, int j) {
  return held(RIGHT == SHIFTED ? load(b + j) : RIGHT == APART ? load(b + j * LANES) : all(b[j]));
}

// to(r, j) = start(r, j) + sum_c a_r[c] b_j[c]. Where `highest` is given, it keeps each row's
// largest result so far, row terms included.
template <Right RIGHT, int R, int J>
void dots(const Block& a, const float* b, int b_step, int depth, const Block& start,
          const Block& to, float* highest, const Block& row_term) {
  Vec sum[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sum[r][j] = load(start(r, j));
  for (int c = 0; c < depth; ++c) {
    Vec left[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) left[r] = load(a(r, c));
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Vec right = load_right<RIGHT>(b + int64_t(c) * b_step, j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][j] += left[r] * right;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) store(to(r, j), sum[r][j]);
  if (highest == nullptr) return;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec most = sum[r][0];
#pragma GCC unroll 8
    for (int j = 1; j < J; ++j) most = greater(sum[r][j], most);
    most += load(row_term(r, 0));
    store(highest + r * LANES, greater(most, load(highest + r * LANES)));
  }
}

// to_r[c] += sum_j w[r][j] b_j[c].
template <Right RIGHT, int R, int J>
INLINE void mix_held(const Vec (&w)[R][J], const float* b, int b_step, int depth,
                     const Block& to) {
  for (int c = 0; c < depth; ++c) {
    Vec sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = load(to(r, c));
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Vec right = load_right<RIGHT>(b + int64_t(c) * b_step, j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] += w[r][j] * right;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(to(r, c), sum[r]);
  }
}

template <Right RIGHT, int R, int J>
void mix(const Block& weight, const float* b, int b_step, int depth, const Block& to) {
  Vec w[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) w[r][j] = load(weight(r, j));
  mix_held<RIGHT, R, J>(w, b, b_step, depth, to);
}

// The same with weights 2^(logit(r, j) + shift(r)), which are added to the sums as well.
template <Right RIGHT, int R, int J>
void mix_powers(const Block& logit, const Block& shift, const Block& sums, const float* b,
                int b_step, int depth, const Block& to) {
  Vec w[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vec by = load(shift(r, 0));
    Vec sum = {};
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      w[r][j] = exp2_negative(load(logit(r, j)) + by);
      sum += w[r][j];
    }
    store(sums(r, 0), load(sums(r, 0)) + sum);
  }
  mix_held<RIGHT, R, J>(w, b, b_step, depth, to);
}

typedef void (*Dots)(const Block&, const float*, int, int, const Block&, const Block&, float*,
                     const Block&);
typedef void (*Mix)(const Block&, const float*, int, int, const Block&);
typedef void (*MixPowers)(const Block&, const Block&, const Block&, const float*, int, int,
                          const Block&);

template <Right RIGHT, int... I>
constexpr std::array<Dots, sizeof...(I)> all_dots(std::integer_sequence<int, I...>) {
  return {dots<RIGHT, I / OFFSETS + 1, I % OFFSETS + 1>...};
}
template <Right RIGHT, int... I>
constexpr std::array<Mix, sizeof...(I)> all_mix(std::integer_sequence<int, I...>) {
  return {mix<RIGHT, I / OFFSETS + 1, I % OFFSETS + 1>...};
}
template <Right RIGHT, int... I>
constexpr std::array<MixPowers, sizeof...(I)> all_mix_powers(std::integer_sequence<int, I...>) {
  return {mix_powers<RIGHT, I / OFFSETS + 1, I % OFFSETS + 1>...};
}
using Shapes = std::make_integer_sequence<int, ROWS * OFFSETS>;
static constexpr std::array<Dots, ROWS * OFFSETS> DOTS[] = {
    all_dots<SHIFTED>(Shapes()), all_dots<APART>(Shapes()), all_dots<SPREAD>(Shapes())};
static constexpr std::array<Mix, ROWS * OFFSETS> MIX[] = {
    all_mix<SHIFTED>(Shapes()), all_mix<APART>(Shapes()), all_mix<SPREAD>(Shapes())};
static constexpr std::array<MixPowers, ROWS * OFFSETS> MIX_POWERS[] = {
    all_mix_powers<SHIFTED>(Shapes()), all_mix_powers<APART>(Shapes())};
INLINE int shape(int rows, int offsets) { return (rows - 1) * OFFSETS + offsets - 1; }

// Call f(first, count) for the parts, at most OFFSETS wide and about equal, of a range of offsets.
template <typename F>
INLINE void by_parts(Range range, F f) {
  const int size = range.last - range.first, parts = (size + OFFSETS - 1) / OFFSETS;
  if (parts == 1) return f(range.first, size);
  for (int part = 0; part < parts; ++part) {
    const int first = size * part / parts;
    f(range.first + first, size * (part + 1) / parts - first);
  }
}

// Which of the query rows y and on see an image row: `count` of them from `first` on, the first of
// them as row `window_row` of its window.
struct Seen {
  Seen(const Geometry& g, int row, int y, int rows)
      : first(std::max(0, row - g.reach - y)),
        count(std::min(rows - 1, row + g.reach - y) - first + 1),
        window_row(row - (y + first) + g.reach) {}
  // The next query row sees the same image row one window row earlier.
  Block in(Block windows, int kernel) const {
    return {windows(first, window_row * kernel), windows.row - kernel * windows.offset,
            windows.offset};
  }
  int first, count, window_row;
};

// Call f(row, seen) for the image rows in the windows of query rows y and on, and for the rows
// outside the image as far as they take part.
template <typename F>
INLINE void each_row(const Geometry& g, int y, int rows, F f) {
  const int first = y - g.reach, last = y + rows + g.reach;
  for (int row = g.mask ? std::max(0, first) : first;
       row < (g.mask ? std::min(g.height, last) : last); ++row)
    f(row, Seen(g, row, y, rows));
}

// The embeddings of a group's heads, as the right side of `dots` and `mix`.
class Embeddings {
 public:
  Embeddings(const LocalAttention& a, const Geometry& g, Scratch& scratch)
      : right(g.packed ? APART : SPREAD),
        step(g.kernel * g.step),
        a_(a),
        g_(g),
        entries_(int64_t(g.depth / 2) * g.kernel) {
    if (a.rel_rows == nullptr || !g.packed) return;
    lanes_of_rows_ = scratch.take(size_t(entries_) * LANES);
    lanes_of_cols_ = scratch.take(size_t(entries_) * LANES);
  }

  void choose(int64_t group) {
    if (a_.rel_rows == nullptr) return;
    if (!g_.packed) {
      rows = a_.rel_rows + group % g_.heads * entries_;
      cols = a_.rel_cols + group % g_.heads * entries_;
      return;
    }
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t head = (group * LANES + lane) % g_.heads;
      for (int64_t i = 0; i < entries_; ++i) {
        lanes_of_rows_[i * LANES + lane] = a_.rel_rows[head * entries_ + i];
        lanes_of_cols_[i * LANES + lane] = a_.rel_cols[head * entries_ + i];
      }
    }
    rows = lanes_of_rows_;
    cols = lanes_of_cols_;
  }

  Right right;
  int step;  // from a channel to the next
  const float *rows = nullptr, *cols = nullptr;

 private:
  const LocalAttention& a_;
  const Geometry& g_;
  int64_t entries_;
  float *lanes_of_rows_ = nullptr, *lanes_of_cols_ = nullptr;
};

// The logits, in base 2, of a block of query rows at one vector of columns.
class Windows {
 public:
  Windows(const LocalAttention& a, const Geometry& g, Scratch& scratch)
      : right(g.packed ? APART : SHIFTED), embeddings(a, g, scratch), g_(g), content_(a.key) {
    const int64_t row = int64_t(g.kernel) * LANES;
    for (Block* terms : {&row_terms_, &col_terms_, &shifts})
      *terms = {scratch.take(size_t(ROWS * row)), row, LANES};
    highest_ = scratch.take(ROWS * LANES);
    zeros = {scratch.take(LANES), 0, 0};
  }

  // `query` (r, c) points at channel c of row y + r at column x, in base 2, `logits` (r, o) at
  // offset o of the window. What every logit of window row i lacks is written to shifts(r, i): its
  // row term, less the largest logit.
  void find(Block query, const Ring& keys, int y, int rows, int x, Block logits) const {
    find_terms(query, rows, x);
    for (int r = 0; r < rows; ++r) store(highest_ + r * LANES, all(-INFINITY));
    each_row(g_, y, rows, [&](int row, Seen seen) {
      const Block to = seen.in(logits, g_.kernel), row_term = seen.in(row_terms_, 1);
      const bool content = content_ && row >= 0 && row < g_.height;
      const float* key = keys[content ? row : 0] + g_.at(x - g_.reach);
      by_parts(g_.window_columns(x), [&](int j, int width) {
        DOTS[right][shape(seen.count, width)](query.from(seen.first, 0), key + j * g_.step,
                                              g_.stride, content ? g_.depth : 0,
                                              col_terms_.from(seen.first, j), to.from(0, j),
                                              highest_ + seen.first * LANES, row_term);
      });
    });
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < g_.kernel; ++i)
        store(shifts(r, i), load(row_terms_(r, i)) - load(highest_ + r * LANES));
  }

  Right right;
  Embeddings embeddings;
  Block shifts, zeros;

 private:
  // The two terms of q.r; the column terms of neighbours that are left out are minus infinity.
  void find_terms(Block query, int rows, int x) const {
    if (embeddings.rows != nullptr) {
      const int half = g_.depth / 2;
      by_parts({0, g_.kernel}, [&](int j, int width) {
        const Dots find = DOTS[embeddings.right][shape(rows, width)];
        find(query, embeddings.rows + j * g_.step, embeddings.step, half, zeros,
             row_terms_.from(0, j), nullptr, {});
        find(query.from(0, half), embeddings.cols + j * g_.step, embeddings.step, half, zeros,
             col_terms_.from(0, j), nullptr, {});
      });
    }
    if (!g_.mask || g_.packed || (x >= g_.reach && x + LANES + g_.reach <= g_.width)) {
      if (embeddings.rows == nullptr)
        std::memset(col_terms_.start, 0, size_t(ROWS * col_terms_.row) * 4);
      return;
    }
    const Ints column = lane_numbers() + x;
    for (int j = 0; j < g_.kernel; ++j) {
      const Ints neighbour = column + (j - g_.reach);
      const Ints outside = ((neighbour < 0) | (neighbour >= g_.width)) & (column < g_.width);
      for (int r = 0; r < rows; ++r) {
        const Vec term = embeddings.rows != nullptr ? load(col_terms_(r, j)) : Vec{};
        store(col_terms_(r, j), outside ? all(-INFINITY) : term);
      }
    }
  }

  const Geometry& g_;
  bool content_;
  Block row_terms_, col_terms_;
  float* highest_;
};

// The band of rows that a task works on; bands follow from the shape alone, so that results do not
// depend on the number of threads.
INLINE Range band_of(const LocalAttention& a, int64_t band, int64_t bands) {
  return {int(a.height * band / bands), int(a.height * (band + 1) / bands)};
}

int64_t local_vectors(const LocalAttention& a) {
  return Geometry::packing_pays(a) ? Geometry::by_plane(a) : Geometry::by_pixel(a);
}

int64_t local_forward_bands(const LocalAttention& a) {
  return std::max<int64_t>(1, a.height / 24);
}

int64_t local_forward_tasks(const LocalAttention& a) {
  return Geometry(a).groups() * local_forward_bands(a);
}

// The forward pass of one band of a group's rows after another.
class LocalForward {
 public:
  explicit LocalForward(const LocalAttention& a)
      : a_(a),
        g_(a),
        keys_(scratch_, g_),
        values_(scratch_, g_),
        query_(scratch_.take(size_t(ROWS * g_.row))),
        output_(scratch_.take_unset(size_t(ROWS * g_.row))),
        sums_(scratch_.take_unset(size_t(ROWS) * g_.stride)),
        logits_(scratch_.take_unset(size_t(ROWS) * g_.window * LANES)),
        windows_(a, g_, scratch_) {}

  void run(int64_t task) {
    const int64_t bands = local_forward_bands(a_), group = task / bands;
    const Range own = band_of(a_, task % bands, bands);
    const Planes query(a_.query, a_.bfloat16, group, g_), key(a_.key, a_.bfloat16, group, g_);
    const Planes value(a_.value, a_.bfloat16, group, g_), output(a_.output, a_.bfloat16, group, g_);
    windows_.embeddings.choose(group);
    keys_.restart(own.first - g_.reach);
    values_.restart(own.first - g_.reach);
    for (int y = own.first; y < own.last; y += ROWS) {
      const int rows = std::min(ROWS, own.last - y);
      if (a_.key) keys_.read_up_to(key, y + rows + g_.reach);
      values_.read_up_to(value, y + rows + g_.reach);
      for (int r = 0; r < rows; ++r) query.read_row(y + r, query_ + r * g_.row, LOG2_E);
      std::memset(output_, 0, size_t(rows * g_.row) * 4);
      std::memset(sums_, 0, size_t(rows) * g_.stride * 4);
      for (int x = 0; x < g_.width; x += g_.tile) {
        for (int r = 0; r < ROWS; ++r) {
          output.prefetch(y + r, x);
          query.prefetch(y + ROWS + r, x);
          if (a_.key) key.prefetch(y + ROWS + r + g_.reach, x);
          value.prefetch(y + ROWS + r + g_.reach, x);
        }
        find(y, rows, x);
      }
      for (int r = 0; r < rows; ++r) {
        float* scale = sums_ + r * g_.stride;
        for (int i = 0; i < g_.stride; ++i) scale[i] = 1.0f / scale[i];
        output.write_row(y + r, output_ + r * g_.row, scale);
      }
    }
  }

 private:
  // Sums of values, weighted, and of weights at column x.
  void find(int y, int rows, int x) {
    const int64_t window = int64_t(g_.window) * LANES;
    const Block logits{logits_, window, LANES}, output{output_ + g_.at(x), g_.row, g_.stride};
    const Block sums{sums_ + g_.at(x), g_.stride, 0};
    windows_.find({query_ + g_.at(x), g_.row, g_.stride}, keys_, y, rows, x, logits);
    each_row(g_, y, rows, [&](int row, Seen seen) {
      const Block logit = seen.in(logits, g_.kernel), shift = seen.in(windows_.shifts, 1);
      const bool inside = row >= 0 && row < g_.height;
      const float* value = values_[inside ? row : 0] + g_.at(x - g_.reach);
      by_parts(g_.window_columns(x), [&](int j, int width) {
        MIX_POWERS[windows_.right][shape(seen.count, width)](
            logit.from(0, j), shift, sums.from(seen.first, 0), value + j * g_.step, g_.stride,
            inside ? g_.depth : 0, output.from(seen.first, 0));
      });
    });
  }

  const LocalAttention& a_;
  Geometry g_;
  Scratch scratch_;
  Ring keys_, values_;
  float *query_, *output_, *sums_;  // padded rows
  float* logits_;
  Windows windows_;
};

void local_forward(const LocalAttention& a, int64_t first_task, int64_t last_task) {
  LocalForward work(a);
  for (int64_t task = first_task; task < last_task; ++task) work.run(task);
}

// Bands of rows of a backward pass: as many as keep the cores of a large machine busy where planes
// are few, for each band computes the weights of the query rows within reach beyond it once more.
int64_t local_backward_bands(const LocalAttention& a) {
  constexpr int64_t tasks = 16, rows = 40;
  const int64_t groups = std::max<int64_t>(1, Geometry(a).groups());
  return std::max<int64_t>(1, std::min((tasks + groups - 1) / groups, a.height / rows));
}

int64_t local_backward_tasks(const LocalAttention& a) {
  return Geometry(a).groups() * local_backward_bands(a);
}

// The backward pass of one band of a group's rows after another. A block of query rows finds its
// weights, and adds its share to the gradients of all keys and values that it sees.
class LocalBackward {
 public:
  explicit LocalBackward(const LocalAttention& a)
      : a_(a),
        g_(a),
        keys_(scratch_, g_),
        values_(scratch_, g_),
        queries_(scratch_, g_),
        grads_(scratch_, g_),
        grad_keys_(scratch_, g_),
        grad_values_(scratch_, g_),
        grad_query_(scratch_.take_unset(size_t(ROWS * g_.row))),
        weights_(scratch_.take(size_t(ROWS) * g_.window * g_.stride)),
        grad_logits_(scratch_.take(size_t(ROWS) * g_.window * g_.stride)),
        ones_(scratch_.take_unset(size_t(g_.stride))),
        ln_2_(scratch_.take_unset(size_t(g_.stride))),
        grad_row_terms_(terms()),
        grad_col_terms_(terms()),
        grad_rows_(scratch_.take_unset(embedding_floats())),
        grad_cols_(scratch_.take_unset(embedding_floats())),
        windows_(a, g_, scratch_) {
    std::fill_n(ones_, g_.stride, 1.0f);
    std::fill_n(ln_2_, g_.stride, LN_2);
  }

  void run(int64_t task) {
    const int64_t bands = local_backward_bands(a_), group = task / bands, band = task % bands;
    const Planes query(a_.query, a_.bfloat16, group, g_), key(a_.key, a_.bfloat16, group, g_);
    const Planes value(a_.value, a_.bfloat16, group, g_), grad(a_.grad, a_.bfloat16, group, g_);
    const Planes grad_query(a_.grad_query, a_.bfloat16, group, g_);
    const Planes grad_key(a_.grad_key, a_.bfloat16, group, g_);
    const Planes grad_value(a_.grad_value, a_.bfloat16, group, g_);
    windows_.embeddings.choose(group);
    own_ = band_of(a_, band, bands);
    // Whole blocks, so that none is torn in the rings.
    const int begin = std::max(0, own_.first - g_.reach) / ROWS * ROWS;
    const int end = std::min(g_.height, own_.last + g_.reach);
    keys_.restart(begin - g_.reach);
    values_.restart(begin - g_.reach);
    queries_.restart(begin);
    grads_.restart(begin);
    started_ = finished_ = own_.first;
    std::memset(grad_rows_, 0, embedding_floats() * 4);
    std::memset(grad_cols_, 0, embedding_floats() * 4);
    for (int y = begin; y < end; y += ROWS) {
      const int rows = std::min(ROWS, end - y);
      if (a_.key) keys_.read_up_to(key, y + rows + g_.reach);
      values_.read_up_to(value, y + rows + g_.reach);
      queries_.read_up_to(query, y + rows, LOG2_E);
      grads_.read_up_to(grad, y + rows);
      std::memset(grad_query_, 0, size_t(rows * g_.row) * 4);
      for (int x = 0; x < g_.width; x += g_.tile) {
        for (int r = 0; r < ROWS; ++r) {
          grad_query.prefetch(y + r, x);
          query.prefetch(y + ROWS + r, x);
          grad.prefetch(y + ROWS + r, x);
          if (a_.key) key.prefetch(y + ROWS + r + g_.reach, x);
          value.prefetch(y + ROWS + r + g_.reach, x);
        }
        query_rows(y, rows, x);
      }
      for (int r = 0; r < rows; ++r)
        if (is_own(y + r)) grad_query.write_row(y + r, grad_query_ + r * g_.row, ones_);
      for (; started_ < std::min(own_.last, y + rows + g_.reach); ++started_) {
        grad_keys_.zero(started_);
        grad_values_.zero(started_);
      }
      // No query after these sees the rows before `complete`.
      const int complete = y + rows < end ? std::min(own_.last, y + rows - g_.reach) : own_.last;
      for (int x = 0; x < g_.width; x += g_.tile) {
        for (int row = finished_; row < complete; ++row) {
          if (a_.key) grad_key.prefetch(row, x);
          grad_value.prefetch(row, x);
        }
        key_rows(y, rows, x);
      }
      for (; finished_ < complete; ++finished_) {
        if (a_.key) grad_key.write_row(finished_, grad_keys_[finished_], ln_2_);
        grad_value.write_row(finished_, grad_values_[finished_], ones_);
      }
    }
    if (a_.rel_rows) write_embeddings(group, band);
  }

 private:
  size_t embedding_floats() const { return size_t(g_.depth / 2) * g_.kernel * LANES; }
  Block terms() {
    const int64_t row = int64_t(g_.kernel) * LANES;
    return {scratch_.take_unset(size_t(ROWS * row)), row, LANES};
  }
  bool is_own(int y) const { return y >= own_.first && y < own_.last; }
  Block window(float* memory, int x) const {
    return {memory + g_.at(x), int64_t(g_.window) * g_.stride, g_.stride};
  }
  Block pixels(const Ring& ring, int y, int x) const {
    return {ring[y] + g_.at(x), g_.row, g_.stride};
  }

  // The weights of query rows y and on at column x, the gradients of their logits, and from these
  // the gradients of queries and embeddings. Weights stay without their sum, by which the gradient
  // of the output is divided instead.
  void query_rows(int y, int rows, int x) {
    const Block query = pixels(queries_, y, x), grad = pixels(grads_, y, x);
    const Block weights = window(weights_, x), grad_logits = window(grad_logits_, x);
    windows_.find(query, keys_, y, rows, x, weights);
    // Zeros for pixels behind the end of the row, whatever their windows hold.
    const Ints inside = lane_numbers() < (g_.packed ? LANES : g_.width - x);
    Vec scale[ROWS];
    for (int r = 0; r < rows; ++r) {
      const Vec sum = raise(y + r, x, inside, weights.from(r, 0), windows_.shifts.from(r, 0));
      scale[r] = inside ? 1.0f / sum : Vec{};
      for (int c = 0; c < g_.depth; ++c) store(grad(r, c), load(grad(r, c)) * scale[r]);
    }
    each_row(g_, y, rows, [&](int row, Seen seen) {
      const Block to = seen.in(grad_logits, g_.kernel);
      const bool inside = row >= 0 && row < g_.height;
      const float* value = values_[inside ? row : 0] + g_.at(x - g_.reach);
      by_parts(g_.window_columns(x), [&](int j, int width) {
        DOTS[windows_.right][shape(seen.count, width)](
            grad.from(seen.first, 0), value + j * g_.step, g_.stride, inside ? g_.depth : 0,
            windows_.zeros, to.from(0, j), nullptr, {});
      });
    });
    for (int r = 0; r < rows; ++r)
      logit_gradients(y + r, x, inside, weights.from(r, 0), scale[r], grad_logits.from(r, 0),
                      grad_row_terms_.from(r, 0), grad_col_terms_.from(r, 0));
    const Range own = {std::max(0, own_.first - y), std::min(rows, own_.last - y)};
    if (own.first >= own.last) return;
    const Block grad_query{grad_query_ + g_.at(x), g_.row, g_.stride};
    if (a_.key)
      each_row(g_, y, rows, [&](int row, Seen seen) {
        if (row < 0 || row >= g_.height) return;
        const Block weight = seen.in(grad_logits, g_.kernel);
        const float* key = keys_[row] + g_.at(x - g_.reach);
        by_parts(g_.window_columns(x), [&](int j, int width) {
          MIX[windows_.right][shape(seen.count, width)](weight.from(0, j), key + j * g_.step,
                                                        g_.stride, g_.depth,
                                                        grad_query.from(seen.first, 0));
        });
      });
    if (!a_.rel_rows) return;
    const int half = g_.depth / 2;
    const Embeddings& embeddings = windows_.embeddings;
    by_parts({0, g_.kernel}, [&](int j, int width) {
      const Mix mix = MIX[embeddings.right][shape(rows, width)];
      mix(grad_row_terms_.from(0, j), embeddings.rows + j * g_.step, embeddings.step, half,
          grad_query);
      mix(grad_col_terms_.from(0, j), embeddings.cols + j * g_.step, embeddings.step, half,
          grad_query.from(0, half));
    });
    embedding_gradients(own, query, grad_row_terms_, grad_rows_);
    embedding_gradients(own, query.from(0, half), grad_col_terms_, grad_cols_);
  }

  // From logits to weights; returns their sum.
  Vec raise(int y, int x, Ints inside, Block weights, Block shifts) const {
    const Range rows = g_.window_rows(y), columns = g_.window_columns(x);
    Vec sum = {};
    for (int i = rows.first; i < rows.last; ++i) {
      // Summed row by row: many equal weights in one long sum would all round the same way.
      Vec row_sum = {};
      for (int j = columns.first; j < columns.last; ++j) {
        float* at = weights(0, i * g_.kernel + j);
        const Vec weight = inside ? exp2_negative(load(at) + load(shifts(0, i))) : Vec{};
        store(at, weight);
        row_sum += weight;
      }
      sum += row_sum;
    }
    return sum;
  }

  // From gradients of weights to those of logits, and of the terms of q.r.
  void logit_gradients(int y, int x, Ints inside, Block weights, Vec scale, Block grads,
                       Block row_terms, Block col_terms) const {
    const Range rows = g_.window_rows(y), columns = g_.window_columns(x);
    Vec expected = {};
    for (int i = rows.first; i < rows.last; ++i) {
      Vec row_sum = {};
      for (int o = i * g_.kernel + columns.first; o < i * g_.kernel + columns.last; ++o)
        row_sum += load(weights(0, o)) * load(grads(0, o));
      expected += row_sum;
    }
    expected *= scale;
    for (int i = 0; i < g_.kernel; ++i) {
      store(row_terms(0, i), Vec{});
      store(col_terms(0, i), Vec{});
    }
    for (int i = rows.first; i < rows.last; ++i) {
      Vec row_sum = {};
      for (int j = columns.first; j < columns.last; ++j) {
        const int o = i * g_.kernel + j;
        const Vec raw = load(weights(0, o)) * (load(grads(0, o)) - expected);
        const Vec grad = inside ? raw : Vec{};
        store(grads(0, o), grad);
        row_sum += grad;
        store(col_terms(0, j), load(col_terms(0, j)) + grad);
      }
      store(row_terms(0, i), row_sum);
    }
  }

  // to[c, o] += the sum over rows of query channel c times the gradient of term o.
  void embedding_gradients(Range rows, Block query, Block grads, float* to) const {
    for (int c = 0; c < g_.depth / 2; ++c)
      for (int o = 0; o < g_.kernel; ++o, to += LANES) {
        Vec sum = load(to);
        for (int r = rows.first; r < rows.last; ++r) sum += load(query(r, c)) * load(grads(r, o));
        store(to, sum);
      }
  }

  // The share of query rows y and on in the gradients of keys and values at column x.
  void key_rows(int y, int rows, int x) const {
    for (int from = y; from < y + rows; ++from) {
      const int begin = std::max(own_.first, from - g_.reach);
      const int end = std::min(own_.last, from + g_.reach + 1);
      for (int row = begin; row < end; row = row / ROWS * ROWS + ROWS) {
        const int count = std::min(row / ROWS * ROWS + ROWS, end) - row;
        by_parts(g_.window_columns(x), [&](int j, int width) {
          // A query j - reach columns on sees this key at column offset reach - j.
          const int offset = (row - from + g_.reach) * g_.kernel + g_.kernel - 1 - j;
          const int column = x + j - g_.reach;
          const int64_t row_step = int64_t(g_.kernel) * g_.stride, step = g_.step - g_.stride;
          const Mix mix = MIX[windows_.right][shape(count, width)];
          if (a_.key)
            mix({window(grad_logits_, column)(from - y, offset), row_step, step},
                queries_[from] + g_.at(column), g_.stride, g_.depth, pixels(grad_keys_, row, x));
          mix({window(weights_, column)(from - y, offset), row_step, step},
              grads_[from] + g_.at(column), g_.stride, g_.depth, pixels(grad_values_, row, x));
        });
      }
    }
  }

  // Embeddings' gradients are sums over lanes, or one of each lane.
  void write_embeddings(int64_t group, int64_t band) const {
    const int64_t entries = int64_t(g_.depth / 2) * g_.kernel;
    const int64_t first = group * g_.together;
    for (int64_t plane = first; plane < std::min(g_.planes, first + g_.together); ++plane)
      for (int64_t i = 0; i < entries; ++i) {
        float row = 0, col = 0;
        for (int lane = 0; lane < LANES; ++lane) {
          if (g_.packed && lane != plane - first) continue;
          row += grad_rows_[i * LANES + lane];
          col += grad_cols_[i * LANES + lane];
        }
        a_.grad_rows[(band * g_.planes + plane) * entries + i] = row * LN_2;
        a_.grad_cols[(band * g_.planes + plane) * entries + i] = col * LN_2;
      }
  }

  const LocalAttention& a_;
  Geometry g_;
  Scratch scratch_;
  Ring keys_, values_, queries_, grads_, grad_keys_, grad_values_;
  float* grad_query_;              // padded rows
  float *weights_, *grad_logits_;  // (rows, window, stride)
  float *ones_, *ln_2_;            // padded rows
  Block grad_row_terms_, grad_col_terms_;
  float *grad_rows_, *grad_cols_;
  Windows windows_;
  Range own_ = {};  // the rows whose gradients this task finds
  int started_ = 0, finished_ = 0;
};

void local_backward(const LocalAttention& a, int64_t first_task, int64_t last_task) {
  LocalBackward work(a);
  for (int64_t task = first_task; task < last_task; ++task) work.run(task);
}
