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

  // Starts to copy to a tile, which is at a constant place in memory, from images whose pixels lie
  // `stride` elements apart. If the images are `POOLED`, pixels have the values of their squares.
  template <bool POOLED = false>
  DEVICE void start(Shared tile, const u16* from, u32 stride, const Block& block) const {
    const u16* row;
    int row_step = WARPS * block.width * stride, col_step = STEP * stride;
    if constexpr (POOLED) {
      // Steps are of whole squares.
      const Squares squares(block);
      row = squares.of(from, stride, row_ - REACH, col_ - REACH, channel_);
      row_step = WARPS / 2 * squares.cols * stride, col_step = STEP / 2 * stride;
    } else {
      row = pixel_of(from, stride, block, row_ - REACH, col_ - REACH, channel_);
    }
#pragma unroll
    for (int r = 0; r < ROW_STEPS; ++r) {
      const u16* chunks = row;
#pragma unroll
      for (int c = 0; c < COL_STEPS; ++c) {
        // The column within a step has none of the bits of the step: their turns add up.
        const bool turned = H::turn(c * STEP) != 0;
        copy_async(places_[turned] +
                       (tile - shared_memory() + r * WARPS * ROW_BYTES + c * STEP * H::PIXEL_BYTES),
                   chunks, in_rows_[r] && in_cols_[c],
                   in_tile_[r] && (c + 1 < COL_STEPS || in_last_cols_));
        chunks += col_step;
      }
      row += row_step;
    }
  }
};

// Of the tile and its halo, and of the tile alone.
template <int DEPTH, int KERNEL, int PARTS>
using TileCopies =
    PixelCopies<DEPTH, KERNEL / 2, halo_rows(KERNEL), Heads<DEPTH>::HALO_COLS, PARTS>;
template <int DEPTH, int PARTS>
using OwnCopies = PixelCopies<DEPTH, 0, TILE_ROWS, TILE_COLS, PARTS>;
