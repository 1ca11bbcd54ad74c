// What the kernels of local attention share: a block's tile of pixels in shared memory.
//
// A block has a tile of 8 x 16 pixels and 32 channels, of one head or several, or one head of 64; a
// warp has one or two parts of 2 x 8 pixels, one below the other, the 16 rows of a product each.
// Pixel g of the two rows of a part is row g and g + 8.
#pragma once

#include <levels.cuh>
#include <warp.cuh>

constexpr int TILE_ROWS = 8, TILE_COLS = 16;
// Parts of a tile, and warps of a block whose warps have PARTS of them each.
constexpr int PARTS_OF_TILE = 8;
template <int PARTS>
constexpr int WARPS_OF = PARTS_OF_TILE / PARTS;

// Logit of what is outside of the window or the image. Finite, as it may be added to itself, and a
// power of 2: its product with LOG2_E is exact, and less itself it is 0 in a fused operation too.
constexpr float LOWEST = -0x1p100f;
constexpr float LOG2_E = 1.44269504f;

// Heads of a width that a block takes at once, and their pixels in shared memory.
template <int DEPTH>
struct Heads {
  static constexpr int CHANNELS = DEPTH < 32 ? 32 : DEPTH, COUNT = CHANNELS / DEPTH;
  static constexpr int CHUNKS = CHANNELS / 8;  // of 16 bytes
  static constexpr int PIXEL_BYTES = 2 * CHANNELS;
  // Columns of a tile with its halo. Warps read 24, the last two for nothing, with weights of 0:
  // those are in the next row, or what comes behind the tile, which must be numbers. Heads of 64
  // channels have zeros behind their last tile, and the others the tile's own pixels.
  static constexpr int HALO_COLS = TILE_COLS + 6;
  static constexpr int BEHIND_BYTES = DEPTH < 64 ? 0 : 2 * PIXEL_BYTES;
  static constexpr int ROW_BYTES = HALO_COLS * PIXEL_BYTES;
  static constexpr int OWN_ROW_BYTES = TILE_COLS * PIXEL_BYTES;  // without the halo
  // Steps of 16 channels of a head, and chunks of it.
  static constexpr int STEPS = DEPTH < 16 ? 1 : DEPTH / 16, HEAD_CHUNKS = DEPTH / 8;
  // Chunks whose sums are made in turn, as a product that waits for the one before costs more.
  static constexpr int IN_TURN = HEAD_CHUNKS < 2 ? 1 : 2;

  // What the number of a chunk is xor-ed with, so that no bank is shared by 8 neighbours, by 4
  // neighbours and those 8 further on, or by the first or last 4 chunks of 2 neighbours.
  static DEVICE constexpr int turn(int col) {
    return CHUNKS == 4 ? (col >> 1 ^ col >> 3 << 1) & 3
                       : (col & 1) << 2 | ((col >> 2 ^ col >> 3) & 1) << 1 | (col >> 1 & 1);
  }
  static DEVICE constexpr Shared at(int col, int chunk) {
    return col * PIXEL_BYTES + ((chunk ^ turn(col)) << 4);
  }
};

// In which order a product sums up the channels of a head. PAIRS are those of matrices that are
// loaded as such. Of CHUNKS, thread t of four has chunk t of a pixel, and chunk t + 4 of eight: it
// loads them whole, also from the images.
enum class Order { PAIRS, CHUNKS };
// Of operands that go from the images to registers, where they meet no embeddings.
template <int DEPTH>
constexpr Order ORDER = DEPTH < 64 ? Order::PAIRS : Order::CHUNKS;

constexpr int halo_rows(int kernel) { return TILE_ROWS + kernel - 1; }
template <int DEPTH, int KERNEL>
constexpr int tile_bytes() {
  return halo_rows(KERNEL) * Heads<DEPTH>::ROW_BYTES;
}

// Puts zeros behind the last tile of a block, see HALO_COLS.
template <int DEPTH>
DEVICE void put_zeros(Shared behind) {
  const u32 zeros[4] = {};
  if (16 * threadIdx.x < Heads<DEPTH>::BEHIND_BYTES) store_shared(behind + 16 * threadIdx.x, zeros);
}

// Where a thread is.
struct Thread {
  int lane, warp, g, t;  // lane = 4 g + t
  int parts;             // of its warp
  DEVICE constexpr explicit Thread(u32 number, int parts)
      : lane(number % 32), warp(number / 32), g(lane / 4), t(lane % 4), parts(parts) {}
  // The first of its warp's pixels in the block.
  DEVICE constexpr int row() const { return warp / 2 * 2 * parts; }
  DEVICE constexpr int col() const { return warp % 2 * 8; }
};

// The same thread, read again for each head or behind the loop over heads: what is found from it
// takes no registers in the loop.
template <int DEPTH>
DEVICE Thread again(const Thread& me) {
  return Heads<DEPTH>::COUNT > 1 ? Thread(thread_again(), me.parts) : me;
}

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
  // The number of the tile's first pixel, counted from the first of all, and of its first head's
  // value in planes. Whoever starts the kernels checks that such numbers, and the elements of 16
  // rows, fit 31 bits.
  int corner, first_in_planes;
  u32 tile;  // its number among those of all images

  template <int DEPTH>
  static DEVICE Block of(const Sizes& sizes) {
    constexpr int COUNT = Heads<DEPTH>::COUNT;
    const int groups = (sizes.heads + COUNT - 1) / COUNT;
    const int tile_col = groups == 1 ? blockIdx.x : product_high(blockIdx.x, sizes.groups_inverse);
    const u32 row = blockIdx.y;
    int number = 0;
#pragma unroll
    for (int step = MOST_LEVELS / 2; step; step /= 2)
      number += row >= sizes.levels[number + step].first_row ? step : 0;
    const Level& level = sizes.levels[number];
    const int tile_row = row - level.first_row;
    Block block;
    block.height = level.height, block.width = level.width;
    block.top = tile_row * TILE_ROWS, block.left = tile_col * TILE_COLS;
    block.first_head = (blockIdx.x - tile_col * groups) * COUNT;
    block.heads = COUNT == 1 ? 1 : min(COUNT, sizes.heads - block.first_head);
    const int place = block.place(block.top, block.left), image = blockIdx.z;
    const int area = level.height * level.width, first_pixel = level.first_pixel;
    block.corner = first_pixel + image * area + place;
    block.first_in_planes =
        first_pixel * sizes.heads + (image * sizes.heads + block.first_head) * area + place;
    block.tile = blockIdx.z * sizes.tiles + level.first_tile +
                 tile_row * ((level.width + TILE_COLS - 1) / TILE_COLS) + tile_col;
    return block;
  }
  // Whether there is such a tile: other levels may have more of them in a row.
  DEVICE bool is_there() const { return left < width; }
  DEVICE int place(int row, int col) const { return row * width + col; }
  DEVICE bool has_row(int y) const { return static_cast<u32>(y) < static_cast<u32>(height); }
  DEVICE bool has_col(int x) const { return static_cast<u32>(x) < static_cast<u32>(width); }
  // The number of a value in planes of (batch, heads, height, width): of a head of the block, and a
  // pixel given by its row and column in the tile.
  DEVICE int in_planes(int head, int row, int col) const {
    return first_in_planes + head * (height * width) + place(row, col);
  }
};

// A channel of a pixel of images, given by its number: in one product, as all factors have 32 bits.
template <typename Element>
DEVICE Element* numbered_pixel(Element* images, u32 stride, int number, int channel) {
  const int bytes = stride * sizeof(Element);
  return reinterpret_cast<Element*>(reinterpret_cast<u64>(images + channel) +
                                    static_cast<long long>(number) * bytes);
}

// The same, given by its row and column in the tile.
template <typename Element>
DEVICE Element* pixel_of(Element* images, u32 stride, const Block& block, int row, int col,
                         int channel) {
  return numbered_pixel(images, stride, block.corner + block.place(row, col), channel);
}

// The squares of 2 x 2 pixels of a block's tile in images that have one value for each: those at
// the edge may have a row or a column outside of the image.
struct Squares {
  int cols;
  int corner;  // the number of the tile's first square

  DEVICE explicit Squares(const Block& block) : cols((block.width + 1) >> 1) {
    const int area = (block.height + 1 >> 1) * cols;
    corner = static_cast<int>(blockIdx.z) * area + (block.top >> 1) * cols + (block.left >> 1);
  }
  // A channel of the square that a pixel of the tile is in.
  template <typename Element>
  DEVICE Element* of(Element* images, u32 stride, int row, int col, int channel) const {
    return numbered_pixel(images, stride, corner + (row >> 1) * cols + (col >> 1), channel);
  }
};

// What gradients of pixels are of those of their squares, for whole squares: kernels multiply what
// they have added up. Whoever starts them doubles the gradients of squares that have half as many
// pixels.
template <bool POOLED>
constexpr float PART = POOLED ? 0.25f : 1.f;
