// What the kernels of local attention share: a block's tile of pixels in shared memory.
//
// A block has a tile of 8 x 16 pixels and 32 channels, of one head or several, or one head of 64; a
// warp has 2 x 8 of the pixels, the 16 rows of a product. Pixel g of each of its two rows is row g
// and g + 8.
#pragma once

#include <levels.cuh>
#include <warp.cuh>

constexpr int TILE_ROWS = 8, TILE_COLS = 16;
constexpr int WARPS = 8, THREADS = 32 * WARPS;

// Logit of what is outside of the window or the image. Finite, as it may be added to itself.
constexpr float LOWEST = -1e30f;
constexpr float LOG2_E = 1.44269504f;

// Heads of a width that a block takes at once, and their pixels in shared memory.
template <int DEPTH>
struct Heads {
  static constexpr int CHANNELS = DEPTH < 32 ? 32 : DEPTH, COUNT = CHANNELS / DEPTH;
  static constexpr int CHUNKS = CHANNELS / 8;  // of 16 bytes
  static constexpr int PIXEL_BYTES = 2 * CHANNELS;
  // Columns of a tile with its halo. Warps read 24, the last two for nothing: those are in the next
  // row, or what comes behind the tile, which must be numbers. Heads of 64 channels have nothing
  // there.
  static constexpr int HALO_COLS = TILE_COLS + (DEPTH < 64 ? 6 : 8);
  static constexpr int ROW_BYTES = HALO_COLS * PIXEL_BYTES;
  // Steps of 16 channels of a head, and chunks of it.
  static constexpr int STEPS = DEPTH < 16 ? 1 : DEPTH / 16, HEAD_CHUNKS = DEPTH / 8;

  // What the number of a chunk is xor-ed with, so that neither 8 neighbours nor 4 neighbours and
  // those 8 further on share a bank.
  static DEVICE int turn(int col) {
    return CHUNKS == 4 ? (col >> 1 ^ col >> 3 << 1) & 3 : (col ^ col >> 3 << 2) & 7;
  }
  static DEVICE Shared at(int col, int chunk) {
    return col * PIXEL_BYTES + ((chunk ^ turn(col)) << 4);
  }
};

constexpr int halo_rows(int kernel) { return TILE_ROWS + kernel - 1; }
template <int DEPTH, int KERNEL>
constexpr int tile_bytes() {
  return halo_rows(KERNEL) * Heads<DEPTH>::ROW_BYTES;
}

// Where a thread is.
struct Thread {
  int lane, warp, g, t;  // lane = 4 g + t
  DEVICE Thread() : lane(threadIdx.x % 32), warp(threadIdx.x / 32), g(lane / 4), t(lane % 4) {}
  // The first of its warp's pixels in the block.
  DEVICE int row() const { return warp / 2 * 2; }
  DEVICE int col() const { return warp % 2 * 8; }
};

// Images of one size: all of a batch, or those of one of its levels.
struct Level {
  int height, width;
  u32 first_row;    // of tiles, among those of all levels
  u32 first_tile;   // of an image, among those of all levels
  u32 first_pixel;  // of the first image, among those of all levels' images
};

// What all kernels are started with.
struct Sizes {
  int heads;
  u32 groups_inverse;  // 2^32 over the groups of heads, rounded up; any for one group
  u32 tiles;           // of an image, of all levels
  // From the first on; those that there are not begin at row 2^32 - 1.
  Level levels[MOST_LEVELS];
};

// The tile and the heads of a block. Its grid is the groups of heads times the tiles of a row, of
// the level where these are most; the rows of tiles of one level after the other; and the images of
// a batch. Of each level, pixels are (batch, height, width, channels), and all levels' lie one
// after the other.
struct Block {
  int height, width, top, left;
  int first_head, heads;
  // The number of the tile's first pixel, counted from the first of all. Places in the tile are
  // counted from there, and are small: whoever starts the kernels checks that those of 16 rows fit
  // 32 bits.
  u64 corner;
  u64 first_plane;  // where its first head's values in planes begin
  u32 tile;         // its number among those of all images

  // With a `zero` that the compiler does not know, nothing is kept in registers for it.
  template <int DEPTH>
  static DEVICE Block of(const Sizes& sizes, u32 zero = 0) {
    constexpr int COUNT = Heads<DEPTH>::COUNT;
    const int groups = (sizes.heads + COUNT - 1) / COUNT;
    const int tile_col = groups == 1 ? blockIdx.x : product_high(blockIdx.x, sizes.groups_inverse);
    const u32 row = blockIdx.y + zero;
    int number = 0;
#pragma unroll
    for (int i = 1; i < MOST_LEVELS; ++i) number += row >= sizes.levels[i].first_row;
    const Level& level = sizes.levels[number];
    const int tile_row = row - level.first_row;
    Block block;
    block.height = level.height, block.width = level.width;
    block.top = tile_row * TILE_ROWS, block.left = tile_col * TILE_COLS;
    block.first_head = (blockIdx.x - tile_col * groups) * COUNT;
    block.heads = min(COUNT, sizes.heads - block.first_head);
    const u32 place = block.place(block.top, block.left);
    const u64 area = static_cast<u32>(level.height * level.width);
    block.corner = level.first_pixel + blockIdx.z * area + place;
    block.first_plane = static_cast<u64>(level.first_pixel) * sizes.heads +
                        (blockIdx.z * sizes.heads + block.first_head) * area + place;
    block.tile = blockIdx.z * sizes.tiles + level.first_tile +
                 tile_row * ((level.width + TILE_COLS - 1) / TILE_COLS) + tile_col;
    return block;
  }
  // Whether there is such a tile: other levels may have more of them in a row.
  DEVICE bool is_there() const { return left < width; }
  DEVICE int place(int row, int col) const { return row * width + col; }
  DEVICE bool has_row(int y) const { return static_cast<u32>(y) < static_cast<u32>(height); }
  DEVICE bool has_col(int x) const { return static_cast<u32>(x) < static_cast<u32>(width); }
  // Where the tile begins in planes of (batch, heads, height, width), of a head of the block.
  DEVICE u64 plane(int head) const {
    return first_plane + static_cast<u64>(head) * static_cast<u32>(height * width);
  }
};

// A channel of a pixel of the tile, given by its row and column there.
template <typename Element>
DEVICE Element* pixel_of(Element* images, u32 stride, const Block& block, int row, int col,
                         int channel) {
  const u32 offset = block.place(row, col) * stride + channel;
  return held(images + block.corner * stride) + offset;
}

// The squares of 2 x 2 pixels of a block's tile in images that have one value for each: those at
// the edge may have a row or a column outside of the image.
struct Squares {
  int cols;
  u64 corner;  // the number of the tile's first square

  DEVICE explicit Squares(const Block& block) : cols((block.width + 1) >> 1) {
    const u64 area = static_cast<u32>((block.height + 1 >> 1) * cols);
    corner = blockIdx.z * area + static_cast<u32>((block.top >> 1) * cols + (block.left >> 1));
  }
  // A channel of the square that a pixel of the tile is in.
  template <typename Element>
  DEVICE Element* of(Element* images, u32 stride, int row, int col, int channel) const {
    const u32 offset = ((row >> 1) * cols + (col >> 1)) * stride + channel;
    return held(images + corner * stride) + offset;
  }
};

// What gradients of pixels are of those of their squares, for whole squares: kernels multiply what
// they have added up. Whoever starts them doubles the gradients of squares that have half as many
// pixels.
template <bool POOLED>
constexpr float PART = POOLED ? 0.25f : 1.f;

// Starts to copy `ROWS` x `COLS` pixels, from `REACH` above and left of the tile, zeros outside of
// the image, of images whose pixels lie `stride` elements apart. If the images are `POOLED`, pixels
// have the values of their squares.
template <int DEPTH, int REACH, int ROWS, int COLS, bool POOLED = false>
DEVICE void copy_pixels(Shared to, const u16* from, u32 stride, const Block& block,
                        const Thread& me) {
  using H = Heads<DEPTH>;
  constexpr int STEP = 32 / H::CHUNKS, ROW_BYTES = COLS * H::PIXEL_BYTES;
  const int chunk = me.lane % H::CHUNKS, col = me.lane / H::CHUNKS;
  const int y = block.top - REACH + me.warp, x = block.left - REACH + col;
  const bool wanted = 8 * chunk < block.heads * DEPTH;
  const u32 channel = block.first_head * DEPTH + 8 * chunk;
  const u16* row;
  int row_step = WARPS * block.width * stride, col_step = STEP * stride;
  if constexpr (POOLED) {
    // Steps are of whole squares. Their rows and columns are counted from above and left of all.
    constexpr int FIRST = (REACH + 1) / 2;
    const Squares squares(block);
    const u64 corner = squares.corner - static_cast<u32>(FIRST * squares.cols + FIRST);
    const int square_row = (me.warp - REACH >> 1) + FIRST, square_col = (col - REACH >> 1) + FIRST;
    const u32 offset = (square_row * squares.cols + square_col) * stride + channel;
    row = held(from + corner * stride) + offset;
    row_step = WARPS / 2 * squares.cols * stride, col_step = STEP / 2 * stride;
  } else {
    const u64 corner = block.corner - static_cast<u32>(block.place(REACH, REACH));
    row = held(from + corner * stride) + (block.place(me.warp, col) * stride + channel);
  }
  to += me.warp * ROW_BYTES;
#pragma unroll
  for (int r = 0; r < ROWS; r += WARPS) {
    const bool in_tile = r + WARPS <= ROWS || me.warp + r < ROWS;
    const bool in_rows = wanted && block.has_row(y + r);
    const u16* chunks = row;
#pragma unroll
    for (int c = 0; c < COLS; c += STEP) {
      copy_async(to + r * ROW_BYTES + H::at(col + c, chunk), chunks,
                 in_rows && block.has_col(x + c),
                 in_tile && (c + STEP <= COLS || col + c < COLS));
      chunks += col_step;
    }
    row += row_step;
  }
}

// Starts to copy the tile and its halo.
template <int DEPTH, int KERNEL, bool POOLED = false>
DEVICE void copy_tile(Shared to, const u16* from, u32 stride, const Block& block,
                      const Thread& me) {
  copy_pixels<DEPTH, KERNEL / 2, halo_rows(KERNEL), Heads<DEPTH>::HALO_COLS, POOLED>(
      to, from, stride, block, me);
}

// A warp's 16 pixels: those in row g and g + 8 of products.
struct Pixels {
  int row, col;  // of the first of a thread's two in the tile
  bool inside[2];
  DEVICE Pixels(const Block& block, const Thread& me) : row(me.row()), col(me.col() + me.g) {
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
  DEVICE void of_planes(Element* (&both)[2], Element* planes, const Block& block,
                        int head) const {
    both[0] = held(planes + block.plane(head)) + static_cast<u32>(block.place(row, col));
    both[1] = both[0] + static_cast<u32>(block.width);
  }
};

// The pixels of the tile without halo: operands of the warps' products, and results on their way
// to the images. Those of up to 32 channels pass through shared memory, where a warp has room for
// its 16 pixels: so they are read before they are wanted, and all channels of a pixel are read and
// written at once. Heads of 64 channels leave no room for that.
template <int DEPTH>
class OwnPixels {
  using H = Heads<DEPTH>;
  static constexpr bool STAGED = DEPTH < 64;
  static constexpr int ROW_BYTES = TILE_COLS * H::PIXEL_BYTES;
  // What a thread reads operands from, and writes its words of results to, of the first chunk.
  Shared tile_, operands_, words_;

  DEVICE static Shared at(int row, int col, int chunk) {
    return row * ROW_BYTES + H::at(col, chunk);
  }
  DEVICE static u32 turned(Shared first, int chunk) { return first ^ chunk << 4; }

 public:
  static constexpr int BYTES = STAGED ? TILE_ROWS * ROW_BYTES : 0;

  DEVICE OwnPixels(Shared tile, const Thread& me)
      : tile_(tile),
        operands_(at(me.row() + me.lane / 8 % 2, me.col() + me.lane % 8,
                     DEPTH == 8 ? 0 : me.lane / 16)),
        words_(at(me.row(), me.col() + me.g, 0) + 4 * me.t) {}

  DEVICE Shared tile() const { return tile_; }

  // What a pixel of a square is of its mean: one over its pixels inside of the image.
  static DEVICE float part_of(const Block& block, int row, int col) {
    const bool rows = block.has_row(block.top + (row | 1));
    const bool cols = block.has_col(block.left + (col | 1));
    return (rows ? 0.5f : 1.f) * (cols ? 0.5f : 1.f);
  }

  // Starts to copy operands; they are there as those of copy_tile.
  template <bool POOLED = false>
  DEVICE void copy(const u16* images, u32 stride, const Block& block, const Thread& me) const {
    if (STAGED)
      copy_pixels<DEPTH, 0, TILE_ROWS, TILE_COLS, POOLED>(tile_, images, stride, block, me);
  }

  // A head's channels of the warp's 16 pixels as left operands.
  template <bool POOLED = false>
  DEVICE void load(u32 (&a)[H::STEPS][4], const u16* images, u32 stride, const Block& block,
                   const Pixels& pixels, const Thread& me, int head) const {
    if constexpr (STAGED) {
#pragma unroll
      for (int s = 0; s < H::STEPS; ++s)
        load_matrices(a[s], tile_ + turned(operands_, head * H::HEAD_CHUNKS + 2 * s));
    } else {
      const u16* from[2];
      if constexpr (POOLED)
        from[0] = from[1] = Squares(block).of(images, stride, pixels.row, pixels.col,
                                              block.first_head * DEPTH + 2 * me.t);
      else
        pixels.of(from, images, stride, block, block.first_head * DEPTH + 2 * me.t);
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
  DEVICE void put(const u32 (&words)[2], u16* images, u32 stride, const Block& block,
                  const Pixels& pixels, const Thread& me, int head, int chunk) const {
    if constexpr (STAGED) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_shared(tile_ + h * ROW_BYTES + turned(words_, head * H::HEAD_CHUNKS + chunk),
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
      store(reinterpret_cast<u32*>(pixel_of(images, stride, block, row, col,
                                            block.first_head * DEPTH + 8 * chunk)),
            words);
  }

  // Takes two channels of a thread's two pixels with what is to be multiplied with them, and writes
  // the sums of squares where the first thread's is. What is not inside has the factor 0; it is not
  // finite only where what is inside in its column, or the column before, is not either.
  template <typename T>
  DEVICE static void put_sums(const float (&sum)[4], const float (&factors)[2], u16* to,
                              const Pixels& pixels, const Thread& me) {
    float sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] = sum[i] * factors[0] + sum[2 + i] * factors[1];
      sums[i] += of_neighbour(sums[i], 4);
    }
    if (me.g % 2 == 0 && pixels.inside[0])
      ::store(reinterpret_cast<u32*>(to), T::pack(sums[0], sums[1]));
  }

  // Takes a chunk of one pixel of the tile, and writes the means of squares, of whose pixels eight
  // threads and the next eight have two rows.
  template <typename T>
  DEVICE void put_means(const u32 (&words)[4], u16* images, u32 stride, const Block& block,
                        int row, int col, int chunk, bool inside) const {
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
    if (inside && row % 2 == 0 && col % 2 == 0)
      ::store(reinterpret_cast<u32*>(Squares(block).of(images, stride, row, col,
                                                       block.first_head * DEPTH + 8 * chunk)),
              means);
  }

  // Writes the means of squares of the results of all heads, which all threads of the warp must
  // have put: a thread has four channels of a square.
  template <typename T>
  DEVICE void store_means(u16* images, u32 stride, const Block& block, const Thread& me) const {
    if constexpr (STAGED) {
      const int row = me.row(), col = me.col() + me.lane / 8 * 2, chunk = me.lane % 8 / 2;
      const int half = me.lane % 2;
      const bool has[2] = {block.has_row(block.top + row + 1), block.has_col(block.left + col + 1)};
      float sums[4];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          u32 words[2] = {0, 0};
          if ((h == 0 || has[0]) && (w == 0 || has[1]))
            load_shared(words, tile_ + at(row + h, col + w, chunk) + 8 * half);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float value = i % 2 == 0 ? T::low(words[i / 2]) : T::high(words[i / 2]);
            sums[i] = h + w == 0 ? value : sums[i] + value;
          }
        }
      const float part = part_of(block, row, col);
      const u32 means[2] = {T::pack(sums[0] * part, sums[1] * part),
                            T::pack(sums[2] * part, sums[3] * part)};
      if (8 * chunk < block.heads * DEPTH && block.has_row(block.top + row) &&
          block.has_col(block.left + col))
        ::store(reinterpret_cast<u32*>(Squares(block).of(
                    images, stride, row, col, block.first_head * DEPTH + 8 * chunk + 4 * half)),
                means);
    }
  }

  // Writes the results of all heads, which all threads of the warp must have put.
  DEVICE void store_all(u16* images, u32 stride, const Block& block, const Pixels& pixels,
                        const Thread& me) const {
    if constexpr (STAGED) {
      u16* to[2];
      pixels.of(to, images, stride, block, block.first_head * DEPTH + 8 * me.t);
      const bool wanted = 8 * me.t < block.heads * DEPTH;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u32 words[4];
        load_shared(words, tile_ + at(me.row() + h, pixels.col, me.t));
        if (pixels.inside[h] && wanted) store(reinterpret_cast<u32*>(to[h]), words);
      }
    }
  }
};
