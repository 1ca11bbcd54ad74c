// Copies of pixels to a block's shared memory.
#pragma once

#include <tile.cuh>

// Copies of `ROWS` x `COLS` pixels to shared memory, from `REACH` above and left of the tile, zeros
// outside of the image.
template <int DEPTH, int REACH, int ROWS, int COLS, int PARTS>
class PixelCopies {
  using H = Heads<DEPTH>;
  static constexpr int WARPS = WARPS_OF<PARTS>;
  static constexpr int STEP = 32 / H::CHUNKS, ROW_BYTES = COLS * H::PIXEL_BYTES;
  static constexpr int ROW_STEPS = (ROWS + WARPS - 1) / WARPS, COL_STEPS = (COLS + STEP - 1) / STEP;
  Shared places_[2];  // of chunks as they are in the first columns, and turned by those of a step
  bool in_rows_[ROW_STEPS], in_cols_[COL_STEPS];  // of the image, and channels of a head
  bool in_tile_[ROW_STEPS], in_last_cols_;
  int row_, col_, channel_;

 public:
  DEVICE PixelCopies(const Block& block, const Thread& me)
      : row_(me.warp), col_(me.lane / H::CHUNKS) {
    const int chunk = me.lane % H::CHUNKS;
    channel_ = block.first_head * DEPTH + 8 * chunk;
    const bool wanted = 8 * chunk < block.heads * DEPTH;
    const int y = block.top - REACH + row_, x = block.left - REACH + col_;
#pragma unroll
    for (int r = 0; r < ROW_STEPS; ++r) {
      in_rows_[r] = wanted && block.has_row(y + r * WARPS);
      in_tile_[r] = (r + 1) * WARPS <= ROWS || row_ + r * WARPS < ROWS;
    }
#pragma unroll
    for (int c = 0; c < COL_STEPS; ++c) in_cols_[c] = block.has_col(x + c * STEP);
    places_[0] = held(shared_memory() + row_ * ROW_BYTES + H::at(col_, chunk));
    places_[1] = held(places_[0] ^ H::turn(STEP) << 4);
    in_last_cols_ = COL_STEPS * STEP <= COLS || col_ + (COL_STEPS - 1) * STEP < COLS;
  }

  // Images whose pixels lie `stride` elements apart, and a tile for them, which is at a constant
  // place in memory. If the images are `POOLED`, pixels have the values of their squares.
  struct Source {
    Shared tile;
    const u16* first;
    int row_step, col_step;  // in elements
  };
  template <bool POOLED = false>
  DEVICE Source source(Shared tile, const u16* images, u32 stride, const Block& block) const {
    if constexpr (POOLED) {
      // Steps are of whole squares.
      const Squares squares(block);
      return {tile, squares.of(images, stride, row_ - REACH, col_ - REACH, channel_),
              static_cast<int>(WARPS / 2 * squares.cols * stride),
              static_cast<int>(STEP / 2 * stride)};
    }
    return {tile, pixel_of(images, stride, block, row_ - REACH, col_ - REACH, channel_),
            static_cast<int>(WARPS * block.width * stride), static_cast<int>(STEP * stride)};
  }

  // Starts to copy from all sources, those of a pixel together: what they share is found once, and
  // takes no registers.
  template <typename... Sources>
  DEVICE void start(const Sources&... sources) const {
#pragma unroll
    for (int r = 0; r < ROW_STEPS; ++r)
#pragma unroll
      for (int c = 0; c < COL_STEPS; ++c) {
        const bool present = in_rows_[r] && in_cols_[c];
        const bool wanted = in_tile_[r] && (c + 1 < COL_STEPS || in_last_cols_);
        // The column within a step has none of the bits of the step: their turns add up.
        const Shared place = places_[H::turn(c * STEP) != 0];
        const int further = r * WARPS * ROW_BYTES + c * STEP * H::PIXEL_BYTES;
        (copy_async(place + (sources.tile - shared_memory() + further),
                    sources.first + r * sources.row_step + c * sources.col_step, present, wanted),
         ...);
      }
  }
};

// Of the tile and its halo, and of the tile alone.
template <int DEPTH, int KERNEL, int PARTS>
using TileCopies =
    PixelCopies<DEPTH, KERNEL / 2, halo_rows(KERNEL), Heads<DEPTH>::HALO_COLS, PARTS>;
template <int DEPTH, int PARTS>
using OwnCopies = PixelCopies<DEPTH, 0, TILE_ROWS, TILE_COLS, PARTS>;
