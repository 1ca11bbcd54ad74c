// The pixels of a tile, without those around it: operands and results of a block's warps.
#pragma once

#include <copies.cuh>
#include <places.cuh>

// The 16 pixels of a part of a warp: those in row g and g + 8 of products.
struct Pixels {
  int part;
  int row, col;  // of the first of a thread's two in the tile
  bool inside[2];
  DEVICE Pixels(const Block& block, const Thread& me, int part)
      : part(part), row(me.row() + 2 * part), col(me.col() + me.g) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      inside[h] = block.has_row(block.top + row + h) && block.has_col(block.left + col);
  }
  // A channel of both.
  template <typename Element>
  DEVICE void of(Element* (&both)[2], Element* images, u32 stride, const Block& block,
                 int channel) const {
    both[0] = pixel_of(images, stride, block, row, col, channel);
    both[1] = both[0] + block.width * stride;
  }
  // Their values in planes (batch, heads, height, width), of a head of the block.
  template <typename Element>
  DEVICE void of_planes(Element* (&both)[2], Element* planes, const Block& block, int head) const {
    both[0] = planes + block.in_planes(head, row, col);
    both[1] = both[0] + block.width;
  }
};

// The one of a pair of pixels whose value in planes a thread stores: of the four threads that have
// the pair, the first two have one each.
struct OneOfPair {
  int row, col;
  bool inside;
  DEVICE OneOfPair(const Block& block, const Pixels& pixels, const Thread& me)
      : row(pixels.row + me.t), col(pixels.col) {
    inside = me.t < 2 && block.has_row(block.top + row) && block.has_col(block.left + col);
  }
  // Of values that all four have.
  DEVICE float of(const float (&both)[2]) const { return row % 2 ? both[1] : both[0]; }
  DEVICE void store(float* planes, const Block& block, int head, float value) const {
    if (inside) ::store(planes + block.in_planes(head, row, col), value);
  }
};

// Values of the tile's pixels in planes, of all heads of a block, in shared memory.
template <int DEPTH>
class OwnPlanes {
  static constexpr int PLANE = TILE_ROWS * TILE_COLS;
  Shared planes_;

 public:
  static constexpr int BYTES = Heads<DEPTH>::COUNT * PLANE * 4;

  DEVICE explicit OwnPlanes(Shared planes) : planes_(planes) {}

  // Starts to copy them, zeros outside of the image.
  template <int PARTS>
  DEVICE void copy(const float* planes, const Block& block) const {
    constexpr int THREADS = 32 * WARPS_OF<PARTS>;
    const int row = threadIdx.x % PLANE / TILE_COLS, col = threadIdx.x % TILE_COLS;
    const bool present = block.has_row(block.top + row) && block.has_col(block.left + col);
#pragma unroll
    for (int first = 0; first < Heads<DEPTH>::COUNT; first += THREADS / PLANE) {
      const int head = first + threadIdx.x / PLANE;
      copy_async(planes_ + (first * PLANE + threadIdx.x) * 4,
                 planes + block.in_planes(head, row, col), present && head < block.heads);
    }
  }
  DEVICE void load(float (&both)[2], const Pixels& pixels, int head) const {
    const Shared first = planes_ + (head * PLANE + pixels.row * TILE_COLS + pixels.col) * 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) load_shared(both[h], first + h * TILE_COLS * 4);
  }
};

// The pixels of the tile without halo: operands of the warps' products, and results on their way
// to the images. Those of up to 32 channels pass through shared memory, where a warp has room for
// its pixels: so they are read before they are wanted, and all channels of a pixel are read and
// written at once. Heads of 64 channels leave no room for that.
template <int DEPTH>
class OwnPixels {
  using H = Heads<DEPTH>;
  static constexpr int ROW_BYTES = H::OWN_ROW_BYTES;
  Shared tile_;

  DEVICE static Shared at(int row, int col, int chunk) {
    return row * ROW_BYTES + H::at(col, chunk);
  }
  DEVICE static u32 turned(Shared first, int chunk) { return first ^ chunk << 4; }

 public:
  static constexpr bool STAGED = DEPTH < 64;
  static constexpr int BYTES = STAGED ? TILE_ROWS * ROW_BYTES : 0;

  DEVICE explicit OwnPixels(Shared tile) : tile_(tile) {}

  DEVICE Shared tile() const { return tile_; }

  // What a pixel of a square is of its mean: one over its pixels inside of the image.
  static DEVICE float part_of(const Block& block, int row, int col) {
    const bool rows = block.has_row(block.top + (row | 1));
    const bool cols = block.has_col(block.left + (col | 1));
    return (rows ? 0.5f : 1.f) * (cols ? 0.5f : 1.f);
  }

  // A head's channels of 16 pixels as left operands.
  template <Order ORDER = Order::PAIRS, bool POOLED = false, int PARTS>
  DEVICE void load(u32 (&a)[H::STEPS][4], const ForProducts<DEPTH, PARTS>& places,
                   const u16* images, u32 stride, const Block& block, const Pixels& pixels,
                   const Thread& me, int head) const {
    if constexpr (STAGED) {
#pragma unroll
      for (int s = 0; s < H::STEPS; ++s)
        load_matrices(a[s], turned(places.operands, head * H::HEAD_CHUNKS + 2 * s) +
                                (tile_ + 2 * pixels.part * ROW_BYTES));
    } else {
      constexpr bool IN_CHUNKS = ORDER == Order::CHUNKS;
      const int channel = block.first_head * DEPTH + (IN_CHUNKS ? 8 : 2) * me.t;
      const u16* from[2];
      if constexpr (POOLED)
        from[0] = from[1] = Squares(block).of(images, stride, pixels.row, pixels.col, channel);
      else
        pixels.of(from, images, stride, block, channel);
      if constexpr (IN_CHUNKS) {
        // What is not inside is 0. The choice also moves a word to its operand, which the compiler
        // does for each product otherwise; so it reads another pixel there, which is inside.
        const u16* first = POOLED ? Squares(block).of(images, stride, 0, 0, channel)
                                  : pixel_of(images, stride, block, 0, 0, channel);
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int j = 0; j < H::STEPS / 2; ++j) {
            u32 chunk[4];
            ::load(chunk,
                   reinterpret_cast<const u32*>((pixels.inside[h] ? from[h] : first) + 32 * j));
#pragma unroll
            for (int i = 0; i < 4; ++i)
              a[2 * j + i / 2][i % 2 * 2 + h] = pixels.inside[h] ? chunk[i] : 0u;
          }
        return;
      }
#pragma unroll
      for (int s = 0; s < H::STEPS; ++s)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const u32* word = reinterpret_cast<const u32*>(from[e % 2] + 16 * s + e / 2 * 8);
          a[s][e] = pixels.inside[e % 2] ? ::load(word) : 0u;
        }
    }
  }

  // Takes a chunk of the results of a head, as products have them. They take the place of the
  // head's operands, which all threads of the warp must have loaded.
  template <int PARTS>
  DEVICE void put(const u32 (&words)[2], const ForSums<DEPTH, PARTS>& places, u16* images,
                  u32 stride, const Block& block, const Pixels& pixels, const Thread& me, int head,
                  int chunk) const {
    if constexpr (STAGED) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_shared(turned(places.words, head * H::HEAD_CHUNKS + chunk) +
                         (tile_ + (2 * pixels.part + h) * ROW_BYTES),
                     words[h]);
    } else {
      u16* to[2];
      pixels.of(to, images, stride, block, block.first_head * DEPTH + 2 * me.t);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (pixels.inside[h]) ::store(reinterpret_cast<u32*>(to[h] + 8 * chunk), words[h]);
    }
  }

  // The same of one pixel of the tile.
  DEVICE void put(const u32 (&words)[4], u16* images, u32 stride, const Block& block, int row,
                  int col, int head, int chunk) const {
    if constexpr (STAGED)
      store_shared(tile_ + at(row, col, head * H::HEAD_CHUNKS + chunk), words);
    else
      store(reinterpret_cast<u32*>(
                pixel_of(images, stride, block, row, col, block.first_head * DEPTH + 8 * chunk)),
            words);
  }

  // Takes a chunk of a head, as products have it, with what a thread's two pixels are multiplied
  // with, and puts the sums of squares, which it returns. What is not inside has the factor 0.
  template <typename T, int PARTS>
  DEVICE u32 put_sums(const float (&sum)[4], const float (&factors)[2],
                      const ForSums<DEPTH, PARTS>& places, u16* images, u32 stride,
                      const Block& block, const Pixels& pixels, const Thread& me, int head,
                      int chunk) const {
    float sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] = sum[i] * factors[0] + sum[2 + i] * factors[1];
      sums[i] += of_neighbour(sums[i], 4);
    }
    const u32 word = T::pack(sums[0], sums[1]);
    if constexpr (STAGED) {
      if (me.g % 2 == 0)
        store_shared(turned(places.words, head * H::HEAD_CHUNKS + chunk) +
                         (tile_ + 2 * pixels.part * ROW_BYTES),
                     word);
    } else {
      if (me.g % 2 == 0 && pixels.inside[0])
        ::store(reinterpret_cast<u32*>(Squares(block).of(images, stride, pixels.row, pixels.col,
                                                         block.first_head * DEPTH + 2 * me.t)) +
                    4 * chunk,
                word);
    }
    return word;
  }

  // Takes a chunk of one pixel of the tile, and puts the means of squares, of whose pixels eight
  // threads and the next eight have two rows.
  template <typename T>
  DEVICE void put_means(const u32 (&words)[4], u16* images, u32 stride, const Block& block, int row,
                        int col, int head, int chunk, bool inside) const {
    const float part = part_of(block, row, col);
    u32 means[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sums[2] = {inside ? T::low(words[i]) : 0.f, inside ? T::high(words[i]) : 0.f};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sums[e] += of_neighbour(sums[e], 1);
        sums[e] = (sums[e] + of_neighbour(sums[e], 8)) * part;
      }
      means[i] = T::pack(sums[0], sums[1]);
    }
    if (row % 2 != 0 || col % 2 != 0) return;
    if constexpr (STAGED)
      store_shared(tile_ + at(row, col, head * H::HEAD_CHUNKS + chunk), means);
    else if (inside)
      ::store(reinterpret_cast<u32*>(Squares(block).of(images, stride, row, col,
                                                       block.first_head * DEPTH + 8 * chunk)),
              means);
  }

  // Writes the results of all heads, or their means of squares, which all threads of the warp must
  // have put.
  template <bool MEANS, int PARTS>
  DEVICE void store_all(u16* images, u32 stride, const Block& block, const Thread& me) const {
    if constexpr (STAGED) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        if constexpr (MEANS)
          store_means(images, stride, block, me, part);
        else
          store_pixels(images, stride, block, me, part);
    }
  }

 private:
  DEVICE void store_pixels(u16* images, u32 stride, const Block& block, const Thread& me,
                           int part) const {
    const Pixels pixels(block, me, part);
    u16* to[2];
    pixels.of(to, images, stride, block, block.first_head * DEPTH + 8 * me.t);
    const bool wanted = 8 * me.t < block.heads * DEPTH;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      u32 words[4];
      load_shared(words, tile_ + at(pixels.row + h, pixels.col, me.t));
      if (pixels.inside[h] && wanted) store(reinterpret_cast<u32*>(to[h]), words);
    }
  }

  // A thread has four channels of a square.
  DEVICE void store_means(u16* images, u32 stride, const Block& block, const Thread& me,
                          int part) const {
    const int row = me.row() + 2 * part, col = me.col() + me.lane / 8 * 2;
    const int chunk = me.lane % 8 / 2, half = me.lane % 2;
    u32 means[2];
    load_shared(means, tile_ + at(row, col, chunk) + 8 * half);
    if (8 * chunk < block.heads * DEPTH && block.has_row(block.top + row) &&
        block.has_col(block.left + col))
      ::store(reinterpret_cast<u32*>(Squares(block).of(
                  images, stride, row, col, block.first_head * DEPTH + 8 * chunk + 4 * half)),
              means);
  }
};
